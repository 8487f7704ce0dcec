"""Measure at start-up what a step and a decode take at each batch size on this machine."""

import time
from collections.abc import Callable, Sequence

import torch

from app.engine.calls import is_out_of_memory
from app.engine.costs import Costs
from models.graphs import release_cached_memory
from models.pipeline import Pipeline
from models.registry import Registry

REPEATS = 3  # after one call that is not counted; the fastest is kept, since a shared machine only ever adds time


def measure(
    pipeline: Pipeline, registry: Registry, variant: str, pixels: int, batches: Sequence[int], lanes: int
) -> Costs:
    """Time the resident `variant` on square pictures of `pixels` a side, at these batch sizes, or as far as memory
    goes. Raises torch.OutOfMemoryError if it is not enough for one picture."""
    unet, schedule = registry.use(variant), registry.schedules[variant]
    noise = pipeline.noise(0, pixels, pixels, schedule)
    conditioning = pipeline.project(unet, pipeline.encode(["a warm-up"])[0])
    step, decode = {}, {}
    for batch in sorted(batches, reverse=True):  # the largest first: the memory of its graph has room for the others'
        latents = noise.repeat(batch, 1, 1, 1)
        index = torch.zeros(batch, dtype=torch.int64, device=pipeline.device)
        rows = [conditioning] * batch
        try:
            step[batch] = _seconds(pipeline, lambda: pipeline.denoise(unet, schedule, latents, index, rows))  # noqa: B023
            decode[batch] = _seconds(pipeline, lambda: pipeline.decode(list(latents)))  # noqa: B023
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if batch == 1 or not is_out_of_memory(error):
                raise
            step.pop(batch, None)
        if batch not in decode:
            release_cached_memory()  # not above: until there, the error holds the tensors of the call that failed
    encode = _seconds(pipeline, lambda: pipeline.encode([f"warm-up {time.monotonic_ns()}"]))  # new: none is cached
    return Costs(step, decode, encode, pixels * pixels, lanes)


def _seconds(pipeline: Pipeline, call: Callable[[], object]) -> float:
    call()
    pipeline.synchronize()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        call()
        pipeline.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)
