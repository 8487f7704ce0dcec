"""Previews: what a step takes for the clean latents, as a small picture, by a linear map (fitted in bench/)."""

import torch
from torch import Tensor


def clean_latents(before: Tensor, after: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """The clean latents that a step moved towards: models.schedule.euler_step, solved for them.

    before, after: (B, 4, h, w) float32, the latents around the step. sigma, sigma_next: (B,) float32, and not equal.
    """
    ratio = (sigma_next / sigma).view(-1, 1, 1, 1)
    return (after - ratio * before) / (1 - ratio)


def to_rgb(latents: Tensor, colours: Tensor) -> Tensor:
    """Latents (B, 4, h, w) to pictures (B, h, w, 3) uint8, one pixel for each 8 x 8 of the decoded picture.

    colours: (5, 3) float32, red, green and blue of 0 to 255 that 1 of each channel adds, and those of all zeros.
    """
    rgb = torch.einsum("bchw,cr->bhwr", latents, colours[:-1]) + colours[-1]
    return rgb.round().clamp(0, 255).to(torch.uint8)
