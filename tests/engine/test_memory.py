"""A device without memory enough: what was too much is halved, nothing is lost, and the lesson stays learned."""

import time
from functools import partial

import pytest
import torch

from app.engine.costs import Costs
from app.engine.jobs import Job
from app.engine.load import choose_preload
from app.engine.loop import Loop
from app.engine.messages import Done, Failed, FromEngine, Submit
from app.engine.warmup import measure
from models.catalog import CATALOG, Weights
from models.device import Tier
from models.pipeline import Pipeline, advance
from models.registry import Registry
from models.weights import WeightStore
from tests.conftest import eventually
from tests.engine.conftest import running
from tests.models.gpu_way import GpuWay

STORE = WeightStore(CATALOG["embedded"])
COSTS = Costs(step={1: 0.01, 2: 0.01, 4: 0.01, 8: 0.01}, decode={1: 0.01, 8: 0.02}, encode=0.0, pixels=128 * 128)
LATER = time.monotonic() + 3600


@pytest.fixture(scope="module")
def registry() -> Registry:
    registry = Registry(STORE, GpuWay(), torch.float32, [Tier("cpu", 1 << 40)])
    registry.load(Weights("1step-unet"))
    return registry


@pytest.fixture
def pipeline() -> Pipeline:
    return Pipeline(STORE, GpuWay(), torch.float32)


def too_small_for(rows: int, function, error=torch.OutOfMemoryError):
    """The function on a device that has no memory for more than so many rows."""

    def limited(first, *rest):
        if len(first) > rows:
            raise error
        return function(first, *rest)

    return limited


def serve(pipeline: Pipeline, registry: Registry, jobs: int = 8) -> tuple[Loop, list[FromEngine]]:
    sent: list[FromEngine] = []
    loop = Loop(pipeline, registry, COSTS, sent.append)
    loop.post(Submit([Job(id, f"prompt {id}", Weights("1step-unet"), 1, id, 128, 128, LATER) for id in range(jobs)]))
    with running(loop):
        eventually(lambda: len(outcomes(sent)) == jobs)
    return loop, sent


def outcomes(sent: list[FromEngine]) -> dict[int, str]:
    return {
        message.id: message.cause if isinstance(message, Failed) else "done"
        for message in sent
        if isinstance(message, Done | Failed)
    }


ALL_DONE = dict.fromkeys(range(8), "done")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED")])
def test_a_step_that_does_not_fit_is_halved_and_the_cap_outlives_a_new_measurement(pipeline, registry, error):
    unet = registry.use(Weights("1step-unet"))
    pipeline.steps[unet] = too_small_for(3, partial(advance, unet), error)
    loop, sent = serve(pipeline, registry)
    assert outcomes(sent) == ALL_DONE
    loop.replace_costs(COSTS)
    assert (max(loop.costs.step), max(loop.costs.decode)) == (2, 8)


def test_prompts_that_do_not_fit_together_are_encoded_in_halves(pipeline, registry):
    pipeline.text = too_small_for(2, pipeline.text)
    assert outcomes(serve(pipeline, registry)[1]) == ALL_DONE


def test_a_decode_that_does_not_fit_is_halved_and_its_cap_is_learned(pipeline, registry):
    pipeline.decoder = too_small_for(2, pipeline.decoder)
    loop, sent = serve(pipeline, registry)
    assert outcomes(sent) == ALL_DONE
    assert (max(loop.costs.step), max(loop.costs.decode)) == (8, 1)


def test_one_picture_that_does_not_fit_is_told_so(pipeline, registry):
    pipeline.decoder = too_small_for(0, pipeline.decoder)
    assert outcomes(serve(pipeline, registry, jobs=2)[1]) == {0: "OUT_OF_MEMORY", 1: "OUT_OF_MEMORY"}


def test_the_warm_up_measures_as_far_as_memory_goes(pipeline, registry):
    pipeline.decoder = too_small_for(2, pipeline.decoder)
    assert sorted(measure(pipeline, registry, [1, 2, 4, 8], 1).step) == [1, 2]
    pipeline.decoder = too_small_for(0, pipeline.decoder)
    with pytest.raises(torch.OutOfMemoryError):
        measure(pipeline, registry, [1, 2], 1)


def test_what_is_loaded_at_start_is_what_is_there(embedded_copy):
    store = WeightStore(CATALOG["sdxl"], embedded_copy)
    assert choose_preload(store) == ["4step-unet"]
    (embedded_copy / "sdxl_lightning_4step_unet.safetensors").unlink()
    assert choose_preload(store) == ["1step-unet"]
    small = choose_preload(WeightStore(CATALOG["embedded"], embedded_copy))
    assert "4step-unet" not in small
    assert len(small) == len(CATALOG["embedded"].variants) - 1
