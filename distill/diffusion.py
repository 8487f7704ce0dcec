"""The noise schedule and the moves along the flow (lightning.md section 4; the paper's sections 2.3, 3.5).

Times are the paper's T = 1000 as index 999 and "after the last step" as -1, where abar = 1 (clean latents).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor

from distill.text import Text

STEPS = 1000
LAST = STEPS - 1  # the paper's T
CLEAN = -1  # one move past the last timestep

Predictor = Callable[[Tensor, Tensor, Text], Tensor]  # (x_t, t, text) -> what the network says, as x_t's shape


@cache
def alphas_cumprod() -> Tensor:
    """(1001,) float32: SDXL's scaled-linear schedule with 1 appended, so that index -1 is the clean end."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, STEPS, dtype=np.float64) ** 2
    return torch.from_numpy(np.append(np.cumprod(1 - betas), 1.0)).float()


def levels(t: Tensor) -> tuple[Tensor, Tensor]:
    """(sqrt(abar_t), sqrt(1 - abar_t)), each (B, 1, 1, 1)."""
    abar = alphas_cumprod().to(t.device)[t].view(-1, 1, 1, 1)
    return abar.sqrt(), (1 - abar).sqrt()


def add_noise(clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps."""
    signal, spread = levels(t)
    return signal * clean + spread * noise


def start_from_pure_noise(clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """add_noise, but x_T is the noise itself (Eq. 24): inference starts there, so training does too."""
    return torch.where((t == LAST).view(-1, 1, 1, 1), noise, add_noise(clean, noise, t))


def clean_from_epsilon(x: Tensor, epsilon: Tensor, t: Tensor) -> Tensor:
    signal, spread = levels(t)
    return (x - spread * epsilon) / signal


def move(x: Tensor, out: Tensor, t: Tensor, t_end: Tensor, predicts: str = "epsilon") -> Tensor:
    """One deterministic step of the flow from t to t_end: read (x0, eps) off the output, noise again to t_end."""
    signal, spread = levels(t)
    if predicts == "sample":
        clean, epsilon = out, (x - signal * out) / spread
    else:
        clean, epsilon = clean_from_epsilon(x, out, t), out
    return add_noise(clean, epsilon, t_end)


def grid(steps: int) -> Tensor:
    """(steps + 1,) int64: index k is the timestep 1000 k / steps - 1, so 0 is the clean end and `steps` is 999.

    Read backwards it is diffusers' trailing spacing; each coarser grid is every n-th point of a finer one.
    """
    return (torch.arange(steps + 1, dtype=torch.float64) * STEPS / steps).round().long() - 1


def walk(
    predict: Predictor,
    x: Tensor,
    k: Tensor,
    text: Text,
    times: Tensor,
    moves: int,
    stride: int,
    predicts: str = "epsilon",
) -> Tensor:
    """`moves` steps of `stride` grid points down from point k, stopping at the clean end.

    x: (B, 4, h, w); k: (B,) int64, indices into `times` (a grid).
    """
    times = times.to(x.device)
    for _ in range(moves):
        t, t_end = times[k], times[(k - stride).clamp(min=0)]
        moved = move(x, predict(x, t.clamp(min=0), text), t, t_end, predicts)
        x = torch.where((t == CLEAN).view(-1, 1, 1, 1), x, moved)
        k = (k - stride).clamp(min=0)
    return x


def sample(
    predict: Predictor, noise: Tensor, text: Text, steps: int, predicts: str = "epsilon", times: Tensor | None = None
) -> Tensor:
    """Clean latents from noise over `steps` trailing steps (or the ascending `times` given). noise: (B, 4, h, w).

    The start is scaled by sqrt(1 - abar_T) = 0.99767, as diffusers does; the paper's is the bare noise.
    """
    times = grid(steps) if times is None else times
    top = torch.full((len(noise),), len(times) - 1, device=noise.device)
    _, spread = levels(times.to(noise.device)[top])
    return walk(predict, spread * noise, top, text, times, moves=len(times) - 1, stride=1, predicts=predicts)
