"""The schedule's tables and step against diffusers' scheduler, and against the numbers published for the release."""

import json
from itertools import pairwise

import pytest
import torch
from diffusers import EulerDiscreteScheduler

from models.catalog import CATALOG
from models.schedule import euler_step, make_schedule, model_input

FAMILY = CATALOG["embedded"]
BASE = json.loads((FAMILY.directory / "scheduler" / "scheduler_config.json").read_text())
CLOSE = {"rtol": 1e-5, "atol": 1e-4}


@pytest.mark.parametrize(
    ("name", "timesteps"),
    [
        ("1step-unet", [999]),
        ("2step-lora", [999, 499]),
        ("4step-unet", [999, 749, 499, 249]),
        ("8step-unet", [999, 874, 749, 624, 499, 374, 249, 124]),
    ],
)
def test_timesteps_are_the_ones_the_students_were_trained_at(name, timesteps):
    schedule = make_schedule(FAMILY.variants[name], len(timesteps))
    assert schedule.timesteps.tolist() == timesteps
    assert schedule.sigmas[0] == pytest.approx(14.614655)  # pure noise, as SDXL's betas have it
    assert schedule.sigmas[-1] == 0


@pytest.mark.parametrize("name", ["1step-unet", "2step-unet", "4step-unet", "8step-lora"])
def test_our_steps_retrace_diffusers(name):
    variant = FAMILY.variants[name]
    oracle = EulerDiscreteScheduler.from_config(
        BASE, timestep_spacing="trailing", prediction_type=variant.prediction_type
    )
    oracle.set_timesteps(variant.steps[0])
    schedule = make_schedule(variant, variant.steps[0])
    assert torch.equal(schedule.sigmas, oracle.sigmas.float())
    assert torch.equal(schedule.timesteps, oracle.timesteps.float())
    ours = theirs = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * oracle.init_noise_sigma
    for (sigma, sigma_next), t in zip(pairwise(schedule.sigmas), oracle.timesteps, strict=True):
        torch.testing.assert_close(model_input(ours, sigma.expand(2)), oracle.scale_model_input(theirs, t), **CLOSE)
        theirs = oracle.step(toy_unet(theirs), t, theirs).prev_sample
        ours = euler_step(ours, toy_unet(ours), sigma.expand(2), sigma_next.expand(2), schedule.table[0, 3].expand(2))
    torch.testing.assert_close(ours, theirs, **CLOSE)


def test_steps_that_a_variant_was_not_made_for_are_refused_by_name():
    with pytest.raises(ValueError, match="4step-unet draws in 4 steps, not in 8"):
        make_schedule(FAMILY.variants["4step-unet"], 8)


def toy_unet(latents: torch.Tensor) -> torch.Tensor:
    return torch.sin(latents)
