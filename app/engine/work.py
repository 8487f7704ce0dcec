"""What a call does on the device, for all its rows together: prompts to conditioning, a step, latents to pictures."""

import torch
from torch import Tensor

from app.engine.calls import Running
from app.engine.jobs import Job, Source
from models.modules import UNetFunction
from models.original import Kept, Original
from models.pipeline import Pipeline
from models.prompts import Conditioning
from models.schedule import Schedule


def encode(pipeline: Pipeline, rows: list[Running]) -> list[Conditioning]:
    """Each row's prompt, guided away from its negative one where it is guided, and the picture that all of them draw
    over, if they do."""
    first, source = rows[0].job, rows[0].source
    if source is not None:
        original = look(pipeline, first, source)
        for row in rows:
            row.original, row.source = original, None
    jobs = [row.job for row in rows]
    negative = [job for job in jobs if job.guidance > 1 and job.negative_prompt is not None]
    texts = [*(job.prompt for job in jobs), *(job.negative_prompt or "" for job in negative)]
    found = pipeline.prompts.encode(texts, [job.owner for job in (*jobs, *negative)])
    away = dict(zip((job.id for job in negative), found[len(jobs) :], strict=True))
    return [
        pipeline.prompts.guide(each, away.get(job.id), job.guidance) if job.guidance > 1 else each
        for job, each in zip(jobs, found, strict=False)
    ]


def denoise(pipeline: Pipeline, unet: UNetFunction, schedule: Schedule, rows: list[Running]) -> Tensor:
    """Each row's latents after its next step, (B, 4, h, w) float32; its noise is drawn before the first."""
    for row in rows:
        if row.latents is None and row.conditioning is not None:
            row.conditioning = pipeline.project(unet, row.conditioning)
            row.latents, row.kept = _begin(pipeline, schedule, row)
    latents = torch.stack([row.latents for row in rows if row.latents is not None])
    conditioning = [row.conditioning for row in rows if row.conditioning is not None]
    steps, kept = [row.job.path[row.step] for row in rows], [row.kept for row in rows]
    stepped = pipeline.denoise(unet, schedule, latents, steps, conditioning, kept)
    pipeline.device.wait()  # between steps, so that new rows can join; within a step nothing waits
    return stepped


def decode(pipeline: Pipeline, rows: list[Running]) -> tuple[list[bytes], list[bool]]:
    """Each row's picture, height x width x 3 bytes, and whether it is valid."""
    pixels, valid = pipeline.decode([row.latents for row in rows if row.latents is not None])
    return [each.numpy().tobytes() for each in pixels], valid.tolist()


def _begin(pipeline: Pipeline, schedule: Schedule, row: Running) -> tuple[Tensor, Kept | None]:
    job = row.job
    if job.strength is None:
        return pipeline.noise(job.seed, job.height, job.width, schedule), None
    assert row.original is not None, "encoded before its first step"
    return row.original.begin(pipeline.device, job.seed, schedule.table[job.path[0], 1], job.strength)


def look(pipeline: Pipeline, job: Job, source: Source) -> Original:
    """What a job draws over, as the VAE sees it."""
    mask = _pixels(source.mask, job.height, job.width) if source.mask else None
    return pipeline.look(_pixels(source.image, job.height, job.width, 3), mask)


def _pixels(values: bytes, *shape: int) -> Tensor:
    return torch.frombuffer(bytearray(values), dtype=torch.uint8).reshape(shape)
