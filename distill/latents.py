"""The training set as latents: every pair that may be trained on, a few jitters each, encoded once."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from distill import autoencoder, data
from distill.training import device


@dataclass(frozen=True)
class Latents:
    """x0: (N, 4, 16, 16) float32, at std 1; pairs: the (object, background) of each row."""

    x0: Tensor
    pairs: list[tuple[int, str]]


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: np.ndarray) -> Tensor:
    """uint8 (B, 128, 128, 3) to latents at std 1."""
    pixels = autoencoder.to_pixels(pictures).to(vae.device, memory_format=torch.channels_last)
    with torch.autocast(pixels.device.type, torch.bfloat16):
        return autoencoder.mean_latents(vae, pixels).float() * float(vae.config.scaling_factor)


@torch.no_grad()
def decode(vae: AutoencoderKL, x0: Tensor) -> Tensor:
    """Latents at std 1 to uint8 (B, 3, 128, 128), on the CPU."""
    with torch.autocast(x0.device.type, torch.bfloat16):
        parts = [vae.decode(part / vae.config.scaling_factor).sample.float() for part in x0.split(64)]
    return ((torch.cat(parts).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


def cached(
    vae: AutoencoderKL,
    path: Path,
    jitters: int = 2,
    every: int = 1,
    render: Callable[[list[tuple[int, str]], random.Random], np.ndarray] = data.draw_batch,
) -> Latents:
    """Encode the training pairs (or every n-th of them, for a toy), or read what an earlier run encoded. render: pairs
    to pictures, as data.draw_batch."""
    if not path.exists():
        pairs, rng = data.pairs()[::every] * jitters, random.Random(0)
        parts = [encode(vae, render(pairs[i : i + 64], rng)) for i in range(0, len(pairs), 64)]
        torch.save({"x0": torch.cat(parts).cpu(), "pairs": pairs}, path)
    stored = torch.load(path, weights_only=True)
    return Latents(stored["x0"].to(device()), stored["pairs"])
