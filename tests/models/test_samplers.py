"""Every declared sampler, spacing and step count against diffusers' own pipeline, rows of all of them mixed."""

from functools import cache
from pathlib import Path

import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler, EulerDiscreteScheduler, StableDiffusionXLPipeline
from safetensors.torch import load_file
from torch import Tensor

from models.catalog import Variant, Weights, families
from models.device import Device, Tier
from models.pipeline import Pipeline
from models.registry import Registry
from models.schedule import make_schedule
from models.weights import WeightStore
from tests.conftest import EMBEDDED, ROOT

EXAMPLE = ROOT / "docs" / "models.example.toml"
FAMILY = families({str(EXAMPLE): EXAMPLE.read_text()})["example"]
PROMPTS = ("a red apple on a blue background", "yellow banana, green background", "something it has never seen")
TRAINED = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def scheduler(variant: Variant):
    """diffusers' own, from what the variant declares."""
    declared = {**TRAINED, "prediction_type": variant.prediction_type, "timestep_spacing": variant.spacing}
    if variant.sampler == "euler_ancestral":
        return EulerAncestralDiscreteScheduler(**declared)
    return EulerDiscreteScheduler(**declared, use_karras_sigmas=variant.sigmas == "karras")


@cache
def oracle(name: str) -> StableDiffusionXLPipeline:
    variant = FAMILY.variants[name]
    pipeline = StableDiffusionXLPipeline.from_pretrained(EMBEDDED, use_safetensors=True)
    pipeline.scheduler = scheduler(variant)
    if variant.kind == "unet":
        pipeline.unet.load_state_dict(load_file(EMBEDDED / variant.file), strict=True)
    else:
        pipeline.load_lora_weights(EMBEDDED / variant.file)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def theirs(pipeline: StableDiffusionXLPipeline, prompt: str, seed: int, steps: int) -> Tensor:
    """Latents (4, 16, 16) of a picture alone."""
    generator = torch.Generator("cpu").manual_seed(seed)
    drawn = pipeline(prompt, num_inference_steps=steps, guidance_scale=0, generator=generator, output_type="latent")
    return drawn.images[0]


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline(WeightStore(FAMILY), Device(), torch.float32)


@pytest.fixture(scope="module")
def registry() -> Registry:
    return Registry(WeightStore(FAMILY), Device(), torch.float32, [Tier("cpu", 1 << 40)])


@pytest.mark.parametrize("name", FAMILY.variants)
def test_rows_of_different_step_counts_share_every_call_and_have_diffusers_latents(pipeline, registry, name):
    """Row k joins at call k and leaves when it is done."""
    registry.load(Weights(name))
    unet = registry.use(Weights(name))
    counts = FAMILY.variants[name].steps
    asked = [(PROMPTS[k % 3], 7 + k, counts[k % len(counts)]) for k in range(3)]
    schedules = [registry.schedule(name, steps) for _, _, steps in asked]
    rows = [pipeline.begin(seed, 128, 128, schedules[k], range(counts[0]))[0] for k, (_, seed, _) in enumerate(asked)]
    paths = [range(len(schedule.timesteps)) for schedule in schedules]
    begun = [pipeline.begin(seed, 128, 128, schedules[k], paths[k]) for k, (_, seed, _) in enumerate(asked)]
    added = [each[2] for each in begun]
    conditioning = pipeline.prompts.encode([prompt for prompt, _, _ in asked])
    for call in range(max(counts) + len(asked)):
        at = [(k, call - k) for k, (_, _, steps) in enumerate(asked) if 0 <= call - k < steps]
        if not at:
            continue
        moved = pipeline.denoise(
            unet,
            [schedules[k] for k, _ in at],
            torch.stack([rows[k] for k, _ in at]),
            [step for _, step in at],
            [conditioning[k] for k, _ in at],
            [added[k][step] for k, step in at if added[k] is not None],
        )
        for (k, _), latents in zip(at, moved, strict=True):
            rows[k] = latents
    for latents, (prompt, seed, steps) in zip(rows, asked, strict=True):
        torch.testing.assert_close(latents, theirs(oracle(name), prompt, seed, steps), rtol=0, atol=1e-4)
        alone = pipeline.sample(unet, registry.schedule(name, steps), [prompt], [seed], 128, 128)
        torch.testing.assert_close(alone[0], latents, rtol=0, atol=1e-4)


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
@pytest.mark.parametrize("more", [{}, {"sigmas": "karras"}, {"sampler": "euler_ancestral"}])
@pytest.mark.parametrize("steps", [1, 3, 5, 30])
def test_every_schedule_that_can_be_declared_is_diffusers(spacing, more, steps):
    variant = Variant("x", "unet", (steps,), spacing=spacing, **more)
    declared = scheduler(variant)
    declared.set_timesteps(steps)
    ours = make_schedule(variant, steps)
    assert torch.equal(ours.timesteps, declared.timesteps.float())
    assert torch.equal(ours.sigmas, declared.sigmas)
    assert ours.start == declared.init_noise_sigma
    assert (ours.added is not None) == ("sampler" in more)


def test_no_field_of_a_directorys_scheduler_changes_the_sigmas(embedded_copy):
    (embedded_copy / "scheduler" / "scheduler_config.json").write_text('{"use_karras_sigmas": true, "beta_end": 0.5}')
    text = EXAMPLE.read_text().replace("../models/embedded", str(embedded_copy))
    other = families({str(Path("x.toml")): text})["example"]
    changed = Registry(WeightStore(other), Device(), torch.float32, [Tier("cpu", 1 << 40)])
    for name, variant in FAMILY.variants.items():
        for steps in variant.steps:
            assert torch.equal(changed.schedule(name, steps).table, make_schedule(variant, steps).table)


def test_what_an_ancestral_sampler_adds_is_added_to_guided_rows_once(pipeline, registry):
    registry.load(Weights("ancestral"))
    parts = registry.use(Weights("ancestral")), registry.schedule("ancestral", 6)
    ours = pipeline.sample(*parts, [PROMPTS[0]], [7], 128, 128, None, 2.0)[0]
    drawn = oracle("ancestral")(
        PROMPTS[0],
        num_inference_steps=6,
        guidance_scale=2.0,
        generator=torch.Generator().manual_seed(7),
        output_type="latent",
    )
    torch.testing.assert_close(ours, drawn.images[0], rtol=0, atol=1e-4)
