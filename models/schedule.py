"""The schedule: SDXL's tables, by diffusers' own scheduler, and the Euler step over them, each row at its own step."""

from dataclasses import dataclass

import torch
from diffusers import EulerDiscreteScheduler
from torch import Tensor

from models.catalog import Variant
from models.grid import BESIDE

# What the students were distilled with. No model directory's scheduler_config.json is read: it could change the sigmas.
TRAINED = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "timestep_spacing": "trailing",
    "steps_offset": 1,
    "interpolation_type": "linear",
    "final_sigmas_type": "zero",
}


@dataclass(frozen=True)
class Schedule:
    """timesteps: (N,) float32. sigmas: (N + 1,) float32, the last one 0.

    table: (N + M, 4) float32, what a row of a batch reads at its step: timestep, sigma, the next sigma, and 1 where the
    UNet predicts the clean latents, else 0. As numbers, so that one CUDA graph serves every variant. Its last M rows
    are the steps of models.grid.BESIDE.
    """

    timesteps: Tensor
    sigmas: Tensor
    table: Tensor

    def to(self, device: str) -> "Schedule":
        """The same tables on a device, so that gathering from them needs no host sync."""
        return Schedule(self.timesteps.to(device), self.sigmas.to(device), self.table.to(device))


def make_schedule(variant: Variant, steps: int) -> Schedule:
    """Trailing timesteps and their sigmas (Lightning's model card; leading ones never reach pure noise).

    Raises ValueError for steps that the variant was not made for.
    """
    if steps != variant.steps:
        raise ValueError(f"variant {variant.name} draws in {variant.steps} steps, not in {steps}")
    scheduler = EulerDiscreteScheduler(prediction_type=variant.prediction_type, **TRAINED)
    scheduler.set_timesteps(steps)
    timesteps, sigmas = scheduler.timesteps.float().cpu(), scheduler.sigmas.float().cpu()
    if len(timesteps) != steps or sigmas[-1] != 0:
        raise ValueError(f"variant {variant.name}: the scheduler made {len(timesteps)} timesteps for {steps}")
    paths = [_path(scheduler)]
    for beside in BESIDE.get(steps, ()):
        scheduler.set_timesteps(timesteps=list(beside))
        paths.append(_path(scheduler))
    table = torch.cat(paths)
    predicts_sample = torch.full_like(table[:, :1], variant.prediction_type == "sample")
    return Schedule(timesteps, sigmas, torch.cat([table, predicts_sample], dim=1))


def _path(scheduler: EulerDiscreteScheduler) -> Tensor:
    """(N, 3): timestep, sigma and the next sigma of each step."""
    timesteps, sigmas = scheduler.timesteps.float().cpu(), scheduler.sigmas.float().cpu()
    return torch.stack([timesteps, sigmas[:-1], sigmas[1:]], dim=1)


def model_input(latents: Tensor, sigma: Tensor) -> Tensor:
    """Latents scaled to unit variance, as the UNet wants them. latents: (B, 4, h, w) float32. sigma: (B,)."""
    return latents / (sigma.view(-1, 1, 1, 1) ** 2 + 1) ** 0.5


def euler_step(latents: Tensor, out: Tensor, sigma: Tensor, sigma_next: Tensor, predicts_sample: Tensor) -> Tensor:
    """Move latents from sigma to sigma_next, each row at its own step (Euler step, arXiv 2206.00364).

    latents, out: (B, 4, h, w) float32; `out` is what the UNet returned. sigma, sigma_next: (B,) float32.
    predicts_sample: (B,), not 0 where `out` is the clean latents, 0 where it is the noise.
    """
    sigma, sigma_next = sigma.view(-1, 1, 1, 1), sigma_next.view(-1, 1, 1, 1)
    clean = torch.where(predicts_sample.view(-1, 1, 1, 1) != 0, out, latents - sigma * out)
    return clean + (latents - clean) * (sigma_next / sigma)  # sigma_next = 0 lands on the clean latents
