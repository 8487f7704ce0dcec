"""The schedule: SDXL's tables, by diffusers' own schedulers, and the Euler step over them, each row at its own step."""

from dataclasses import dataclass

import torch
from diffusers import EulerAncestralDiscreteScheduler, EulerDiscreteScheduler
from torch import Tensor

from models.catalog import Variant, one_of
from models.grid import BESIDE

# SDXL's. No model directory's scheduler_config.json is read: it could change the sigmas.
TRAINED = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "steps_offset": 1,
}


@dataclass(frozen=True)
class Schedule:
    """timesteps: (N,) float32. sigmas: (N + 1,) float32, the last one 0. start: (), the sigma of the first latents.

    table: (N + M, 4) float32, what a row of a batch reads at its step: timestep, sigma, the sigma to move to, and 1
    where the UNet predicts the clean latents, else 0. As numbers, so that one CUDA graph serves every variant. Its last
    M rows are the steps of models.grid.BESIDE. after: (N + M,) float32, the sigma behind each step. added: (N + M,)
    float32, the sigma of the noise that an ancestral sampler adds behind each step; None for one that adds none.
    """

    timesteps: Tensor
    sigmas: Tensor
    start: Tensor
    table: Tensor
    after: Tensor
    added: Tensor | None = None

    def to(self, device: str) -> "Schedule":
        """The same tables on a device, so that gathering from them needs no host sync."""
        tensors = (self.timesteps, self.sigmas, self.start, self.table, self.after, self.added)
        return Schedule(*(each.to(device) for each in tensors if each is not None))


def make_schedule(variant: Variant, steps: int) -> Schedule:
    """The timesteps and sigmas that a variant declares. Lightning's own are trailing (model card): leading ones never
    reach pure noise. Raises ValueError for steps that it does not declare, or that cannot be spaced so.
    """
    if steps not in variant.steps:
        raise ValueError(f"variant {variant.name} draws in {one_of(variant.steps)} steps, not in {steps}")
    declared = {**TRAINED, "prediction_type": variant.prediction_type, "timestep_spacing": variant.spacing}
    is_ancestral = variant.sampler == "euler_ancestral"
    scheduler = (
        EulerAncestralDiscreteScheduler(**declared)
        if is_ancestral
        else EulerDiscreteScheduler(**declared, use_karras_sigmas=variant.sigmas == "karras")
    )
    scheduler.set_timesteps(steps)
    timesteps, sigmas = scheduler.timesteps.float().cpu(), scheduler.sigmas.float().cpu()
    if len(timesteps) != steps or sigmas[-1] != 0:  # diffusers' trailing ones: one too many for 61 steps
        raise ValueError(f"variant {variant.name}: diffusers makes {len(timesteps)} timesteps of {steps}")
    paths, plain = [_path(scheduler)], EulerDiscreteScheduler(**declared)
    for beside in BESIDE.get(steps, ()):
        plain.set_timesteps(timesteps=list(beside))
        paths.append(_path(plain))
    times, sigma, after = torch.cat(paths).unbind(1)
    added, following = None, after
    if is_ancestral:
        added = (after**2 * (sigma**2 - after**2) / sigma**2) ** 0.5
        following = (after**2 - added**2) ** 0.5
    predicts_sample = torch.full_like(times, variant.prediction_type == "sample")
    table = torch.stack([times, sigma, following, predicts_sample], dim=1)
    start = torch.as_tensor(scheduler.init_noise_sigma).float()
    return Schedule(timesteps, sigmas, start, table, after, added)


def _path(scheduler: EulerDiscreteScheduler | EulerAncestralDiscreteScheduler) -> Tensor:
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
