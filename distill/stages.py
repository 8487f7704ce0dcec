"""The stages and their losses (sections 3.2 to 3.7). No devices, logs or checkpoints in here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.diffusion import CLEAN, Predictor, add_noise, grid, levels, walk
from distill.discriminator import Discriminator
from distill.text import Text

# The paper's {10, 250, 500, 750}, but for 10: its noise (0.09 of a latent's deviation) hides what our students lack.
NOISED_AT = (CLEAN, 249, 499, 749)
DETAIL = (5.0, 1.0, 1.0, 1.0)  # their weights in the relaxed phases: mostly the least noise, for detail


@dataclass(frozen=True)
class Stage:
    """One student move is `moves` teacher moves of `stride` points on the grid of `grid` points."""

    steps: int  # of the student
    teacher: int  # steps of the model that teaches
    grid: int
    moves: int
    stride: int = 1
    starts: tuple[int, ...] = ()  # grid points the student begins from
    noised: bool = False  # noise what the discriminator sees
    predicts: Literal["epsilon", "sample"] = "epsilon"

    @property
    def times(self) -> Tensor:
        return grid(self.grid)

    @property
    def span(self) -> int:
        """Grid points of one student move."""
        return self.moves * self.stride

    @property
    def visited(self) -> tuple[int, ...]:
        """Where sampling in so many steps passes: for 2 steps T and 500, of {250, 500, 750, 1000}."""
        return multiples(self.span, self.steps)


def multiples(n: int, count: int) -> tuple[int, ...]:
    return tuple(n * (i + 1) for i in range(count))


MSE = Stage(steps=32, teacher=64, grid=64, moves=2, starts=multiples(2, 32))  # the paper starts from 128
STAGES = {
    8: Stage(steps=8, teacher=32, grid=32, moves=4, starts=multiples(4, 8)),
    4: Stage(steps=4, teacher=8, grid=8, moves=2, starts=multiples(2, 4)),
    # 2 and 1: from each of {250, 500, 750, 1000}, not only from where sampling begins (section 3.7.1).
    2: Stage(steps=2, teacher=4, grid=4, moves=2, starts=multiples(1, 4), noised=True),
    1: Stage(steps=1, teacher=2, grid=4, moves=2, stride=2, starts=multiples(1, 4), noised=True, predicts="sample"),
}
# The relaxed phase of 2 and 1 has "a skip-level teacher"; which one is not stated: we go back one stage. So does our 4.
SKIP = {
    4: Stage(steps=4, teacher=32, grid=32, moves=8, starts=multiples(8, 4)),
    2: Stage(steps=2, teacher=8, grid=8, moves=4, starts=multiples(2, 4), noised=True),
    1: Stage(steps=1, teacher=4, grid=4, moves=4, starts=multiples(1, 4), noised=True, predicts="sample"),
}


@dataclass(frozen=True)
class Batch:
    """x_t: (B, 4, h, w), pure noise at t = T; k: (B,), its point on the stage's grid."""

    x_t: Tensor
    k: Tensor
    text: Text


@torch.no_grad()
def teach(stage: Stage, teacher: Predictor, batch: Batch) -> Tensor:
    """Where the teacher's moves land: what the discriminator calls real. It is no data."""
    return walk(teacher, batch.x_t, batch.k, batch.text, stage.times, stage.moves, stage.stride)


def follow(stage: Stage, student: Predictor, batch: Batch) -> Tensor:
    """Where one student move lands."""
    return walk(student, batch.x_t, batch.k, batch.text, stage.times, 1, stage.span, stage.predicts)


def mse_loss(landed: Tensor, real: Tensor) -> Tensor:
    return F.mse_loss(landed, real)


def critic_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """-log D(real) - log(1 - D(fake)), in logits."""
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()


def student_loss(fake_logits: Tensor) -> Tensor:
    """-log D(fake): the non-saturating form."""
    return F.softplus(-fake_logits).mean()


def x0_switch_loss(out: Tensor, x_t: Tensor, frozen_epsilon: Tensor, t: Tensor) -> Tensor:
    """|| f_online - x(x_t, f_frozen, t) ||^2 (section 3.7.3): the same network, made to say x0 instead of epsilon."""
    signal, spread = levels(t)
    return F.mse_loss(out, (x_t - spread * frozen_epsilon) / signal)


def judge(stage: Stage, critic: Discriminator, batch: Batch, t_star: Tensor, noise: Tensor, landed: Tensor) -> Tensor:
    """The discriminator's logits of a landing, (B,): as it is (t_star CLEAN), or noised to t_star (section 3.7.2).

    Teacher's and student's are noised alike: a difference in noise is none in kind (the paper does not say).
    """
    times = stage.times.to(batch.k.device)
    t, t_end = times[batch.k], times[(batch.k - stage.span).clamp(min=0)]
    landed, t_end = add_noise(landed, noise, t_star), torch.where(t_star == CLEAN, t_end, t_star)
    logits: Tensor = critic(landed, t_end, batch.x_t, t, batch.text)
    return logits


def draw_noised_times(stage: Stage, count: int, detail: bool, generator: torch.Generator) -> Tensor:
    """(count,) from NOISED_AT, evenly or 5:1:1:1 for detail; CLEAN in the stages that have no noise there."""
    if not stage.noised:
        return torch.full((count,), CLEAN)
    weights = torch.tensor(DETAIL if detail else (1.0,) * len(DETAIL))
    return torch.tensor(NOISED_AT)[torch.multinomial(weights, count, replacement=True, generator=generator)]


def draw_starts(stage: Stage, count: int, generator: torch.Generator) -> Tensor:
    """(count,) grid points: half of all starts, half of those that sampling passes (all, for 8 and 4 steps)."""
    starts, visited = torch.tensor(stage.starts), torch.tensor(stage.visited)
    anywhere = starts[torch.randint(0, len(starts), (count,), generator=generator)]
    passed = visited[torch.randint(0, len(visited), (count,), generator=generator)]
    return torch.where(torch.rand(count, generator=generator) < 0.5, passed, anywhere)
