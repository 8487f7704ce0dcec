"""What a call does on the device, for all its rows together: prompts to conditioning, a step, latents to pictures."""

import torch
from torch import Tensor

from app.engine.calls import Running
from models.modules import UNetFunction
from models.original import Kept
from models.pipeline import Conditioning, Pipeline
from models.schedule import Schedule


def encode(pipeline: Pipeline, rows: list[Running]) -> list[Conditioning]:
    """Each row's prompt, and the picture that all of them draw over, if they do."""
    job, source = rows[0].job, rows[0].source
    if source is not None:
        picture = _pixels(source.image, job.height, job.width, 3)
        original = pipeline.look(picture, _pixels(source.mask, job.height, job.width) if source.mask else None)
        for row in rows:
            row.original, row.source = original, None
    return pipeline.encode([row.job.prompt for row in rows], [row.job.owner for row in rows])


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
    if row.original is None or job.strength is None:
        return pipeline.noise(job.seed, job.height, job.width, schedule), None
    return row.original.begin(pipeline.device, job.seed, schedule.table[job.path[0], 1], job.strength)


def _pixels(values: bytes, *shape: int) -> Tensor:
    return torch.frombuffer(bytearray(values), dtype=torch.uint8).reshape(shape)
