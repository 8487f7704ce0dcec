"""A model in diffusers' layout as one file in Stability AI's: the way back of models/single_file.py, which is otherwise
found in checkpoints only."""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Rules = tuple[tuple[str, str], ...]  # regular expressions and what takes their place, one after another

OUTSIDE: Rules = (
    ("^time_embedding.linear_1", "time_embed.0"),
    ("^time_embedding.linear_2", "time_embed.2"),
    ("^add_embedding.linear_1", "label_emb.0.0"),
    ("^add_embedding.linear_2", "label_emb.0.2"),
    ("^conv_in", "input_blocks.0.0"),
    ("^conv_norm_out", "out.0"),
    ("^conv_out", "out.2"),
    ("^mid_block.resnets.0", "middle_block.0"),
    ("^mid_block.attentions.0", "middle_block.1"),
    ("^mid_block.resnets.1", "middle_block.2"),
)
RESIDUAL: Rules = (
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("time_emb_proj", "emb_layers.1"),
    ("conv_shortcut", "skip_connection"),
)
VAE: Rules = (
    ("conv_norm_out", "norm_out"),
    ("conv_shortcut", "nin_shortcut"),
    (r"mid_block.resnets.0", "mid.block_1"),
    (r"mid_block.resnets.1", "mid.block_2"),
    (r"mid_block.attentions.0", "mid.attn_1"),
    ("group_norm", "norm"),
    (r"to_([qkv])\.", r"\1."),
    ("to_out.0", "proj_out"),
    (r"(down|up)samplers.0", r"\1sample"),
    (r"(down|up)_blocks.(\d+).resnets", r"\1.\2.block"),
    (r"(down|up)_blocks", r"\1"),
)
OPEN_CLIP: Rules = (
    (r"^text_model\.", ""),
    (r"embeddings.position_embedding.weight", "positional_embedding"),
    ("^embeddings.", ""),
    ("final_layer_norm", "ln_final"),
    ("text_projection.weight", "text_projection"),
    (r"encoder.layers", "transformer.resblocks"),
    ("layer_norm", "ln_"),
    ("fc1", "c_fc"),
    ("fc2", "c_proj"),
    ("self_attn", "attn"),
)


def write(directory: Path, unet: Path, path: Path) -> None:
    """Put the parts in a directory, with the weights of a UNet, into one file at `path`."""
    config = json.loads((directory / "unet" / "config.json").read_text())
    parts = {
        "model.diffusion_model.": _unet(load_file(unet), config["layers_per_block"]),
        "first_stage_model.": _vae(_weights(directory / "vae")),
        "conditioner.embedders.0.transformer.": _clip(_weights(directory / "text_encoder")),
        "conditioner.embedders.1.model.": _open_clip(_weights(directory / "text_encoder_2")),
    }
    tensors = {prefix + key: tensor for prefix, state in parts.items() for key, tensor in state.items()}
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)


def _weights(folder: Path) -> dict[str, Tensor]:
    return load_file(next(folder.glob("*.safetensors")))


def _renamed(key: str, rules: Rules) -> str:
    for old, new in rules:
        key = re.sub(old, new, key)
    return key


def _unet(state: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    def name(key: str) -> str:
        key = _renamed(key, OUTSIDE)
        found = re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|\w+samplers)\.(\d+)\.(.*)", key)
        if found is not None:
            way, block, kind, layer, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
            stem, first = ("input_blocks", 1) if way == "down" else ("output_blocks", 0)
            if kind == "downsamplers":
                key = f"{stem}.{(block + 1) * (layers + 1)}.0.{rest.replace('conv', 'op')}"
            elif kind == "upsamplers":
                behind = 2 if any(each.startswith(f"up_blocks.{block}.attentions") for each in state) else 1
                key = f"{stem}.{block * (layers + 1) + layers}.{behind}.{rest}"
            else:
                key = f"{stem}.{first + block * (layers + 1) + layer}.{int(kind == 'attentions')}.{rest}"
        is_residual = re.match(r"(input|output)_blocks\.\d+\.0\.|middle_block\.[02]\.", key)
        return _renamed(key, RESIDUAL) if is_residual else key

    return {name(key): tensor for key, tensor in state.items()}


def _vae(state: dict[str, Tensor]) -> dict[str, Tensor]:
    most = max(int(key.split(".")[2]) for key in state if key.startswith("decoder.up_blocks."))
    found = {}
    for key, tensor in state.items():
        turned = re.sub(r"up_blocks\.(\d+)", lambda block: f"up_blocks.{most - int(block[1])}", key)
        is_matrix = "attentions" in key and tensor.ndim == 2
        found[_renamed(turned, VAE)] = tensor[:, :, None, None] if is_matrix else tensor
    return found


def _clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"text_model.{key.removeprefix('text_model.')}": tensor for key, tensor in state.items()}


def _open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for key, tensor in state.items():
        name = _renamed(key, OPEN_CLIP)
        if ".attn.q_proj." in name:
            stem, kind = name.split("q_proj.")
            three = [state[key.replace("q_proj", each)] for each in ("q_proj", "k_proj", "v_proj")]
            found[f"{stem}in_proj_{kind}"] = torch.cat(three)
        elif not re.search(r"\.[kv]_proj\.", name):
            found[name] = tensor.T if name == "text_projection" else tensor
    return found
