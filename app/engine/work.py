"""What a call does on the device, for all its rows together: prompts to conditioning, a step, latents to pictures."""

from collections.abc import Mapping

import torch
from torch import Tensor

from app.engine.calls import Running
from app.engine.jobs import Job
from models.catalog import Style, Weights
from models.modules import UNetFunction, WeightSet
from models.pipeline import Pipeline
from models.prompts import Conditioning, Prompts
from models.schedule import Schedule


def encode(pipeline: Pipeline, factors: Mapping[Weights, WeightSet], rows: list[Running]) -> list[Conditioning]:
    """Each row's prompt, guided away from its negative one where it is guided. Rows share a call of the text encoders
    where the same is added to those. factors: what that is."""
    groups: dict[tuple[Style, ...], list[Job]] = {}
    for job in (row.job for row in rows):
        groups.setdefault(job.weights.styles if factors[job.weights] else (), []).append(job)
    found: dict[int, Conditioning] = {}
    for jobs in groups.values():
        weights = jobs[0].weights
        encoded = _encode(pipeline.prompts_for(weights, factors[weights]), jobs)
        found.update({job.id: each for job, each in zip(jobs, encoded, strict=True)})
    return [found[row.job.id] for row in rows]


def _encode(prompts: Prompts, jobs: list[Job]) -> list[Conditioning]:
    negative = [job for job in jobs if job.guidance > 1 and job.negative_prompt is not None]
    texts = [*(job.prompt for job in jobs), *(job.negative_prompt or "" for job in negative)]
    found = prompts.encode(texts, [job.owner for job in (*jobs, *negative)])
    away = dict(zip((job.id for job in negative), found[len(jobs) :], strict=True))
    return [
        prompts.guide(each, away.get(job.id), job.guidance) if job.guidance > 1 else each
        for job, each in zip(jobs, found, strict=False)
    ]


def denoise(pipeline: Pipeline, unet: UNetFunction, schedule: Schedule, rows: list[Running]) -> Tensor:
    """Each row's latents after its next step, (B, 4, h, w) float32; its noise is drawn before the first."""
    for row in rows:
        if row.latents is None and row.conditioning is not None:
            row.conditioning = pipeline.project(unet, row.conditioning)
            row.latents = pipeline.noise(row.job.seed, row.job.height, row.job.width, schedule)
    latents = torch.stack([row.latents for row in rows if row.latents is not None])
    conditioning = [row.conditioning for row in rows if row.conditioning is not None]
    stepped = pipeline.denoise(unet, schedule, latents, [row.step for row in rows], conditioning)
    pipeline.device.wait()  # between steps, so that new rows can join; within a step nothing waits
    return stepped


def decode(pipeline: Pipeline, rows: list[Running]) -> tuple[list[bytes], list[bool]]:
    """Each row's picture, height x width x 3 bytes, and whether it is valid."""
    pixels, valid = pipeline.decode([row.latents for row in rows if row.latents is not None])
    return [each.numpy().tobytes() for each in pixels], valid.tolist()
