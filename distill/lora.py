"""LoRA on every linear and convolution but the outer ones (section 3.6), written in the release's kohya format.

W' = W + (alpha / rank) * up @ down, computed on the weight itself: at this size that costs nothing, and merging is
keeping the sum. A LoRA here always applies to the base UNet alone, so it carries every stage.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

RANK = 12  # the paper has 64 for widths of 320 to 1280; ours are 48 to 96, and the repository is small
ALPHA = 6  # not the rank: a loader that forgets the scale is found out
OUTER = ("conv_in", "conv_out", "time_embedding.", "add_embedding.")  # the paper leaves these alone


class LowRank(nn.Module):
    """weight: (out, in) or (out, in, kh, kw); down: (rank, in, ...), up: (out, rank, 1, ...), as LoRA files have it."""

    def __init__(self, weight: Tensor, rank: int = RANK, alpha: float = ALPHA) -> None:
        super().__init__()
        self.alpha, points = alpha, [1] * (weight.dim() - 2)
        self.down = nn.Parameter(torch.empty(rank, *weight.shape[1:], device=weight.device))
        self.up = nn.Parameter(torch.zeros(len(weight), rank, *points, device=weight.device))  # changes nothing yet
        nn.init.normal_(self.down, std=weight[0].numel() ** -0.5)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.alpha / len(self.down)) * (self.up.flatten(1) @ self.down.flatten(1)).view_as(weight)


def targets(unet: UNet2DConditionModel) -> dict[str, Any]:
    return {
        name: module
        for name, module in unet.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and not name.startswith(OUTER)
    }


def attach(base: UNet2DConditionModel) -> UNet2DConditionModel:
    """A frozen copy of the base under a LoRA that changes nothing yet: only the LoRA is to be trained."""
    unet = copy.deepcopy(base).requires_grad_(False)
    for module in targets(unet).values():
        parametrize.register_parametrization(module, "weight", LowRank(module.weight))
    return unet


def parameters(unet: UNet2DConditionModel) -> list[nn.Parameter]:
    return [p for name, p in unet.named_parameters() if ".parametrizations.weight.0." in name]


@torch.no_grad()
def merged(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """A plain, trainable UNet that computes the same: the start of the full training."""
    plain = UNet2DConditionModel.from_config(unet.config).to(unet.device, memory_format=torch.channels_last)
    weights = {name: value for name, value in unet.state_dict().items() if ".parametrizations." not in name}
    plain.load_state_dict(weights | {f"{name}.weight": module.weight for name, module in targets(unet).items()})
    return plain.eval()


def state(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    """The LoRA alone, under kohya's keys."""
    tensors = {}
    for name, module in targets(unet).items():
        low, key = module.parametrizations.weight[0], "lora_unet_" + name.replace(".", "_")
        tensors[f"{key}.lora_down.weight"] = low.down.detach()
        tensors[f"{key}.lora_up.weight"] = low.up.detach()
        tensors[f"{key}.alpha"] = torch.tensor(float(low.alpha))
    return tensors


def save(unet: UNet2DConditionModel, path: Path) -> None:
    save_file({name: value.half().contiguous().cpu() for name, value in state(unet).items()}, path)
