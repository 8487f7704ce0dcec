"""Measure at start-up what a step and a decode take at each batch size on this machine, where that is affordable."""

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from app.engine.costs import Costs
from models.catalog import Weights
from models.pipeline import Pipeline
from models.registry import Registry
from models.weights import BadWeights

REPEATS = 3  # after one call that is not counted; the fastest is kept, since a shared machine only ever adds time
COSTLY_S = 2.0  # a step and a decode of one row that take longer are measured once, and no batch is


def measure(pipeline: Pipeline, registry: Registry, batches: Sequence[int], workers: int) -> Costs:
    """Time a resident variant at these batch sizes, or as far as memory goes, on square pictures of the family's
    default side; where a picture is costly, one row of the smallest, once: costs grow with the pixels. Raises
    torch.OutOfMemoryError if memory is not enough for one picture."""
    device, size = pipeline.device, registry.store.family.size
    at_a_time = workers if registry.bind is not None else 1  # else one module steps, while the others do other things
    encode = _seconds(
        pipeline, lambda: pipeline.prompts.encode([f"warm-up {time.monotonic_ns()}"])
    )  # new: none is cached
    if device.first_call_is_typical:
        step, decode = _step_and_decode(pipeline, registry, size.minimum, 1, repeats=0)
        if step + decode > COSTLY_S:
            picture = _picture(pipeline, size.minimum, repeats=0)
            return Costs({1: step}, {1: decode}, encode, size.minimum**2, at_a_time, picture)
    picture = _picture(pipeline, size.default, REPEATS)
    device.release_memory()  # for graphs, which take their own
    steps, decodes = {}, {}
    for batch in sorted(batches, reverse=True):  # the largest first: the memory of its graph has room for the others'
        try:
            steps[batch], decodes[batch] = _step_and_decode(pipeline, registry, size.default, batch, REPEATS)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if batch == 1 or not device.is_out_of_memory(error):
                raise
        if batch not in decodes:
            device.release_memory()  # not above: until there, the error holds the tensors of the call that failed
    return Costs(steps, decodes, encode, size.default**2, at_a_time, picture)


def _picture(pipeline: Pipeline, pixels: int, repeats: int) -> float:
    """Seconds to encode a picture of `pixels` a side."""
    picture = torch.zeros(pixels, pixels, 3, dtype=torch.uint8)
    return _seconds(pipeline, lambda: pipeline.look(picture), repeats)


def _step_and_decode(
    pipeline: Pipeline, registry: Registry, pixels: int, batch: int, repeats: int
) -> tuple[float, float]:
    """Seconds of both, for `batch` rows of `pixels` a side. Raises BadWeights where nothing can be drawn by them."""
    name = next(row.name for row in registry.status() if row.state == "resident")
    unet = registry.use(Weights(name))
    schedule = registry.schedule(name, registry.store.family.variants[name].steps[0])
    latents = pipeline.noise(0, pixels, pixels, schedule).repeat(batch, 1, 1, 1)
    rows = [pipeline.project(unet, pipeline.prompts.encode(["a warm-up"])[0])] * batch
    made = dict[str, Tensor]()
    row = ([schedule] * batch, latents, [0] * batch, rows)
    step = _seconds(pipeline, lambda: made.update(step=pipeline.denoise(unet, *row)), repeats)
    decode = _seconds(pipeline, lambda: made.update(pictures=pipeline.decode(list(latents))[0]), repeats)
    if not made["step"].isfinite().all():
        raise BadWeights(f"{name}: a first step is NaN or Inf")
    if made["pictures"].min() == made["pictures"].max():
        raise BadWeights("vae: a first picture has one colour everywhere")
    return step, decode


def _seconds(pipeline: Pipeline, call: Callable[[], object], repeats: int = REPEATS) -> float:
    """The fastest of some calls after the first; of no others, the first."""
    times = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        call()
        pipeline.device.wait()
        times.append(time.perf_counter() - start)
    return min(times[1:], default=times[0])
