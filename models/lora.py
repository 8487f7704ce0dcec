"""LoRA files: every tensor is used as its name says, or the file is refused by the name of the first that is not.

A LoRA adds alpha / rank * up @ down to a weight. One of a variant changes the UNet; a style may change the text
encoders, too.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.weights import BadWeights, is_finite

State = Mapping[str, Tensor]
# What follows a module's name: in kohya's files, in PEFT's, in diffusers' own older ones.
ROLES = {
    **dict.fromkeys((".lora_down.weight", ".lora_A.weight"), "down"),
    **dict.fromkeys((".lora.down.weight", ".lora_linear_layer.down.weight", "_lora.down.weight"), "down"),
    **dict.fromkeys((".lora_up.weight", ".lora_B.weight"), "up"),
    **dict.fromkeys((".lora.up.weight", ".lora_linear_layer.up.weight", "_lora.up.weight"), "up"),
    ".alpha": "alpha",
}
# What is no plain LoRA, by a part of its tensors' names.
OTHERS = {
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "lora_mid": "a LoRA with a third matrix (Tucker)",
    "oft_": "OFT",
    "emb_params": "an embedding (textual inversion)",
    "clip_l": "an embedding (textual inversion)",
    "clip_g": "an embedding (textual inversion)",
    "double_blocks": "a LoRA of another model (FLUX)",
    "transformer.": "a LoRA of another model (a transformer)",
    "lora_transformer_": "a LoRA of another model (a transformer)",
    "diffusion_model.": "a checkpoint, or a LoRA of another model",
    ".diff": "a difference of whole weights",
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
UNET = "unet"
TEXT = {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}  # the parts' names, and kohya's


@dataclass(frozen=True)
class Change:
    """What a LoRA adds to a weight: scale * up @ down. up: (out, rank), down: (rank, in), as the file has them."""

    up: Tensor
    down: Tensor
    scale: float


Changes = dict[str, dict[str, Change]]  # by part ("unet", "text_encoder", ...) and by the weight's name in its state


def changes(lora: State, parts: Mapping[str, State], layers_per_block: int, file: str, metadata: str = "{}") -> Changes:
    """What a file's tensors change. parts: the states, for names and shapes, of what it may change.

    metadata: "lora_adapter_metadata" of a file that diffusers wrote; its alphas are told there. Where none is told
    anywhere, it is the rank (kohya's rule, and diffusers'). Raises BadWeights, naming `file` and the first tensor that
    is not used.
    """
    names = _names(parts, layers_per_block)
    modules: dict[tuple[str, str], dict[str, str]] = {}  # by part and module the keys of its tensors, by their role
    for key in lora:
        stem, role = next(((key.removesuffix(end), role) for end, role in ROLES.items() if key.endswith(end)), ("", ""))
        if stem not in names or role in modules.setdefault(names[stem], {}):
            other = next((other for sign, other in OTHERS.items() if sign in key), None)
            reason = f"is of {other}, which is not read here" if other else "has no place in this model"
            raise BadWeights(f"{file}: its tensor {key} {reason}{', or not one of its own' if stem in names else ''}")
        modules[names[stem]][role] = key
    if not modules:
        raise BadWeights(f"{file}: it holds no tensor")
    told, found = _told(metadata, file), Changes()
    wants_alpha = any("alpha" in keys for keys in modules.values())
    for (part, module), keys in modules.items():
        if keys.keys() != ({"down", "up", "alpha"} if wants_alpha else {"down", "up"}):
            raise BadWeights(f"{file}: {next(iter(keys.values()))} lacks one of up, down and alpha beside it")
        name = f"{module}.weight"
        weight, up, down = parts[part][name], lora[keys["up"]], lora[keys["down"]]
        rank = len(down) if down.ndim else 0
        if (
            not rank
            or up.shape != (len(weight), rank, *(1 for _ in weight.shape[2:]))
            or down.shape[1:] != weight.shape[1:]
        ):
            raise BadWeights(f"{file}: {keys['down']} and its up do not fit this model")
        if "alpha" in keys and lora[keys["alpha"]].numel() != 1:
            raise BadWeights(f"{file}: {keys['alpha']} is not one number")
        alpha = lora[keys["alpha"]].item() if "alpha" in keys else _told_alpha(told, part, module, rank)
        found.setdefault(part, {})[name] = Change(up.flatten(1), down.flatten(1), alpha / rank)
    for key, ends in told.items():
        if not key.endswith("alpha_pattern"):
            continue
        for end in ends:
            if not any(key.startswith(f"{part}.") and _is_of(end, module) for part, module in modules):
                raise BadWeights(f"{file}: its lora_adapter_metadata have an alpha for {end}, which it does not change")
    return found


def add(
    state: dict[str, Tensor], sums: Sequence[tuple[float, Mapping[str, Change]]], dtype: torch.dtype, who: str
) -> None:
    """Replace each weight W of a state that is changed by W + sum of how much * scale * up @ down, rounded once, to
    dtype. No tensor is written to. Raises BadWeights, naming `who`."""
    for name in {name: None for _, found in sums for name in found}:
        found = [(much * each[name].scale, each[name].up, each[name].down) for much, each in sums if name in each]
        total = state[name].to(found[0][1].device).float()
        for scale, up, down in found:
            total = total + scale * (up.float() @ down.float()).view_as(total)
        state[name] = total.to(dtype)
        if not is_finite(state[name]):
            raise BadWeights(f"{who}: with what it adds, {name} is more than {dtype} holds")


def _told(metadata: str, file: str) -> dict[str, Any]:
    """What the file's metadata say, by names with their part."""
    try:
        told: dict[str, Any] = dict(json.loads(metadata).items())
        for key, value in told.items():
            if key.endswith("lora_alpha") and value is not None:
                told[key] = float(value)
            elif key.endswith("alpha_pattern"):
                told[key] = {str(module): float(alpha) for module, alpha in (value or {}).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise BadWeights(f"{file}: its lora_adapter_metadata cannot be read") from error
    for key, value in told.items():
        is_other = key.endswith("init_lora_weights") and value not in (*SAME_BASE, None)
        if is_other or (key.endswith(("use_rslora", "use_dora", "lora_bias")) and value):
            raise BadWeights(f"{file}: its lora_adapter_metadata have {key}, which is not read here")
    return told


def _told_alpha(told: Mapping[str, Any], part: str, module: str, rank: int) -> float:
    """A module's alpha: its own where the metadata have one (PEFT's rule: by the end of its name), or the part's."""
    patterns = told.get(f"{part}.alpha_pattern", {})
    alpha = next((patterns[end] for end in patterns if _is_of(end, module)), told.get(f"{part}.lora_alpha"))
    return float(rank if alpha is None else alpha)


def _is_of(end: str, module: str) -> bool:
    return f".text_model.{module.removeprefix('text_model.')}".endswith(f".{end.removeprefix('^')}")


def _names(parts: Mapping[str, State], layers_per_block: int) -> dict[str, tuple[str, str]]:
    """Every name that a file may have for each linear layer and convolution, and its part and module."""
    names = {}
    for part, state in parts.items():
        for key, weight in state.items():
            if not key.endswith(".weight") or weight.ndim < 2 or ".embeddings." in f".{key}":
                continue
            module = key.removesuffix(".weight")
            if part == UNET:
                plain = [module, module.replace(".to_", ".processor.to_").removesuffix(".0")]  # diffusers' oldest
                kohya = [module, _stability_name(module, layers_per_block + 1)]
            else:
                bare = module.removeprefix("text_model.")  # which transformers 5 dropped from some classes
                plain, kohya = [bare, f"text_model.{bare}"], [bare, f"text_model.{bare}"]
            names.update(dict.fromkeys((f"{part}.{name}" for name in plain), (part, module)))
            prefix = TEXT.get(part, "lora_unet")
            names.update(dict.fromkeys((f"{prefix}_{name.replace('.', '_')}" for name in kohya), (part, module)))
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
