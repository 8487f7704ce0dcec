"""diffusers' own pipeline with the same weights: the independent oracle of everything numeric."""

from functools import cache

import torch
from diffusers import (
    EulerDiscreteScheduler,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from models.catalog import CATALOG

FAMILY = CATALOG["embedded"]
DIRECTORY = str(FAMILY.directory)

NEGATIVE = "a blue background"

# A picture to draw over, of 128 x 128 pixels: an edge, a gradient and some noise. Its mask: a part, of odd edges.
IMAGE = torch.randint(0, 40, (128, 128, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
IMAGE[:, 40:] += torch.arange(88, dtype=torch.uint8)[:, None] * 2
IMAGE[50:] += torch.tensor([30, 0, 10], dtype=torch.uint8)
MASK = torch.zeros(128, 128, dtype=torch.uint8)
MASK[30:101, 21:90] = 255


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
        num_inference_steps=FAMILY.variants[name].steps[0],
        guidance_scale=0,
        generator=torch.Generator("cpu").manual_seed(seed),
        output_type=output_type,
    ).images[0]
    return torch.as_tensor(result)


@cache
def draw_over(
    name: str,
    prompt: str,
    seed: int,
    strength: float,
    timesteps: tuple[float, ...],
    with_mask: bool,
    output_type: str,
    guidance: float = 0,
) -> Tensor:
    """The same, drawn over IMAGE, and anew where MASK is white. timesteps: those of the path, where diffusers' schedule
    has others: behind its first, which strength leaves out. guidance: away from NEGATIVE."""
    kind = StableDiffusionXLInpaintPipeline if with_mask else StableDiffusionXLImg2ImgPipeline
    pipeline = kind(**diffusers_pipeline(name).components)
    pipeline.set_progress_bar_config(disable=True)
    begin = {"num_inference_steps": FAMILY.variants[name].steps[0], "strength": strength}
    if FAMILY.variants[name].steps[0] <= 2 and strength < 1:
        count = len(timesteps)
        begin = {"timesteps": [999.0, *timesteps], "strength": (count + 0.5) / (count + 1)}
    mask = {"mask_image": Image.fromarray(MASK.numpy()), "height": 128, "width": 128} if with_mask else {}
    result = pipeline(
        prompt,
        image=Image.fromarray(IMAGE.numpy()),
        negative_prompt=NEGATIVE if guidance else None,
        guidance_scale=guidance,
        generator=torch.Generator("cpu").manual_seed(seed),
        output_type=output_type,
        **begin,
        **mask,
    ).images[0]
    return torch.as_tensor(result)
