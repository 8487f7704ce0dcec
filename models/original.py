"""The picture that another is drawn over: noised to where the new one begins (SDEdit, arXiv 2108.01073), and put back,
between steps, where it is kept (as diffusers inpaints with a UNet of 4 channels)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.device import Device


@dataclass(frozen=True)
class Kept:
    """What one row puts back. latents, noise: (4, h, w) float32. mask: (1, h, w) float32, 1 where it is drawn anew."""

    latents: Tensor
    noise: Tensor
    mask: Tensor

    def put_back(self, stepped: Tensor, sigma: Tensor) -> Tensor:
        """The row's latents at sigma (a scalar; 0 at its end), with the original's where the mask is 0."""
        return (1 - self.mask) * (self.latents + self.noise * sigma) + self.mask * stepped


@dataclass(frozen=True)
class Original:
    """A picture as the VAE sees it. mean, std: of its latents' distribution, (4, h, w) float32, as the UNet knows
    latents. mask: (1, h, w) float32, 1 where it is drawn anew; None: everywhere."""

    mean: Tensor
    std: Tensor
    mask: Tensor | None = None

    def begin(
        self, device: Device, seed: int, sigma: Tensor, strength: float, added: Tensor | None = None
    ) -> tuple[Tensor, Kept | None, Tensor | None]:
        """The latents to begin with at sigma (a scalar), (4, h, w) float32, what is put back after each step, and what
        is added behind each, (N, 4, h, w), where added, (N,), has the sigmas of that. Drawn in diffusers' order from
        one CPU generator: which of its latents the picture has, the noise on them, what is added."""
        generator = torch.Generator("cpu").manual_seed(seed)
        count = 2 if added is None else 2 + len(added)
        sample, noise, *more = (device.put(torch.randn(self.mean.shape, generator=generator)) for _ in range(count))
        behind = None if added is None else torch.stack(more) * added.view(-1, 1, 1, 1)
        latents = self.mean + self.std * sample
        if self.mask is None:
            return latents + noise * sigma, None, behind
        is_noise_alone = strength == 1  # as diffusers has it, and only where there is a mask
        return noise * sigma + (0 if is_noise_alone else latents), Kept(latents, noise, self.mask), behind


def put_back(stepped: Tensor, kept: Sequence[Kept | None], sigma: Tensor) -> Tensor:
    """A batch after a step, (B, 4, h, w), at sigma (B,), each row with what it keeps."""
    rows = zip(stepped, kept, sigma, strict=True)
    return torch.stack([row if each is None else each.put_back(row, at) for row, each, at in rows])
