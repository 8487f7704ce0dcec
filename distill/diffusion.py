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


def walk(
    predict: Predictor, x: Tensor, t: Tensor, text: Text, moves: int, size: int, predicts: str = "epsilon"
) -> Tensor:
    """`moves` steps of `size` timesteps from t, stopping at the clean end. x: (B, 4, h, w); t: (B,) int64."""
    for _ in range(moves):
        t_end = (t - size).clamp(min=CLEAN)
        x = move(x, predict(x, t.clamp(min=0), text), t, t_end, predicts)
        t = t_end
    return x


def trailing(steps: int) -> Tensor:
    """(steps,) int64: 999 first, as the sampler of the N-step model visits them."""
    return torch.arange(STEPS, 0, -STEPS // steps)[:steps] - 1


def sample(
    predict: Predictor, noise: Tensor, text: Text, steps: int, predicts: str = "epsilon", timesteps: Tensor | None = None
) -> Tensor:
    """Clean latents from pure noise, over the trailing timesteps (or those given). noise: (B, 4, h, w)."""
    times = trailing(steps) if timesteps is None else timesteps
    x = noise
    for t, t_end in zip(times, [*times[1:], torch.tensor(CLEAN)], strict=True):
        here, there = t.expand(len(x)).to(x.device), t_end.expand(len(x)).to(x.device)
        x = move(x, predict(x, here, text), here, there, predicts)
    return x
