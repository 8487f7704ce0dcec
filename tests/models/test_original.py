"""A picture drawn over another is diffusers' own, from every start of every variant's grid, alone and among others."""

import pytest
import torch
from torch import Tensor

from models.catalog import Weights
from models.device import Device
from models.grid import snap, spelled, starts
from models.original import Kept
from models.pipeline import Pipeline
from models.registry import Registry
from models.weights import WeightStore
from tests.models import oracle

PROMPT = "yellow banana, green background"
LATENTS = {"rtol": 0, "atol": 1e-4}
STEPS = {name: variant.steps[0] for name, variant in oracle.FAMILY.variants.items()}
UNETS = [name for name, variant in oracle.FAMILY.variants.items() if variant.kind == "unet"]
LORAS = [name for name in STEPS if name not in UNETS]
GRID = [(name, strength) for name in UNETS for strength in starts(STEPS[name])] + [(name, 0.5) for name in LORAS]


def parts(registry: Registry, name: str):
    return registry.use(Weights(name)), registry.schedule(name, STEPS[name])


def theirs(registry: Registry, name: str, seed: int, strength: float, mask: bool, kind: str = "latent") -> Tensor:
    table = registry.schedule(name, STEPS[name]).table
    timesteps = tuple(table[list(starts(STEPS[name])[strength]), 0].tolist())
    return oracle.draw_over(name, PROMPT, seed, strength, timesteps, mask, kind)


@pytest.mark.parametrize("mask", [None, oracle.MASK], ids=["img2img", "inpaint"])
@pytest.mark.parametrize(("name", "strength"), GRID)
def test_each_start_of_each_variant_has_diffusers_latents(pipeline, registry, name, strength, mask):
    original = pipeline.look(oracle.IMAGE, mask)
    ours = pipeline.sample(*parts(registry, name), [PROMPT], [3], 128, 128, original=original, strength=strength)[0]
    torch.testing.assert_close(ours, theirs(registry, name, 3, strength, mask is not None), **LATENTS)


@pytest.mark.parametrize("mask", [None, oracle.MASK], ids=["img2img", "inpaint"])
def test_a_guided_picture_over_another_has_diffusers_latents(pipeline, registry, mask):
    over = {"original": pipeline.look(oracle.IMAGE, mask), "strength": 0.5, "negative": oracle.NEGATIVE, "guidance": 2}
    ours = pipeline.sample(*parts(registry, "4step-unet"), [PROMPT], [3], 128, 128, **over)[0]
    expected = oracle.draw_over("4step-unet", PROMPT, 3, 0.5, (), mask is not None, "latent", 2)
    torch.testing.assert_close(ours, expected, **LATENTS)


@pytest.mark.parametrize("mask", [None, oracle.MASK], ids=["img2img", "inpaint"])
@pytest.mark.parametrize("name", UNETS)
def test_and_diffusers_pixels(pipeline, registry, name, mask):
    original = pipeline.look(oracle.IMAGE, mask)
    pixels, _ = pipeline.draw(*parts(registry, name), [PROMPT], [3], 128, 128, original=original, strength=0.5)
    expected = (theirs(registry, name, 3, 0.5, mask is not None, "np") * 255).round().int()
    assert (pixels[0].int() - expected).abs().max() <= 1


@pytest.mark.parametrize("name", UNETS)
def test_rows_of_all_kinds_share_calls_and_each_has_the_latents_it_has_alone(pipeline, registry, name):
    """One row from a prompt, and one of each start with a mask and without, all in one call from their first step on,
    so that the batch's rows stand at different steps and some leave before others."""
    unet, schedule = parts(registry, name)
    conditioning = pipeline.prompts.encode([PROMPT])[0]
    rows: list[tuple[int, float, bool, range]] = []
    latents, kept = list[Tensor](), list[Kept | None]()
    for strength, path in starts(STEPS[name]).items():
        for mask in (None, oracle.MASK):
            original = pipeline.look(oracle.IMAGE, mask)
            begun, keeps, _ = original.begin(pipeline.device, len(rows), schedule.table[path[0], 1], strength)
            rows.append((len(rows), strength, mask is not None, path))
            latents.append(begun)
            kept.append(keeps)
    rows.append((7, 0.0, False, range(STEPS[name])))
    latents.append(pipeline.noise(7, 128, 128, schedule))
    kept.append(None)
    for step in range(STEPS[name]):
        at = [k for k, (*_, path) in enumerate(rows) if step < len(path)]
        stepped = pipeline.denoise(
            unet,
            [schedule] * len(at),
            torch.stack([latents[k] for k in at]),
            [rows[k][-1][step] for k in at],
            [conditioning] * len(at),
            kept=[kept[k] for k in at],
        )
        for k, row in zip(at, stepped, strict=True):
            latents[k] = row
    for ours, (seed, strength, mask, _) in zip(latents[:-1], rows[:-1], strict=True):
        torch.testing.assert_close(ours, theirs(registry, name, seed, strength, mask), **LATENTS)
    torch.testing.assert_close(latents[-1], oracle.draw(name, PROMPT, 7), **LATENTS)


def test_what_float16_cannot_hold_is_encoded_in_float32(pipeline):
    other = Pipeline(WeightStore(oracle.FAMILY), Device(), torch.float16)
    with torch.no_grad():
        other.vae.vae.encoder.conv_in.weight *= 1e5
        other.vae.vae.encoder.conv_in.bias *= 1e5
    assert other.look(oracle.IMAGE).mean.isfinite().all()


@pytest.mark.parametrize("steps", range(1, 101))
def test_every_strength_of_a_grid_means_itself_and_is_spelled_so(steps):
    assert [snap(strength, steps) for strength in starts(steps)] == list(starts(steps))
    if steps <= 8:
        assert [snap(float(each), steps) for each in spelled(steps).split(", ")] == list(reversed(starts(steps)))


@pytest.mark.parametrize(
    ("strength", "steps", "used"),
    [(0.9, 4, 0.75), (0.24, 4, None), (0.3, 8, 0.25), (0.1, 8, None), (0.99, 1, 0.75), (0.5, 2, 0.5), (0.7, 5, 0.6)],
)
def test_a_strength_between_goes_down_to_the_grid_as_diffusers_does(steps, strength, used):
    assert snap(strength, steps) == used
