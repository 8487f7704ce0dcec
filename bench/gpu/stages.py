"""Where the time goes: by stage, batch, size and step count; ours before and after torch.compile, and diffusers."""

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from app.images import encode
from bench.gpu.check import recorded
from bench.gpu.compiling import compile_all
from bench.gpu.decoders import folded_ms, plain_attention_ms
from bench.gpu.ours import Ours
from bench.gpu.peer import Peer
from bench.gpu.timing import REPEATS, VARIANT, Clock, Keep, milliseconds
from bench.gpu.without import without
from bench.work import prompts
from models.catalog import Weights
from models.gpu.device import Gpu

# By size, of one row: multiplies and adds, attention too; tests/test_bench_gpu.py counts them over the rig's modules.
UNET_TFLOP = {1024: 6.761, 512: 1.589}  # a step, with the 0.0525 of the prompt's keys and values
VAE_TFLOP = {1024: 10.470, 512: 2.515}  # a decode
TEXT_TFLOP = 0.111
MATMUL = 8192


def stages(ours: Ours, peer: Peer, left: Clock, keep: Keep, mode: str) -> dict[str, Any]:
    """Everything that fits into the time there is; what does not is left out, and named in "skipped". mode: of
    torch.compile, or "none"."""
    found: dict[str, Any] = {"skipped": [], "matmul_tflops": _matmul_rate(ours)}
    batches, sizes = ours.rig.batches, ours.rig.sizes
    found["import_s"], found["load_s"] = _import_seconds() if ours.on_gpu else None, round(ours.load_s, 2)
    found["ours"], found["diffusers"] = {}, {}
    found["ours_compiled"], found["diffusers_compiled"] = {"mode": mode, "pieces": []}, {}

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
    attempt("without", without, ours, sizes[0], (1, batches[-1]), found.setdefault("without_ms", {}))
    attempt("switch", lambda: found.update(variant_switch_ms=_switch(ours)))
    attempt("folded", lambda: found.update(decode_folded_ms=folded_ms(ours, sizes[0], batches)))
    attempt("attention", lambda: found.update(decode_plain_attention_ms=plain_attention_ms(ours, sizes[0])))
    found["recorded"] = recorded(ours) if ours.on_gpu else None
    for name in set(ours.rig.variants) - {VARIANT}:
        ours.registry.unload(Weights(name))  # 5 GB each, that diffusers' largest batch may want
    for pixels in sizes:
        table = found["diffusers"].setdefault(str(pixels), {})
        attempt(f"diffusers, {pixels} px", _peer, peer, pixels, batches, left, found["skipped"], table)
    if mode != "none":

        def again(*batches: int) -> None:
            table = found["ours_compiled"].setdefault(str(sizes[0]), {})
            attempt("ours, compiled", _ours, ours, sizes[0], batches, table)

        compile_all(ours, peer, sizes[0], left, found, attempt, again)
    return found


def _ours(ours: Ours, pixels: int, batches: tuple[int, ...], table: dict[str, Any]) -> None:
    """Milliseconds by stage and batch, and of whole pictures by step count, into a table."""
    for stage in ("text", "step", "decode", "ms", "images_per_s"):
        table.setdefault(stage, {})  # what an earlier call found stands, where this one fails
    for batch in reversed(batches):
        asked, seeds = list(prompts()[:batch]), list(range(batch))
        rows = ours.start(VARIANT, asked, seeds, pixels)
        table["png"] = _png_ms(ours, rows, pixels)
        table["text"][batch] = milliseconds(partial(ours.encode_anew, asked), ours.synchronize)
        table["step"][batch] = milliseconds(partial(ours.step, VARIANT, rows, [0] * batch), ours.synchronize)
        table["decode"][batch] = milliseconds(partial(ours.decode, rows))
        for steps in (1, 2, 4, 8):
            variant = f"{steps}step-unet"
            if steps != 4 and batch not in (1, batches[-1]):
                continue
            took = milliseconds(partial(_whole, ours, variant, asked, seeds, pixels), ours.synchronize)
            table["ms"][f"{steps} steps, batch {batch}"] = took
            if steps == 4:
                table["images_per_s"][batch] = round(1e3 * batch / (took + batch * table["png"]), 2)
    table["copy"] = _copy_ms(ours, pixels)


def _whole(ours: Ours, variant: str, asked: list[str], seeds: list[int], pixels: int) -> None:
    ours.pipeline.prompts.forget()
    ours.draw(variant, asked, seeds, pixels)


def _png_ms(ours: Ours, rows: Any, pixels: int) -> float:
    data = ours.decode(rows[:1])[0].numpy().tobytes()
    return milliseconds(lambda: encode(data, pixels, pixels, "png", 90, {}))


def _copy_ms(ours: Ours, pixels: int) -> float | None:
    if not ours.on_gpu:
        return None
    device = torch.zeros(1, pixels, pixels, 3, dtype=torch.uint8, device="cuda")
    host = torch.empty_like(device, device="cpu", pin_memory=True)
    return milliseconds(lambda: host.copy_(device, non_blocking=True), torch.cuda.synchronize)


def _switch(ours: Ours) -> float:
    """Milliseconds to make another resident variant the active one."""
    for name in ("8step-unet", VARIANT):
        ours.use(name)
    names = iter(("8step-unet", VARIANT) * (REPEATS + 2))
    return milliseconds(lambda: ours.registry.use(Weights(next(names))), ours.synchronize)


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
            took = milliseconds(partial(peer.draw_files, VARIANT, batch, pixels), repeats=3)
        except RuntimeError as error:
            why = "out of memory beside ours" if Gpu.is_out_of_memory(error) else str(error)[:300]
            skipped.append(f"diffusers, {pixels} px, batch {batch}: {why}")
            continue
        table["ms"][f"4 steps, batch {batch}"] = took
        table["images_per_s"][batch] = round(1e3 * batch / took, 2)
    for steps in (1, 2, 8):
        variant = f"{steps}step-unet"
        peer.use(variant)
        took = milliseconds(partial(peer.draw_files, variant, 1, pixels), repeats=3)
        table["ms"][f"{steps} steps, batch 1"] = took


def _summarise(found: dict[str, Any], pixels: int) -> None:
    """The figures that the project is judged by: the best of our tables, compiled or not."""
    whole = "4 steps, batch 1"  # the last that a table is given: a table without it is not whole
    tables = [found[title].get(str(pixels), {}) for title in ("ours", "ours_compiled")]
    tables = [table for table in tables if whole in table.get("ms", {})]
    theirs = max(found["diffusers"].get(str(pixels), {}).get("images_per_s", {}).values(), default=None)
    found["images_per_s_4step_diffusers_1024"] = theirs
    if not tables:
        return
    rate = max(max(table["images_per_s"].values()) for table in tables)
    found["gpu_ms_4step_b1_1024"] = min(table["ms"][whole] for table in tables)
    found["vae_decode_ms_1024"] = min(took / batch for table in tables for batch, took in table["decode"].items())
    found["images_per_s_4step_ours_1024"] = rate
    found["speedup_over_diffusers_eager"] = round(rate / theirs, 2) if theirs else None
    if pixels in UNET_TFLOP:
        tflop = 4 * UNET_TFLOP[pixels] + VAE_TFLOP[pixels] + TEXT_TFLOP
        fastest = min(table["ms"][f"4 steps, batch {n}"] / n for table in tables for n in table["images_per_s"])
        found["share_of_matmul_rate"] = round(1e3 * tflop / fastest / found["matmul_tflops"], 3)


def _matmul_rate(ours: Ours) -> float:
    """TFLOP/s of a large product in the rig's dtype (a small one, of a toy): the ceiling of this device, measured."""
    side = 256 if ours.rig.is_toy else MATMUL
    a, b = torch.randn(2, side, side, device=ours.rig.device, dtype=ours.rig.dtype)
    return round(2 * side**3 / (milliseconds(lambda: a @ b, ours.synchronize, repeats=20) * 1e9), 3)


def _import_seconds() -> float:
    code = "import time; start = time.time(); import app.engine.worker; print(time.time() - start)"
    return round(float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout), 2)
