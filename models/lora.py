"""A LoRA added to a UNet's weights: every tensor of its file is used as its name says, or the file is refused."""

import json
from collections.abc import Mapping

import torch
from torch import Tensor

from models.weights import BadWeights, is_finite

# What follows a module's name: in kohya's files, in PEFT's, in diffusers' own older ones.
ROLES = {
    **dict.fromkeys((".lora_down.weight", ".lora_A.weight", ".lora.down.weight"), "down"),
    **dict.fromkeys((".lora_up.weight", ".lora_B.weight", ".lora.up.weight"), "up"),
    ".alpha": "alpha",
}
SAME_BASE = (True, False, "gaussian", "eva")  # PEFT's ways to begin; by its others a LoRA is for a base that it changed
# Stability AI's names, in which kohya trains: what is outside the blocks, and the parts of a residual block.
OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
INSIDE = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}


def fuse(
    base: dict[str, Tensor],
    lora: Mapping[str, Tensor],
    layers_per_block: int,
    dtype: torch.dtype,
    file: str,
    metadata: str = "{}",
) -> None:
    """Replace each weight W of the base that the LoRA changes by W + alpha / rank * up @ down, rounded once, to dtype.

    metadata: "lora_adapter_metadata" of a file that diffusers wrote; its alpha is told there. Where none is told
    anywhere, it is the rank (kohya's rule, and diffusers'). Raises BadWeights, naming `file` and the first tensor that
    is not used.
    """
    names = _names(base, layers_per_block)
    modules: dict[str, dict[str, str]] = {}  # for each the keys of its tensors, by their role
    for key in lora:
        stem, role = next(((key.removesuffix(end), role) for end, role in ROLES.items() if key.endswith(end)), ("", ""))
        if stem not in names or role in modules.setdefault(names[stem], {}):
            raise BadWeights(f"{file}: its tensor {key} has no place in this UNet, or not one of its own")
        modules[names[stem]][role] = key
    if not modules:
        raise BadWeights(f"{file}: it holds no tensor")
    told, wants_alpha = _told_alpha(metadata, file), any("alpha" in keys for keys in modules.values())
    for module, keys in modules.items():
        if keys.keys() != ({"down", "up", "alpha"} if wants_alpha else {"down", "up"}):
            raise BadWeights(f"{file}: {next(iter(keys.values()))} lacks one of up, down and alpha beside it")
        weight, up, down = base[f"{module}.weight"], lora[keys["up"]].float(), lora[keys["down"]].float()
        rank = len(down) if down.ndim else 0
        if (
            not rank
            or up.shape != (len(weight), rank, *(1 for _ in weight.shape[2:]))
            or down.shape[1:] != weight.shape[1:]
        ):
            raise BadWeights(f"{file}: {keys['down']} and its up do not fit this UNet")
        if "alpha" in keys and lora[keys["alpha"]].numel() != 1:
            raise BadWeights(f"{file}: {keys['alpha']} is not one number")
        alpha = lora[keys["alpha"]].item() if "alpha" in keys else rank if told is None else told
        fused = (weight.float() + alpha / rank * (up.flatten(1) @ down.flatten(1)).view_as(weight)).to(dtype)
        if not is_finite(fused):
            raise BadWeights(f"{file}: with {keys['down']} the sum is more than {dtype} holds")
        base[f"{module}.weight"] = fused


def _told_alpha(metadata: str, file: str) -> float | None:
    """The alpha of all modules, where the file's metadata have one."""
    try:
        told = {key.removeprefix("unet."): value for key, value in json.loads(metadata).items()}
        other = [key for key in ("alpha_pattern", "use_rslora", "use_dora", "lora_bias") if told.get(key)]
        if told.get("init_lora_weights") not in (*SAME_BASE, None):
            other.append("init_lora_weights")
        alpha = None if told.get("lora_alpha") is None else float(told["lora_alpha"])
    except (ValueError, TypeError, AttributeError) as error:
        raise BadWeights(f"{file}: its lora_adapter_metadata cannot be read") from error
    if other:
        raise BadWeights(f"{file}: its lora_adapter_metadata have {other[0]}, which is not read here")
    return alpha


def _names(base: Mapping[str, Tensor], layers_per_block: int) -> dict[str, str]:
    """Every name that a file may have for each linear layer and convolution, and diffusers' name for it."""
    modules = [
        key.removesuffix(".weight") for key, weight in base.items() if key.endswith(".weight") and weight.ndim > 1
    ]
    names = {}
    for module in modules:
        names[f"unet.{module}"] = module
        for name in (module, _stability_name(module, layers_per_block + 1)):
            names[f"lora_unet_{name.replace('.', '_')}"] = module
    return names


def _stability_name(module: str, per_level: int) -> str:
    """Stability AI's name of a module, as diffusers reads it (loaders/lora_conversion_utils.py)."""
    if not module.startswith(("down_blocks.", "mid_block.", "up_blocks.")):
        return OUTSIDE.get(module, module)
    block, *rest = module.replace("mid_block", "mid_block.0").split(".", 4)
    level, kind, index, inner = int(rest[0]), rest[1], int(rest[2]), rest[3]
    if kind == "downsamplers":
        return f"input_blocks.{(level + 1) * per_level}.0.op"
    if kind == "upsamplers":
        return f"output_blocks.{(level + 1) * per_level - 1}.2.{inner}"
    part = 1 if kind == "attentions" else 0
    if kind == "resnets":
        inner = INSIDE.get(inner, inner)
    if block == "mid_block":
        return f"middle_block.{1 if part else 2 * index}.{inner}"
    number = level * per_level + index
    return f"input_blocks.{number + 1}.{part}.{inner}" if block[0] == "d" else f"output_blocks.{number}.{part}.{inner}"
