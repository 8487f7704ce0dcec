"""What both peers draw with: diffusers' own StableDiffusionXLPipeline, one for each variant, in memory side by side."""

from collections.abc import Iterable, Sequence
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
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    base: SDXL = StableDiffusionXLPipeline.from_pretrained(WEIGHTS, torch_dtype=dtype)
    base.vae.to(memory_format=torch.channels_last)
    return {name: _pipeline(base, VARIANTS[name], dtype) for name in names}


def _pipeline(base: SDXL, variant: Variant, dtype: torch.dtype) -> SDXL:
    unet = UNet2DConditionModel.from_config(base.unet.config)
    unet.load_state_dict(load_file(WEIGHTS / variant.file) if variant.kind == "unet" else base.unet.state_dict())
    scheduler = EulerDiscreteScheduler.from_config(
        base.scheduler.config, timestep_spacing="trailing", prediction_type=variant.prediction_type
    )
    pipeline: SDXL = StableDiffusionXLPipeline(**{**base.components, "unet": unet, "scheduler": scheduler})
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
    images = pipeline(
        prompts,
        num_inference_steps=steps,
        guidance_scale=0,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="pt",  # the fastest way out: PIL images would cost a pass more
    ).images
    return (images.float() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


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
            pngs.update(zip(rows, map(_png, pictures), strict=True))
        return [pngs[row] for row in range(len(work))]


def _png(picture: torch.Tensor) -> bytes:
    height, width, channels = picture.shape
    return fpng.from_bytes(picture.numpy().tobytes(), width, height, channels)
