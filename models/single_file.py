"""SDXL in one file, in Stability AI's layout: what it holds, and each part by diffusers' names, through diffusers' own
conversion. Pure: nothing is read here, and no hub is asked."""

from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import Any

from torch import Tensor

PREFIXES = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "conditioner.embedders.0.transformer.",
    "text_encoder_2": "conditioner.embedders.1.model.",
}
CONV_IN = PREFIXES["unet"] + "input_blocks.0.0.weight"
OTHERS = {
    "cond_stage_model.": "it is Stable Diffusion 1 or 2, not SDXL",
    "conditioner.embedders.0.model.": "it is SDXL's refiner, which draws nothing by itself",
    "v_pred": "its UNet predicts v, which is not served",  # empty tensors, by which trainers tell it
    "ztsnr": "its UNet was trained with zero terminal SNR, which is not served",
    "edm_": "its UNet was trained with EDM's noise, which is not served",
}


def refusal(header: Mapping[str, Any], parts: Iterable[str]) -> str | None:
    """Why a file cannot be served, by the header of safetensors; None if it can. parts: what it must hold."""
    for start, reason in OTHERS.items():
        if any(key.startswith(start) for key in header):
            return reason
    for part in parts:
        if not any(key.startswith(PREFIXES[part]) for key in header):
            return f"it holds no {part}" + ("; a vae of its family's row would lend one" if part == "vae" else "")
    channels = header[CONV_IN]["shape"][1:2] if CONV_IN in header else []
    return None if channels == [4] else f"its UNet must read 4 channels, not {channels}: one for inpainting reads 9"


def convert(part: str, state: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """A part's tensors by diffusers' names. state: those under its prefix, by their names in the file. config: of the
    part. Raises ValueError or KeyError where diffusers cannot convert them, or leaves any of the UNet's."""
    from diffusers.loaders import single_file_utils as theirs  # two seconds, which only this takes

    found: dict[str, Tensor]
    if part == "unet":
        found = theirs.convert_ldm_unet_checkpoint(state, config)
        if len(found) != len(state):
            raise ValueError(f"{len(state) - len(found)} of its UNet's tensors have no place in SDXL's")
    elif part == "vae":
        found = theirs.convert_ldm_vae_checkpoint(state, config)
    elif part == "text_encoder":
        found = theirs.convert_ldm_clip_checkpoint(state)
    else:
        model = SimpleNamespace(config=SimpleNamespace(**config))
        found = theirs.convert_open_clip_checkpoint(model, state, prefix=PREFIXES[part])
    return found
