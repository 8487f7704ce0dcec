"""Previews against diffusers' scheduler, and against full decodes."""

import pytest
import torch

from models.catalog import CATALOG
from models.preview import clean_latents, to_rgb
from models.schedule import make_schedule
from tests.models import oracle

FAMILY = CATALOG["embedded"]


@pytest.mark.parametrize("variant", ["2step-unet", "4step-lora", "8step-unet"])
def test_the_clean_latents_are_those_of_diffusers_scheduler(variant):
    """Its own steps, of whatever the UNet may say."""
    schedule = make_schedule(FAMILY.variants[variant], FAMILY.variants[variant].steps[0])
    theirs = oracle.diffusers_pipeline(variant).scheduler
    theirs.set_timesteps(FAMILY.variants[variant].steps[0])
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, 16, 16, generator=generator) * schedule.sigmas[0]
    for step, timestep in enumerate(theirs.timesteps[:-1]):
        moved = theirs.step(torch.randn(latents.shape, generator=generator), timestep, latents)
        sigma, sigma_next = schedule.sigmas[step : step + 2].unsqueeze(1)
        ours = clean_latents(latents, moved.prev_sample, sigma, sigma_next)
        assert (ours - moved.pred_original_sample).abs().max() < 1e-4
        latents = moved.prev_sample


def test_the_colours_are_near_those_of_full_decodes():
    """Of finished pictures, 8 x 8 pixels averaged: three times nearer than their mean colour is."""
    latents = torch.stack([oracle.draw("4step-unet", f"a red apple on a {name} background", 0) for name in COLOURS])
    vae = oracle.diffusers_pipeline("4step-unet").vae
    with torch.inference_mode():
        pixels = (vae.decode(latents / vae.config.scaling_factor).sample.clamp(-1, 1) + 1) * 127.5
    full = torch.nn.functional.avg_pool2d(pixels, 8).permute(0, 2, 3, 1)
    error = (to_rgb(latents, torch.tensor(FAMILY.preview)).float() - full).abs().mean()
    assert error < (full - full.mean(dim=(0, 1, 2))).abs().mean() / 3


COLOURS = ("blue", "green", "white", "black", "orange", "pink")
