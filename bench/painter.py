"""What both peers draw with: diffusers' own StableDiffusionXLPipeline, one for each variant, in memory side by side."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import fpng
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils import logging
from safetensors.torch import load_file

from bench.work import EVEN_MIX, WEIGHTS, Work
from models.catalog import CATALOG, Variant

VARIANTS = CATALOG["embedded"].variants
SDXL = Any  # a StableDiffusionXLPipeline; diffusers is not typed


def load(names: Iterable[str], dtype: torch.dtype) -> dict[str, SDXL]:
    """Pipelines by variant, as SDXL-Lightning's model card sets them up. They share all but the UNet and scheduler."""
    base = quietly_open(WEIGHTS, dtype)
    base.vae.to(memory_format=torch.channels_last)
    return {name: _pipeline(base, VARIANTS[name], dtype) for name in names}


def quietly_open(directory: Path, dtype: torch.dtype) -> SDXL:
    """diffusers' pipeline as it is on the disk, without a progress bar."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    pipeline: SDXL = StableDiffusionXLPipeline.from_pretrained(
        directory, dtype=dtype, use_safetensors=True, add_watermarker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def scheduler(base: SDXL, variant: Variant) -> EulerDiscreteScheduler:
    """The one that a variant was made for."""
    return EulerDiscreteScheduler.from_config(
        base.scheduler.config, timestep_spacing="trailing", prediction_type=variant.prediction_type
    )


def _pipeline(base: SDXL, variant: Variant, dtype: torch.dtype) -> SDXL:
    unet = UNet2DConditionModel.from_config(base.unet.config)
    unet.load_state_dict(load_file(WEIGHTS / variant.file) if variant.kind == "unet" else base.unet.state_dict())
    parts = {**base.components, "unet": unet, "scheduler": scheduler(base, variant)}
    pipeline: SDXL = StableDiffusionXLPipeline(**parts, add_watermarker=False)
    if variant.kind == "lora":
        pipeline.load_lora_weights(WEIGHTS / variant.file)
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
    unet.eval().to(dtype, memory_format=torch.channels_last)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.inference_mode()
def draw(pipeline: SDXL, prompts: list[str], steps: int, seeds: list[int]) -> torch.Tensor:
    """Pictures (B, H, W, 3) uint8 by one call of the pipeline, each from its own seed."""
    return call(pipeline, prompts, steps, generator=[torch.Generator().manual_seed(seed) for seed in seeds])


def call(pipeline: SDXL, prompts: list[str], steps: int, **more: object) -> torch.Tensor:
    """Pictures (B, H, W, 3) uint8 on the host, without guidance; `more` are arguments of the pipeline."""
    # "pt" is the fastest way out: PIL images would cost a pass more
    found = pipeline(prompts, num_inference_steps=steps, guidance_scale=0, output_type="pt", **more)
    images: torch.Tensor = found.images
    return (images.float() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu()


class Painter:
    """Draws requests of mixed step counts: grouped by steps, one pipeline call for each group."""

    def __init__(self, dtype: str) -> None:
        self._by_steps = {steps: f"{steps}step-unet" for steps in EVEN_MIX}
        self._pipelines = load(self._by_steps.values(), getattr(torch, dtype))

    def draw(self, work: Sequence[Work]) -> list[bytes]:
        """PNGs in the order of the requests."""
        pngs: dict[int, bytes] = {}
        for steps in sorted({ask.steps for ask in work}):
            rows = [row for row, ask in enumerate(work) if ask.steps == steps]
            asked = [work[row] for row in rows]
            pipeline = self._pipelines[self._by_steps[steps]]
            pictures = draw(pipeline, [ask.prompt for ask in asked], steps, [ask.seed for ask in asked])
            pngs.update(zip(rows, map(png, pictures), strict=True))
        return [pngs[row] for row in range(len(work))]


def png(picture: torch.Tensor) -> bytes:
    """By the encoder that we use. picture: (H, W, 3) uint8."""
    height, width, channels = picture.shape
    file: bytes = fpng.from_bytes(picture.numpy().tobytes(), width, height, channels)
    return file
