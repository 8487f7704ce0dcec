"""Graphs: buckets, padding, splitting; static weights; prompts projected once; on a GPU, no wait within a step."""

from collections.abc import Sequence
from functools import partial

import pytest
import torch
from torch import Tensor

from models.catalog import CATALOG, Weights
from models.device import Device, Tier
from models.gpu.attention import without_masks
from models.gpu.device import Gpu
from models.gpu.graphs import BUCKETS, COMPILE_MODE, Graphed, by_calling, compiled, on_gpu, split
from models.pipeline import Pipeline, advance
from models.registry import Registry
from models.weights import WeightStore
from tests.models.gpu_way import GpuWay

STORE = WeightStore(CATALOG["embedded"])
PROMPTS = ["a red apple on a blue background", "a robot", "pizza, green background"]
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def make_registry(device: Device) -> Registry:
    registry = Registry(STORE, device, torch.float32, [Tier("cpu", 1 << 40)])
    for name in ("4step-unet", "1step-unet"):
        registry.load(Weights(name))
    return registry


@pytest.fixture(scope="module")
def plain() -> Registry:
    return make_registry(Device())


@pytest.fixture(scope="module")
def static() -> Registry:
    return make_registry(GpuWay())


@pytest.fixture
def pipeline() -> Pipeline:
    return Pipeline(STORE, Device(), torch.float32)


def step_once(pipeline: Pipeline, registry: Registry, name: str, rows: int, project: bool = False) -> Tensor:
    """Rows with seeds, prompts and steps of their own."""
    unet, schedule = registry.use(Weights(name)), registry.schedule(name, STORE.family.variants[name].steps[0])
    latents = torch.stack([pipeline.noise(seed, 128, 128, schedule) for seed in range(rows)])
    conditioning = pipeline.prompts.encode([PROMPTS[row % 3] for row in range(rows)])
    if project:
        conditioning = [pipeline.project(unet, row) for row in conditioning]
    steps = [row % len(schedule.timesteps) for row in range(rows)]
    return pipeline.denoise(unet, [schedule] * rows, latents, steps, conditioning)


@pytest.mark.parametrize(
    ("rows", "buckets"),
    [
        (1, [1]), (2, [2]), (3, [2, 1]), (4, [4]), (5, [4, 1]), (6, [4, 2]), (7, [8]), (8, [8]), (9, [8, 1]),
        (23, [8, 8, 8]),
    ],
)  # fmt: skip
def test_rows_are_padded_only_into_a_bucket_they_nearly_fill(rows: int, buckets: Sequence[int]):
    assert split(rows) == buckets


def test_rows_that_no_bucket_is_small_enough_for_are_padded():
    assert split(1, (4,)) == [4]


@pytest.mark.parametrize("rows", [1, 3, 7, 9])
def test_recorded_steps_equal_plain_ones_for_rows_at_different_steps(pipeline, plain, static, rows):
    theirs = step_once(pipeline, plain, "4step-unet", rows)
    static.use(Weights("4step-unet"))
    pipeline.steps[static.unet] = Graphed(partial(advance, static.unet), by_calling)
    first = step_once(pipeline, static, "4step-unet", rows)
    again = step_once(pipeline, static, "4step-unet", rows)  # the first call recorded; this one replays
    torch.testing.assert_close(first, theirs, **CLOSE)
    torch.testing.assert_close(again, theirs, **CLOSE)


def test_one_recording_serves_every_variant_through_weights_that_stay_where_they_are(pipeline, plain, static):
    static.use(Weights("4step-unet"))
    graphed = pipeline.steps[static.unet] = Graphed(partial(advance, static.unet), by_calling)
    step_once(pipeline, static, "4step-unet", 2)
    before = {key: tensor.data_ptr() for key, tensor in static.unet.unet.state_dict().items()}
    for name in ("1step-unet", "4step-unet"):
        ours, theirs = (step_once(pipeline, registry, name, 2) for registry in (static, plain))
        torch.testing.assert_close(ours, theirs, **CLOSE)
    assert {key: tensor.data_ptr() for key, tensor in static.unet.unet.state_dict().items()} == before
    assert len(graphed._graphs) == 1


def test_a_prompt_projected_once_steps_as_one_projected_each_time(pipeline, plain, static):
    theirs = step_once(pipeline, plain, "4step-unet", 4)
    torch.testing.assert_close(step_once(pipeline, static, "4step-unet", 4, project=True), theirs, **CLOSE)


def test_projecting_twice_changes_nothing(pipeline, static):
    unet = static.use(Weights("4step-unet"))
    once = pipeline.project(unet, pipeline.prompts.encode(PROMPTS[:1])[0])
    assert pipeline.project(unet, once).prompt_embeds is once.prompt_embeds
    assert len(once.prompt_embeds[0]) == len(static.unet.text_weights) > 0


def test_text_and_decoder_are_recorded_too(pipeline, plain):
    theirs = pipeline.prompts.encode(PROMPTS), pipeline.decode(list(step_once(pipeline, plain, "1step-unet", 3)))
    recorded = Pipeline(STORE, Device(), torch.float32)
    recorded.text = Graphed(recorded.text, by_calling)
    recorded.decoder = Graphed(recorded.decoder, by_calling, BUCKETS[:2])
    ours = recorded.prompts.encode(PROMPTS), recorded.decode(list(step_once(recorded, plain, "1step-unet", 3)))
    for row, expected in zip(ours[0], theirs[0], strict=True):
        torch.testing.assert_close(row.prompt_embeds, expected.prompt_embeds, **CLOSE)
    assert (ours[1][0].int() - theirs[1][0].int()).abs().max() <= 1
    assert ours[1][1].tolist() == [True] * 3


def test_a_better_function_takes_the_place_of_a_recorded_one():
    calls = []
    graphed = Graphed(lambda x: x + 1, by_calling)
    assert graphed(torch.zeros(3)).tolist() == [1, 1, 1]
    graphed.improve(lambda x: calls.append(len(x)) or x + 1)  # type: ignore[func-returns-value]
    assert sorted(calls) == [1, 2]
    assert graphed(torch.ones(3)).tolist() == [2, 2, 2]
    assert len(calls) == 4


def test_a_shape_that_is_seldom_asked_for_is_not_recorded():
    calls = []
    graphed = Graphed(lambda x: calls.append(len(x)) or x + 1, by_calling)  # type: ignore[func-returns-value]
    graphed.often = 3
    assert [graphed(torch.zeros(1, 2)).tolist() for _ in range(4)] == [[[1, 1]]] * 4
    assert len(graphed._graphs) == 1
    assert len(calls) == 2 + 2 + 1  # plain, plain; recorded and replayed; replayed


def test_what_cannot_be_recorded_is_called():
    def refuse(call):
        raise RuntimeError("operation not permitted when stream is capturing")

    graphed = Graphed(lambda x: x + 1, refuse)
    assert [graphed(torch.full((3,), float(at))).tolist() for at in (0, 1)] == [[1, 1, 1], [2, 2, 2]]


def test_a_step_and_a_decode_compile_without_a_break(pipeline, static):
    """Traced by Dynamo as torch.compile would, on the CPU and without Inductor's minutes."""
    static.use(Weights("4step-unet"))
    theirs = step_once(pipeline, static, "4step-unet", 2)
    whole = partial(torch.compile, fullgraph=True, dynamic=False, backend="eager")
    pipeline.steps[static.unet] = Graphed(partial(advance, static.unet), by_calling)
    step_once(pipeline, static, "4step-unet", 2)
    pipeline.steps[static.unet].improve(whole(partial(advance, static.unet)))
    torch.testing.assert_close(step_once(pipeline, static, "4step-unet", 2), theirs, **CLOSE)
    plain = pipeline.decode(list(theirs))[0]
    pipeline.decoder = Graphed(pipeline.vae, by_calling, BUCKETS[:2])
    pipeline.decode(list(theirs))
    pipeline.decoder.improve(whole(pipeline.vae))
    assert (pipeline.decode(list(theirs))[0].int() - plain.int()).abs().max() <= 1


@pytest.mark.parametrize("mode", [COMPILE_MODE, "max-autotune-no-cudagraphs", "default"])
def test_the_compiler_knows_the_options_it_is_given(mode):
    """torch checks them here; the code would be compiled at the first call."""
    assert callable(compiled(lambda x: x + 1, mode))


@pytest.mark.parametrize("layer", ["conv_in", "conv_out"])
def test_a_picture_that_float16_cannot_hold_is_decoded_in_float32(layer):
    """Beyond 65504 behind the first layer it becomes NaN at the next norm; behind the last it is Inf here and there."""
    half, whole = (Pipeline(STORE, Device(), dtype) for dtype in (torch.float16, torch.float32))
    for pipeline in (half, whole):
        getattr(pipeline.vae.vae.decoder, layer).weight *= 1e5
    latents = [torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    assert half.vae(torch.stack(latents))[1].tolist() == [False] * 3
    pixels, valid = half.decode(latents)
    assert valid.tolist() == [True] * 3
    assert (pixels.int() - whole.decode(latents)[0].int()).abs().float().mean() < 1


@pytest.mark.gpu
@needs_gpu
def test_a_recorded_step_waits_for_nothing_on_the_host():
    device = Gpu()
    registry = Registry(STORE, device, torch.float16, [Tier("cuda", 1 << 40)])
    registry.load(Weights("4step-unet"))
    pipeline = Pipeline(STORE, device, torch.float16)
    unet, schedule = registry.use(Weights("4step-unet")), registry.schedule("4step-unet", 4)
    plain = _step_on_gpu(pipeline, unet, schedule)
    pipeline.steps[unet] = Graphed(partial(advance, unet), on_gpu(-1))
    _step_on_gpu(pipeline, unet, schedule)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours = _step_on_gpu(pipeline, unet, schedule)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (ours - plain).norm() < 1e-2 * plain.norm()


def _step_on_gpu(pipeline: Pipeline, unet, schedule) -> Tensor:
    latents = torch.stack([pipeline.noise(seed, 128, 128, schedule) for seed in range(3)])
    return pipeline.denoise(unet, [schedule] * 3, latents, range(3), pipeline.prompts.encode(PROMPTS))


def test_a_text_encoder_is_causal_without_masks():
    text, ids = Pipeline(STORE, Device(), torch.float32).text, torch.arange(48).view(2, 24)
    with torch.inference_mode():
        plain = text(ids, ids)
        for encoder in (text.first, text.second):
            without_masks(encoder)
        for ours, theirs in zip(text(ids, ids), plain, strict=True):
            torch.testing.assert_close(ours, theirs, **CLOSE)
