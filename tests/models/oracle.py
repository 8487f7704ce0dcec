"""diffusers' own pipeline with the same weights: the independent oracle of everything numeric."""

import copy
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
from safetensors.torch import load_file
from torch import Tensor

from models.catalog import CATALOG

FAMILY = CATALOG["embedded"]
DIRECTORY = str(FAMILY.directory)


@cache
def diffusers_pipeline(name: str) -> StableDiffusionXLPipeline:
    """A variant as SDXL-Lightning's model card loads it: strict UNet weights, or a LoRA through diffusers' loader."""
    variant = FAMILY.variants[name]
    pipeline = StableDiffusionXLPipeline.from_pretrained(DIRECTORY, use_safetensors=True)
    pipeline.scheduler = EulerDiscreteScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="trailing", prediction_type=variant.prediction_type
    )
    if variant.kind == "unet":
        pipeline.unet.load_state_dict(load_file(f"{DIRECTORY}/{variant.file}"), strict=True)
    else:
        pipeline.load_lora_weights(f"{DIRECTORY}/{variant.file}")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@cache
def draw(name: str, prompt: str, seed: int, output_type: str = "latent") -> Tensor:
    """One picture's latents (4, 16, 16), or its pixels (128, 128, 3) in 0..1 for output_type "np"."""
    result = diffusers_pipeline(name)(
        prompt,
        num_inference_steps=FAMILY.variants[name].steps,
        guidance_scale=0,
        generator=torch.Generator("cpu").manual_seed(seed),
        output_type=output_type,
    ).images[0]
    return torch.as_tensor(result)


def draw_styled(
    name: str,
    folder: Path,
    much: dict[str, float],
    prompts: Sequence[str],
    seeds: Sequence[int],
    output_type: str = "latent",
) -> Tensor:
    """Latents (B, 4, 16, 16), or pixels as in draw(), with LoRAs of a folder, by load_lora_weights and set_adapters."""
    pipeline = copy.deepcopy(diffusers_pipeline(name))
    own = [adapter for part in pipeline.get_list_adapters().values() for adapter in part][:1]
    for style in much:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # there is more than one adapter, and that is meant
            pipeline.load_lora_weights(folder, weight_name=f"{style}.safetensors", adapter_name=style)
    if own or much:
        pipeline.set_adapters([*own, *much], [*(1.0 for _ in own), *much.values()])
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    steps = FAMILY.variants[name].steps
    return torch.as_tensor(
        pipeline(
            list(prompts), num_inference_steps=steps, guidance_scale=0, generator=generators, output_type=output_type
        ).images
    )
