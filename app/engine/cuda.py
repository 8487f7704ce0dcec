"""What a GPU is given before it serves, and what it is given later: a kernel for attention, graphs, compiled code."""

import os
import sys
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from app.engine.costs import Costs
from app.engine.loop import Loop
from app.logs import say
from models.attention import use_fastest_attention, without_masks
from models.graphs import BUCKETS, Graphed, compiled, on_gpu
from models.pipeline import STEPS_PRIORITY, Pipeline, TextEncoders, advance
from models.registry import Registry

DECODED = BUCKETS[:3]  # a decode at 1024 px fills the GPU from one row on, and each row more takes about 2 GB
SEEN_OFTEN, NEVER = 20, 1 << 62  # calls of a shape, after the warm-up, that make it worth a recording
SWITCH_S = 1e-4  # how long a thread keeps the interpreter from others while a compiler runs


def set_up(cache: Path) -> None:
    """Say where torch.compile keeps what it makes."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache / "inductor"))


def spare_memory() -> int:
    """Bytes for weight sets: half of what is free once text encoders and VAE are there. The other half is for the
    weights that run (5.1 GB for SDXL), activations and graphs."""
    return torch.cuda.mem_get_info()[0] // 2


def prepare(pipeline: Pipeline, registry: Registry) -> None:
    """Choose the attention kernel, and replace the pipeline's functions by graphs, which the warm-up's measurements
    record."""
    say("attention measured", milliseconds_a_step=use_fastest_attention(pipeline.dtype))
    assert isinstance(pipeline.text, TextEncoders)
    for encoder in (pipeline.text.first, pipeline.text.second):
        without_masks(encoder)
    pipeline.text = Graphed(pipeline.text, on_gpu(STEPS_PRIORITY))
    pipeline.decoder = Graphed(pipeline.decoder, on_gpu(0), DECODED)
    pipeline.steps[registry.unet] = Graphed(partial(advance, registry.unet), on_gpu(STEPS_PRIORITY))


def record_from(pipeline: Pipeline, often: int) -> None:
    """From now on record only shapes that are asked for so often: clients choose the sizes of pictures."""
    for graphed in (pipeline.text, pipeline.decoder, *pipeline.steps.values()):
        assert isinstance(graphed, Graphed)
        graphed.often = often


def record_later(loop: Loop, measure: Callable[[Sequence[int]], Costs], batches: Sequence[int]) -> None:
    """Record what larger batches run through, beside the service, each between two calls; the largest first, because
    the memory of its graphs has room for the others'."""

    def record(batch: int) -> None:
        record_from(loop.pipeline, 1)
        loop.pipeline.encode([f"warm-up {row} of {batch}" for row in range(batch)])
        loop.replace_costs(loop.costs.joined(measure([batch])))
        record_from(loop.pipeline, SEEN_OFTEN)

    record_from(loop.pipeline, SEEN_OFTEN)
    for batch in sorted(batches, reverse=True):
        loop.when_idle(partial(record, batch))
    loop.when_idle(lambda: say("graphs recorded"))


def compile_later(loop: Loop, measured: Callable[[], Costs]) -> None:
    """Compile beside the service, the decoder first: it has most to gain. Each graph is replaced as soon as its better
    one is recorded; at the end the costs are measured anew, between two calls."""
    functions: list[Callable[..., object]] = [loop.pipeline.decoder, *loop.pipeline.steps.values()]
    record_from(loop.pipeline, NEVER)  # a recording forbids the waits of the compiler's measurements

    def settle() -> None:
        loop.replace_costs(measured())
        loop.compiled = True
        say("compiled code in place")

    def work() -> None:
        usual = sys.getswitchinterval()
        # Each call of torch lets go of the interpreter's lock, and would wait so long to have it back from a compiler
        # in Python: 5 ms, some 20 times a step.
        sys.setswitchinterval(SWITCH_S)
        done = [_is_improved(graphed) for graphed in functions]
        sys.setswitchinterval(usual)
        record_from(loop.pipeline, SEEN_OFTEN)
        if all(done):
            loop.post(lambda: loop.when_idle(settle))

    threading.Thread(target=work, daemon=True, name="compile").start()


def _is_improved(graphed: Callable[..., object]) -> bool:
    assert isinstance(graphed, Graphed)
    try:
        graphed.improve(compiled(graphed.function))
    except Exception as error:  # of a compiler: anything
        say("compilation failed; serving without it", level="warning", reason=str(error)[:500])
        return False
    return True
