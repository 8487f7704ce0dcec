"""LoRA on every linear and convolution but the outer ones (section 3.6), written in the release's kohya format.

W' = W + (alpha / rank) * up @ down. A LoRA here always applies to the base UNet alone, so it carries every stage.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import nn

RANK = 12  # the paper has 64 for widths of 320 to 1280; ours are 48 to 96, and the repository is small
ALPHA = 6  # not the rank: a loader that forgets the scale is found out
OUTER = ("conv_in", "conv_out", "time_embedding.", "add_embedding.")  # the paper leaves these alone


def targets(unet: UNet2DConditionModel) -> list[str]:
    return [
        name
        for name, module in unet.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and not name.startswith(OUTER)
    ]


def attach(unet: UNet2DConditionModel, rank: int = RANK, alpha: int = ALPHA) -> list[nn.Parameter]:
    """Freeze the UNet, add a LoRA that changes nothing yet; return what is to be trained."""
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets(unet), init_lora_weights=True))
    return [p for p in unet.parameters() if p.requires_grad]


def layers(unet: UNet2DConditionModel) -> dict[str, LoraLayer]:
    return {name: module for name, module in unet.named_modules() if isinstance(module, LoraLayer)}


def state(unet: UNet2DConditionModel) -> dict[str, torch.Tensor]:
    """The LoRA alone, kohya's keys."""
    tensors = {}
    for name, layer in layers(unet).items():
        key = "lora_unet_" + name.replace(".", "_")
        down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        tensors[f"{key}.lora_down.weight"] = down.detach().clone()
        tensors[f"{key}.lora_up.weight"] = up.detach().clone()
        tensors[f"{key}.alpha"] = torch.tensor(float(layer.lora_alpha["default"]))
    return tensors


def restore(unet: UNet2DConditionModel, tensors: dict[str, torch.Tensor]) -> None:
    """Put a LoRA's values into an attached one."""
    with torch.no_grad():
        for name, layer in layers(unet).items():
            key = "lora_unet_" + name.replace(".", "_")
            layer.lora_A["default"].weight.copy_(tensors[f"{key}.lora_down.weight"])
            layer.lora_B["default"].weight.copy_(tensors[f"{key}.lora_up.weight"])


def save(unet: UNet2DConditionModel, path: Path) -> None:
    save_file({name: value.half().contiguous().cpu() for name, value in state(unet).items()}, path)


def merged(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """A plain UNet that computes the same: the start of the full training."""
    plain = UNet2DConditionModel.from_config(unet.config).to(unet.device)
    weights = {name.replace(".base_layer", ""): value for name, value in unet.state_dict().items() if ".lora_" not in name}
    for name, layer in layers(unet).items():
        weights[f"{name}.weight"] = weights[f"{name}.weight"] + layer.get_delta_weight("default")
    plain.load_state_dict(weights)
    return plain
