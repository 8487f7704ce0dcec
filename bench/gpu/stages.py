"""Where the time goes: by stage, batch, size and step count; ours before and after torch.compile, and diffusers."""

import copy
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import fpng
import numpy as np
import torch

from app.engine.cuda import DECODED
from app.images import encode
from bench.fidelity import psnr
from bench.gpu.check import recorded
from bench.gpu.ours import Ours
from bench.gpu.peer import Peer
from bench.images import SIDE, picture
from bench.work import prompts
from models.graphs import BUCKETS, Graphed, by_calling, compiled, on_gpu
from models.vectorised import fold_upsamplers, vectorise

# By size, of one row: multiplies and adds, attention too; tests/test_bench_gpu.py counts them over the rig's modules.
UNET_TFLOP = {1024: 6.761, 512: 1.589}  # a step, with the 0.0525 of the prompt's keys and values
VAE_TFLOP = {1024: 10.470, 512: 2.515}  # a decode
TEXT_TFLOP = 0.111
REPEATS = 5
VARIANT = "4step-unet"
MATMUL = 8192
# What the headline needs first.
COMPILED = ("decoder", 1), ("step", 1), ("decoder", 4), ("step", 8), ("step", 4), ("step", 2), ("decoder", 2)
NEEDED_S = {"decoder": 100, "step": 160}  # seconds that must be left to begin to compile one; a guess

Clock = Callable[[], float]  # seconds left
Keep = Callable[[dict[str, Any]], None]


def stages(
    ours: Ours, peer: Peer, sizes: tuple[int, ...], left: Clock, keep: Callable[[dict[str, Any]], None], mode: str
) -> dict[str, Any]:
    """Everything that fits into the time there is; what does not is left out, and named in "skipped". mode: of
    torch.compile, or "none"."""
    found: dict[str, Any] = {"skipped": [], "matmul_tflops": _matmul_rate(ours)}
    batches = BUCKETS[:2] if ours.rig.is_toy else BUCKETS
    found["import_s"], found["load_s"] = _import_seconds() if ours.on_gpu else None, round(ours.load_s, 2)
    photo = picture().tobytes()
    found["png_ms_photo_like_1024"] = _milliseconds(lambda: _file(photo, SIDE), lambda: None)
    jpeg = {"Pillow, one core": _milliseconds(lambda: _file(photo, SIDE, "jpeg"), lambda: None)}
    found["jpeg_ms_photo_like_1024"] = jpeg
    found["ours"], found["diffusers"] = {}, {}
    found["ours_compiled"], found["diffusers_compiled"] = {"mode": mode}, {}

    def attempt(title: str, measure: Callable[..., None], *arguments: object) -> None:
        """One section: if it fails, the others' figures stand."""
        try:
            measure(*arguments)
        except Exception as error:
            found["skipped"].append(f"{title}: {type(error).__name__}: {str(error)[:300]}")
            print(f"FAILED: {found['skipped'][-1]}", flush=True)
        _summarise(found, sizes[0])
        keep(found)

    for pixels in sizes:
        attempt(f"ours, {pixels} px", _ours, ours, pixels, batches, found["ours"].setdefault(str(pixels), {}))
    attempt("switch", lambda: found.update(variant_switch_ms=_switch(ours)))
    attempt("folded", lambda: found.update(decode_folded_ms=_folded(ours, sizes[0], batches)))
    if ours.pipeline.jpeg is not None:
        attempt("JPEG on the GPU", lambda: jpeg.update({"nvJPEG, with its copy": _jpeg_on_gpu(ours)}))
    found["recorded"] = recorded(ours) if ours.on_gpu else None
    for pixels in sizes:
        table = found["diffusers"].setdefault(str(pixels), {})
        attempt(f"diffusers, {pixels} px", _peer, peer, pixels, batches, left, found["skipped"], table)
    if mode != "none":
        plain = ours.draw(VARIANT, prompts()[:1], [0], sizes[0])[0]
        attempt("compiling the decoder", _compile, ours, sizes[0], COMPILED[:1], plain, left, found, keep)
        attempt("compiling a vectorised decoder", _vectorised, ours, sizes[0], left, found)
        attempt("compiling the rest", _compile, ours, sizes[0], COMPILED[1:], plain, left, found, keep)
        table = found["ours_compiled"].setdefault(str(sizes[0]), {})
        attempt("ours, compiled", _ours, ours, sizes[0], batches, table)
        attempt("compiling diffusers", _compile_peer, peer, sizes[0], left, found, keep)
    return found


def _ours(ours: Ours, pixels: int, batches: tuple[int, ...], table: dict[str, Any]) -> None:
    """Milliseconds by stage and batch, and of whole pictures by step count, into a table."""
    table |= {"text": {}, "step": {}, "decode": {}, "ms": {}, "images_per_s": {}}
    for batch in reversed(batches):
        asked, seeds = list(prompts()[:batch]), list(range(batch))
        rows = ours.start(VARIANT, asked, seeds, pixels)

        def text(asked: list[str] = asked) -> None:
            ours.forget_prompts()
            ours.pipeline.encode(asked)

        table["text"][batch] = _milliseconds(text, ours.synchronize)
        table["step"][batch] = _milliseconds(lambda: ours.step(VARIANT, rows, [0] * len(rows)), ours.synchronize)  # noqa: B023
        table["decode"][batch] = _milliseconds(lambda: ours.decode(rows), lambda: None)  # noqa: B023
        for steps in (1, 2, 4, 8):
            variant = f"{steps}step-unet"
            if steps != 4 and batch not in (1, batches[-1]):
                continue
            took = _milliseconds(lambda: _whole(ours, variant, asked, seeds, pixels), ours.synchronize)  # noqa: B023
            table["ms"][f"{steps} steps, batch {batch}"] = took
            if steps == 4:
                table["images_per_s"][batch] = round(1e3 * batch / (took + batch * _png_ms(ours, rows, pixels)), 2)
    table["copy"] = _copy_ms(ours, pixels)


def _whole(ours: Ours, variant: str, asked: list[str], seeds: list[int], pixels: int) -> None:
    ours.forget_prompts()
    ours.draw(variant, asked, seeds, pixels)


def _png_ms(ours: Ours, rows: Any, pixels: int) -> float:
    data = ours.decode(rows[:1])[0].numpy().tobytes()
    return _milliseconds(lambda: _file(data, pixels), lambda: None)


def _file(data: bytes, pixels: int, kind: str = "png") -> bytes:
    return encode(data, pixels, pixels, kind, 90, {})


def _jpeg_on_gpu(ours: Ours) -> float:
    """Milliseconds from pixels on the GPU to a file on the host."""
    pixels = torch.from_numpy(np.array(picture())).cuda()
    return _milliseconds(lambda: ours.pipeline.to_jpeg(pixels, 90), lambda: None)


def _copy_ms(ours: Ours, pixels: int) -> float | None:
    if not ours.on_gpu:
        return None
    device = torch.zeros(1, pixels, pixels, 3, dtype=torch.uint8, device="cuda")
    host = torch.empty_like(device, device="cpu", pin_memory=True)
    return _milliseconds(lambda: host.copy_(device, non_blocking=True), torch.cuda.synchronize)


def _switch(ours: Ours) -> float:
    """Milliseconds to make another resident variant the active one."""
    for name in ("8step-unet", VARIANT):
        ours.use(name)
    names = iter(("8step-unet", VARIANT) * (REPEATS + 2))
    return _milliseconds(lambda: ours.registry.use(next(names)), ours.synchronize)


def _folded(ours: Ours, pixels: int, batches: tuple[int, ...]) -> dict[int, float]:
    """Milliseconds of a decode by batch, not compiled, with each upsampler as one transposed convolution: 1.55 of 10.47
    TFLOP less at 1024 px. An experiment: the pipeline does this on a CPU only (models.vectorised)."""
    graphed = Graphed(_rewritten(ours, fold_upsamplers), on_gpu(0) if ours.on_gpu else by_calling, DECODED)
    return {batch: _decode_ms(ours, graphed, pixels, batch) for batch in batches if batch in DECODED}


def _vectorised(ours: Ours, pixels: int, left: Clock, found: dict[str, Any]) -> None:
    """The same, compiled, of one row, with group norms that sum by channel too. An experiment like _folded()."""
    if left() < NEEDED_S["decoder"]:
        found["skipped"].append("a vectorised decoder, compiled")
        return
    start = time.perf_counter()
    function = _compiled(ours, _rewritten(ours, vectorise, fold_upsamplers), found)
    graphed = Graphed(function, on_gpu(0) if ours.on_gpu else by_calling, (1,))
    found["decode_vectorised_and_folded_compiled_ms"] = _decode_ms(ours, graphed, pixels, 1)
    found["ours_compiled"]["decoder 1, vectorised and folded: compiled in s"] = round(time.perf_counter() - start, 1)


def _rewritten(ours: Ours, *changes: Callable[[torch.nn.Module], None]) -> torch.nn.Module:
    decoder = copy.deepcopy(ours.pipeline.vae).cpu()
    for change in changes:
        change(decoder)
    return decoder.to(ours.rig.device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def _decode_ms(ours: Ours, graphed: Graphed, pixels: int, batch: int) -> float:
    latents = torch.randn(batch, 4, pixels // 8, pixels // 8, device=ours.rig.device)
    return _milliseconds(lambda: graphed(latents), ours.synchronize)


def _peer(
    peer: Peer, pixels: int, batches: tuple[int, ...], left: Clock, skipped: list[str], table: dict[str, Any]
) -> None:
    """Whole pictures with PNG, by batch at 4 steps, and by step count alone, into a table."""
    table |= {"ms": {}, "images_per_s": {}}
    for batch in batches:
        if left() < 60:
            skipped.append(f"diffusers, {pixels} px, batch {batch}")
            continue
        try:
            took = _milliseconds(lambda: _peer_whole(peer, VARIANT, batch, pixels), lambda: None, repeats=3)  # noqa: B023
        except torch.OutOfMemoryError:
            skipped.append(f"diffusers, {pixels} px, batch {batch}: out of memory beside ours")
            continue
        table["ms"][f"4 steps, batch {batch}"] = took
        table["images_per_s"][batch] = round(1e3 * batch / took, 2)
    for steps in (1, 2, 8):
        variant = f"{steps}step-unet"
        peer.use(variant)
        took = _milliseconds(lambda: _peer_whole(peer, variant, 1, pixels), lambda: None, repeats=3)  # noqa: B023
        table["ms"][f"{steps} steps, batch 1"] = took


def _peer_whole(peer: Peer, variant: str, batch: int, pixels: int) -> None:
    for image in peer.draw(variant, prompts()[:batch], range(batch), pixels):
        fpng.from_bytes(image.numpy().tobytes(), pixels, pixels, 3)


def _compile(
    ours: Any,
    pixels: int,
    order: Sequence[tuple[str, int]],
    plain: torch.Tensor,
    left: Clock,
    found: dict[str, Any],
    keep: Keep,
) -> None:
    """Decoder or step, one bucket after another while there is time. plain: the uncompiled picture, (H, W, 3)."""
    assert isinstance(ours.pipeline.decoder, Graphed)
    assert isinstance(ours.steps, Graphed)
    graphed = {"decoder": ours.pipeline.decoder, "step": ours.steps}
    functions = {name: _compiled(ours, each.function, found) for name, each in graphed.items()}
    for name, bucket in order:
        if left() < NEEDED_S[name]:
            found["skipped"].append(f"ours, compiled {name}, batch {bucket}")
            continue
        start = time.perf_counter()
        graphed[name].improve(
            functions[name], only=lambda key: key[0] == bucket and key[1][0][-1] == pixels // 8  # noqa: B023
        )  # fmt: skip
        found["ours_compiled"][f"{name} {bucket}: compiled in s"] = round(time.perf_counter() - start, 1)
        rows = ours.start(VARIANT, prompts()[:bucket], range(bucket), pixels)
        calls = {"step": partial(ours.step, VARIANT, rows, [0] * bucket), "decoder": partial(ours.decode, rows)}
        found["ours_compiled"][f"{name} {bucket}: ms"] = _milliseconds(calls[name], ours.synchronize)
        drawn = ours.draw(VARIANT, prompts()[:1], [0], pixels)[0]
        found["ours_compiled"]["psnr_db_vs_uncompiled"] = round(psnr(drawn.numpy(), plain.numpy()), 1)
        keep(found)  # the next may outlast the time there is


def _compile_peer(peer: Any, pixels: int, left: Clock, found: dict[str, Any], keep: Keep) -> None:
    """diffusers with torch.compile, at its best eager batch."""
    rates = found["diffusers"][str(pixels)]["images_per_s"] or {1: 0.0}
    best = max(rates, key=lambda batch: rates[batch])
    if left() < 120:
        found["skipped"].append(f"diffusers, compiled, batch {best}")
        return
    start = time.perf_counter()
    peer.use(VARIANT)  # before its UNet is wrapped
    backend = "inductor" if peer.rig.device == "cuda" else "eager"
    whole = partial(torch.compile, fullgraph=True, dynamic=False, backend=backend)
    peer.pipeline.unet, peer.pipeline.vae.decode = whole(peer.pipeline.unet), whole(peer.pipeline.vae.decode)
    _peer_whole(peer, VARIANT, best, pixels)
    found["diffusers_compiled"]["compiled in s"] = round(time.perf_counter() - start, 1)
    took = _milliseconds(lambda: _peer_whole(peer, VARIANT, best, pixels), lambda: None, repeats=3)
    found["diffusers_compiled"] |= {"batch": best, "ms": took, "images_per_s": round(1e3 * best / took, 2)}


def _compiled(ours: Ours, function: Callable[..., Any], found: dict[str, Any]) -> Callable[..., Any]:
    """On a CPU traced alone, to try the script without a compiler's minutes."""
    if ours.on_gpu:
        return compiled(function, found["ours_compiled"]["mode"])
    return torch.compile(function, fullgraph=True, dynamic=False, backend="eager")


def _summarise(found: dict[str, Any], pixels: int) -> None:
    """The figures that the project is judged by."""
    tables = [found["ours"].get(str(pixels)), found["ours_compiled"].get(str(pixels))]
    whole = "4 steps, batch 1"  # the last that a table is given: a table without it is not whole
    best = next((table for table in reversed(tables) if table and whole in table["ms"]), None)
    theirs = max(found["diffusers"].get(str(pixels), {}).get("images_per_s", {}).values(), default=None)
    found["images_per_s_4step_diffusers_1024"] = theirs
    if best is None:
        return
    rate = max(best["images_per_s"].values())
    found["gpu_ms_4step_b1_1024"] = best["ms"][whole]
    found["vae_decode_ms_1024"] = min(took / batch for batch, took in best["decode"].items())
    found["images_per_s_4step_ours_1024"] = rate
    found["speedup_over_diffusers_eager"] = round(rate / theirs, 2) if theirs else None
    if pixels in UNET_TFLOP:
        tflop = 4 * UNET_TFLOP[pixels] + VAE_TFLOP[pixels] + TEXT_TFLOP
        fastest = min(best["ms"][f"4 steps, batch {batch}"] / batch for batch in best["images_per_s"])
        found["share_of_matmul_rate"] = round(1e3 * tflop / fastest / found["matmul_tflops"], 3)


def _matmul_rate(ours: Ours) -> float:
    """TFLOP/s of a large product in the rig's dtype (a small one, of a toy): the ceiling of this device, measured."""
    side = 256 if ours.rig.is_toy else MATMUL
    a, b = torch.randn(2, side, side, device=ours.rig.device, dtype=ours.rig.dtype)
    return round(2 * side**3 / (_milliseconds(lambda: a @ b, ours.synchronize, repeats=20) * 1e9), 3)


def _import_seconds() -> float:
    code = "import time; start = time.time(); import app.engine.worker; print(time.time() - start)"
    return round(float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout), 2)


def _milliseconds(call: Callable[[], object], wait: Callable[[], object], repeats: int = REPEATS) -> float:
    """The median of some calls, each waited for, after one that does not count; on a CPU, of one."""
    call()
    wait()
    times = []
    for _ in range(repeats if torch.cuda.is_available() else 1):
        start = time.perf_counter()
        call()
        wait()
        times.append(1e3 * (time.perf_counter() - start))
    return round(statistics.median(times), 3)
