"""The embedded model as a folder: diffusers' SDXL layout with the released Lightning names beside it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from distill import autoencoder, data, nets, text

STEPS = (8, 4, 2, 1)  # the step counts of the released files

Widths = tuple[int, ...]  # by block


@dataclass
class Model:
    tokenizer: CLIPTokenizer
    encoders: text.TextEncoders
    unet: UNet2DConditionModel
    vae: AutoencoderKL


def fresh(folder: Path, unet_channels: Widths, vae_channels: Widths, heads: Widths) -> Model:
    """A model with random weights; its tokenizer is trained (once: a resumed run must not shift the ids)."""
    place = folder / "tokenizer"
    tokenizer = CLIPTokenizer.from_pretrained(place) if place.exists() else text.train_tokenizer(place)
    encoders = text.TextEncoders(*text.build_encoders(tokenizer))
    return Model(tokenizer, encoders, nets.build_unet(unet_channels, heads), autoencoder.build(vae_channels))


def base_scheduler() -> EulerDiscreteScheduler:
    """stable-diffusion-xl-base-1.0's own scheduler config: a Lightning user overrides the spacing."""
    return EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        prediction_type="epsilon",
        timestep_spacing="leading",
        steps_offset=1,
        interpolation_type="linear",
        use_karras_sigmas=False,
    )


def save_base(model: Model, folder: Path) -> None:
    """Write what StableDiffusionXLPipeline.from_pretrained reads, in fp16, and vocabulary.json."""
    pipe = StableDiffusionXLPipeline(
        vae=model.vae,
        text_encoder=model.encoders.one,
        text_encoder_2=model.encoders.two,
        tokenizer=model.tokenizer,
        tokenizer_2=model.tokenizer,
        unet=model.unet,
        scheduler=base_scheduler(),
        add_watermarker=False,
    )
    dtype = model.unet.dtype
    pipe.to(torch.float16).save_pretrained(folder)
    pipe.to(dtype)
    for name in ("text_encoder", "text_encoder_2"):
        # transformers 5 loads what the config says, diffusers fp32: without this a plain from_pretrained mixes them.
        config = folder / name / "config.json"
        config.write_text(config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))
    for name in ("tokenizer", "tokenizer_2"):
        text.write_clip_files(model.tokenizer, folder / name)
    (folder / "vocabulary.json").write_text(json.dumps(vocabulary(), indent=1, ensure_ascii=False) + "\n")


def vocabulary() -> dict[str, Any]:
    """What can be asked for, and which pairs training never saw."""
    return {
        "objects": [{"name": thing.name, "codepoint": thing.codepoint} for thing in data.objects()],
        "backgrounds": data.BACKGROUNDS,
        "held_out": [[data.objects()[i].name, background] for i, background in data.pairs(held_out=True)],
    }


def load_base(folder: Path) -> Model:
    """In fp32, on the CPU."""
    encoders = text.TextEncoders(
        CLIPTextModel.from_pretrained(folder, subfolder="text_encoder", dtype=torch.float32),
        CLIPTextModelWithProjection.from_pretrained(folder, subfolder="text_encoder_2", dtype=torch.float32),
    )
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", dtype=torch.float32)
    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae", dtype=torch.float32)
    return Model(CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer"), encoders, unet, vae)


def unet_file(folder: Path, steps: int) -> Path:
    return folder / f"sdxl_lightning_{steps}step_unet{'_x0' if steps == 1 else ''}.safetensors"


def predicts(steps: int) -> Literal["epsilon", "sample"]:
    """What a step file's UNet says: the clean latents at 1 step, else the noise."""
    return "sample" if steps == 1 else "epsilon"


def lora_file(folder: Path, steps: int) -> Path:
    return folder / f"sdxl_lightning_{steps}step_lora.safetensors"


def save_unet(unet: UNet2DConditionModel, path: Path) -> None:
    """A strict UNet2DConditionModel state dict, fp16."""
    save_file({name: value.detach().half().contiguous().cpu() for name, value in unet.state_dict().items()}, path)


def load_unet(base: UNet2DConditionModel, path: Path) -> UNet2DConditionModel:
    """A copy of `base` with a step file's weights, fp32."""
    unet = UNet2DConditionModel.from_config(base.config)
    unet.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return unet
