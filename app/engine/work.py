"""What a call does on the device, for all its rows together: prompts to conditioning, a step, latents to pictures."""

from collections.abc import Callable

import torch
from torch import Tensor

from app.engine.calls import Running
from app.engine.jobs import Job, Source
from app.engine.messages import Preview
from models.modules import UNetFunction
from models.original import Original
from models.pipeline import Pipeline
from models.prompts import Conditioning
from models.registry import Registry


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


def denoise(
    pipeline: Pipeline, registry: Registry, unet: UNetFunction, show: Callable[[Preview], None], rows: list[Running]
) -> Tensor:
    """Each row's latents after its next step, (B, 4, h, w) float32; its noise is drawn before the first. show: takes
    a preview of each row that somebody looks at, unless this was its last step."""
    schedules = [registry.schedule(row.job.weights.variant, row.job.steps) for row in rows]
    for row, schedule in zip(rows, schedules, strict=True):
        if row.latents is None and row.conditioning is not None:
            row.conditioning = pipeline.project(unet, row.conditioning)
            size, path = (row.job.height, row.job.width), row.job.path
            begun = pipeline.begin(row.job.seed, *size, schedule, path, row.original, row.job.strength or 1.0)
            row.latents, row.kept, row.noise = begun
    latents = torch.stack([row.latents for row in rows if row.latents is not None])
    conditioning = [row.conditioning for row in rows if row.conditioning is not None]
    noise = [row.noise[row.step] for row in rows if row.noise is not None]
    steps, kept = [row.job.path[row.step] for row in rows], [row.kept for row in rows]
    stepped = pipeline.denoise(unet, schedules, latents, steps, conditioning, noise, kept)
    seen = [k for k, row in enumerate(rows) if row.job.previews and row.step + 1 < len(row.job.path)]
    if seen:
        after = stepped - torch.stack(noise) if noise else stepped
        towards = ([schedules[k] for k in seen], latents[seen], after[seen], [steps[k] for k in seen])
        for k, pixels in zip(seen, pipeline.preview(*towards).numpy(), strict=True):
            show(Preview(rows[k].job.id, rows[k].step + 1, pixels.shape[0], pixels.shape[1], pixels.tobytes()))
    pipeline.device.wait()  # between steps, so that new rows can join; within a step nothing waits
    return stepped


def decode(pipeline: Pipeline, rows: list[Running]) -> tuple[list[bytes], list[bool]]:
    """Each row's picture, height x width x 3 bytes, and whether it is valid."""
    pixels, valid = pipeline.decode([row.latents for row in rows if row.latents is not None])
    return [each.numpy().tobytes() for each in pixels], valid.tolist()


def look(pipeline: Pipeline, job: Job, source: Source) -> Original:
    """What a job draws over, as the VAE sees it."""
    mask = _pixels(source.mask, job.height, job.width) if source.mask else None
    return pipeline.look(_pixels(source.image, job.height, job.width, 3), mask)


def _pixels(values: bytes, *shape: int) -> Tensor:
    return torch.frombuffer(bytearray(values), dtype=torch.uint8).reshape(shape)
