"""torch.compile, ours and diffusers', as far as the time goes; what was measured before stands."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.fidelity import psnr
from bench.gpu.decoders import vectorised_ms
from bench.gpu.ours import Ours
from bench.gpu.peer import Peer
from bench.gpu.timing import VARIANT, Clock, milliseconds
from bench.work import prompts
from models.gpu.graphs import Graphed, compiled

HEADLINE = ("step", 1)  # behind which a picture alone is compiled throughout
ORDER = ("decoder", 1), HEADLINE, ("decoder", 4), ("step", 8), ("step", 4), ("step", 2), ("decoder", 2)
LEAST_S = 60.0  # that must be left to begin one; the watch over the part ends it where that is not enough


def compile_all(
    ours: Ours,
    peer: Peer,
    pixels: int,
    left: Clock,
    found: dict[str, Any],
    attempt: Callable[..., None],
    again: Callable[..., None],
) -> None:
    """Ours piece by piece, what the headline needs first; behind that diffusers; at the end an experiment. What of ours
    is in place is in found["ours_compiled"]["pieces"]. attempt: calls a function, and keeps what there is if it fails.
    again: measures whole pictures of these batches."""
    plain = ours.draw(VARIANT, prompts()[:1], [0], pixels)[0]
    for name, bucket in ORDER:
        attempt(f"compiling {name} {bucket}", _piece, ours, pixels, name, bucket, plain, left, found["ours_compiled"])
        if (name, bucket) == HEADLINE and found["ours_compiled"]["pieces"]:
            again(1)
            attempt("compiling diffusers", _peer, peer, pixels, left, found)
    if len(found["ours_compiled"]["pieces"]) > 2 and left() > LEAST_S:
        again(*ours.rig.batches)
    attempt("compiling a vectorised decoder", _vectorised, ours, pixels, left, found)


def _piece(ours: Ours, pixels: int, name: str, bucket: int, plain: Tensor, left: Clock, found: dict[str, Any]) -> None:
    graphed = {"decoder": ours.pipeline.decoder, "step": ours.steps}[name]
    assert isinstance(graphed, Graphed)
    start = _begin(left)
    graphed.improve(
        _compiled(ours, graphed.function, found["mode"]),
        only=lambda key: key[0] == bucket and key[1][0][-1] == pixels // 8,
    )
    took = round(time.perf_counter() - start, 1)
    found["pieces"].append(f"{name} {bucket}")
    rows = ours.start(VARIANT, prompts()[:bucket], range(bucket), pixels)
    call = partial(ours.step, VARIANT, rows, [0] * bucket) if name == "step" else partial(ours.decode, rows)
    drawn = ours.draw(VARIANT, prompts()[:1], [0], pixels)[0]
    found |= {
        f"{name} {bucket}: compiled in s": took,
        f"{name} {bucket}: ms": milliseconds(call, ours.synchronize),
        "psnr_db_vs_uncompiled": round(psnr(drawn.numpy(), plain.numpy()), 1),
    }


def _peer(peer: Peer, pixels: int, left: Clock, found: dict[str, Any]) -> None:
    """diffusers with torch.compile, at its best eager batch."""
    rates = found["diffusers"][str(pixels)]["images_per_s"] or {1: 0.0}
    best = max(rates, key=lambda batch: rates[batch])
    start = _begin(left)
    peer.compile()
    peer.draw_files(VARIANT, best, pixels)
    found["diffusers_compiled"] |= {"batch": best, "compiled in s": round(time.perf_counter() - start, 1)}
    ms = milliseconds(lambda: peer.draw_files(VARIANT, best, pixels), repeats=3)
    found["diffusers_compiled"] |= {"ms": ms, "images_per_s": round(1e3 * best / ms, 2)}


def _vectorised(ours: Ours, pixels: int, left: Clock, found: dict[str, Any]) -> None:
    mode = found["ours_compiled"]["mode"]
    _begin(left)
    took = vectorised_ms(ours, pixels, lambda function: _compiled(ours, function, mode))
    found["decode_vectorised_and_folded_compiled_ms"] = took


def _compiled(ours: Ours, function: Callable[..., Any], mode: str) -> Callable[..., Any]:
    """On a CPU traced alone, to try the script without a compiler's minutes."""
    if ours.on_gpu:
        return compiled(function, mode)
    return torch.compile(function, fullgraph=True, dynamic=False, backend="eager")


def _begin(left: Clock) -> float:
    """Now; raises TimeoutError where there is no time to begin."""
    if left() < LEAST_S:
        raise TimeoutError("no time was left to begin")
    return time.perf_counter()
