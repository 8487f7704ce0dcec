"""SDXL's UNet, text encoders and VAE as OpenVINO graphs of one batch size, from their configurations."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import openvino as ov
import torch
from openvino import opset15 as op
from torch import Tensor

from models.cpu.layers import Layers, Node
from models.modules import FLAT

Config = Mapping[str, Any]
VAE_EPS = TRANSFORMER_EPS = 1e-6  # diffusers' constants, in no configuration

# What these graphs can be; a configuration that says otherwise runs as modules.
UNET = {
    "act_fn": "silu",
    "addition_embed_type": "text_time",
    "use_linear_projection": True,
    "upcast_attention": False,
    "class_embed_type": None,
    "encoder_hid_dim": None,
    "resnet_time_scale_shift": "default",
    "downsample_padding": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "num_attention_heads": None,
    "time_embedding_type": "positional",
}
VAE = {"act_fn": "silu", "mid_block_add_attention": True, "use_quant_conv": True, "use_post_quant_conv": True}
LARGEST = 3.4e38  # a norm above this is no float32
ACTIVATIONS = ("gelu", "quick_gelu")


def can_be_built(unet: Config, vae: Config, text: Sequence[Config]) -> bool:
    """Whether these configurations describe what the graphs here compute."""
    blocks = {"DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"}
    return (
        all(unet.get(key) == value for key, value in UNET.items())
        and {*unet["down_block_types"], *unet["up_block_types"]} <= blocks
        and all(vae.get(key, value) == value for key, value in VAE.items())
        and not vae.get("latents_mean")
        and all(each.get("hidden_act", "quick_gelu") in ACTIVATIONS for each in text)
    )


def unet(
    weights: Mapping[str, Tensor | torch.Size], config: Config, dtype: torch.dtype, side: int, length: int, batch: int
) -> Node:
    """Inputs: latents (B, 4, side, side), time features (B, C0), prompt_embeds (B, length, C), pooled and time_ids'
    features (B, P), then the weights of which only the shape is given. Output: (B, 4, side, side)."""
    layers = Layers(weights, dtype, batch)
    groups, eps, channels = config["norm_num_groups"], config["norm_eps"], config["block_out_channels"]
    heads = _per_block(config["attention_head_dim"], channels)  # what diffusers calls so is how many there are
    depths = _per_block(config["transformer_layers_per_block"], channels)
    latents, time = layers.input(config["in_channels"], side, side), layers.input(channels[0])
    text = layers.input(length, config["cross_attention_dim"])
    added = layers.input(config["projection_class_embeddings_input_dim"])

    def embed(x: Node, name: str) -> Node:
        return layers.linear(layers.silu(layers.linear(x, f"{name}.linear_1")), f"{name}.linear_2")

    embedding = layers.silu(op.add(embed(time, "time_embedding"), embed(added, "add_embedding")))

    def block(x: Node, name: str, index: int, level: int, attends: bool) -> Node:
        x = layers.resnet(x, f"{name}.resnets.{index}", groups, eps, embedding)
        transformer = f"{name}.attentions.{index}"
        return _transformer(layers, x, text, transformer, groups, heads[level], depths[level]) if attends else x

    x = layers.conv(latents, "conv_in")
    skips, last = [x], len(channels) - 1
    for level, kind in enumerate(config["down_block_types"]):
        for index in range(config["layers_per_block"]):
            x = block(x, f"down_blocks.{level}", index, level, kind.startswith("Cross"))
            skips.append(x)
        if level < last:
            x = layers.conv(x, f"down_blocks.{level}.downsamplers.0.conv", stride=2)
            skips.append(x)
    x = block(x, "mid_block", 0, last, attends=True)
    x = layers.resnet(x, "mid_block.resnets.1", groups, eps, embedding)
    for level, kind in enumerate(config["up_block_types"]):
        for index in range(config["layers_per_block"] + 1):
            joined = op.concat([x, skips.pop()], 1)
            x = block(joined, f"up_blocks.{level}", index, last - level, kind.startswith("Cross"))
        if level < last:
            x = layers.upsample(x, f"up_blocks.{level}.upsamplers.0.conv")
    out = layers.conv(layers.silu(layers.group_norm(x, "conv_norm_out", groups, eps)), "conv_out")
    return ov.Model([out], [latents, time, text, added, *layers.inputs.values()], "unet")


def decoder(weights: Mapping[str, Tensor], config: Config, dtype: torch.dtype, side: int, batch: int) -> Node:
    """Input: latents (B, 4, side, side) float32. Outputs as models.modules.Decoder's: pictures, and (B,) float32, not
    0 where the picture is valid."""
    layers = Layers(weights, dtype, batch)
    groups = config["norm_num_groups"]
    latents = layers.input(config["latent_channels"], side, side, dtype=torch.float32)
    scaled = op.divide(latents, op.constant(np.float32(config["scaling_factor"])))
    x = layers.conv(layers.conv(layers.narrow(scaled), "post_quant_conv"), "decoder.conv_in")
    x = _middle(layers, x, "decoder.mid_block", groups)
    for level in range(len(config["block_out_channels"])):
        for index in range(config["layers_per_block"] + 1):
            x = layers.resnet(x, f"decoder.up_blocks.{level}.resnets.{index}", groups, VAE_EPS)
        upsampler = f"decoder.up_blocks.{level}.upsamplers.0.conv"
        if f"{upsampler}.weight" in weights:
            x = layers.upsample(x, upsampler)
    x = layers.silu(layers.group_norm(x, "decoder.conv_norm_out", groups, VAE_EPS))
    raw = layers.wide(layers.conv(x, "decoder.conv_out"))
    pixels = op.clamp(op.add(op.multiply(raw, _float(0.5)), _float(0.5)), 0.0, 1.0)
    bytes_ = op.convert(op.round(op.multiply(pixels, _float(255.0)), "half_to_even"), "u8")
    pictures = op.transpose(bytes_, np.array([0, 2, 3, 1]))
    return ov.Model([pictures, _valid(raw, pixels)], [latents], "decoder")


def encoder(weights: Mapping[str, Tensor], config: Config, dtype: torch.dtype, side: int, batch: int) -> Node:
    """Input: pictures (B, side, side, 3) uint8. Outputs as models.modules.Encoder's: mean and standard deviation."""
    layers = Layers(weights, dtype, batch)
    groups = config["norm_num_groups"]
    pictures = layers.input(side, side, 3, dtype=torch.uint8)
    parts = op.divide(op.convert(op.transpose(pictures, np.array([0, 3, 1, 2])), "f32"), _float(255.0))
    raw = op.subtract(op.multiply(parts, _float(2.0)), _float(1.0))
    x = layers.conv(layers.narrow(raw), "encoder.conv_in")
    for level in range(len(config["block_out_channels"])):
        name = f"encoder.down_blocks.{level}"
        for index in range(config["layers_per_block"]):
            x = layers.resnet(x, f"{name}.resnets.{index}", groups, VAE_EPS)
        if f"{name}.downsamplers.0.conv.weight" in weights:
            x = layers.conv(x, f"{name}.downsamplers.0.conv", stride=2, before=0)
    x = _middle(layers, x, "encoder.mid_block", groups)
    x = layers.silu(layers.group_norm(x, "encoder.conv_norm_out", groups, VAE_EPS))
    x = layers.wide(layers.conv(layers.conv(x, "encoder.conv_out"), "quant_conv"))
    mean, log_variance = op.split(x, _int(1), 2).outputs()
    std = op.exp(op.divide(op.clamp(log_variance, -30.0, 20.0), _float(2.0)))  # diffusers' bounds
    factor = _float(config["scaling_factor"])
    return ov.Model([op.multiply(mean, factor), op.multiply(std, factor)], [pictures], "encoder")


def text_encoder(weights: Mapping[str, Tensor], config: Config, dtype: torch.dtype, batch: int, pooled: bool) -> Node:
    """Input: ids (B, L) int64; with `pooled` also where the end of the text is, (B, 1) int64. Outputs: the last but one
    layer's states (B, L, C), and with `pooled` the projected embedding (B, P)."""
    weights = {key.removeprefix("text_model."): tensor for key, tensor in weights.items()}
    layers = Layers(weights, dtype, batch)
    length, heads = config["max_position_embeddings"], config["num_attention_heads"]
    eps = config.get("layer_norm_eps", 1e-5)
    ids = layers.input(length, dtype=torch.int64)
    embedded = op.gather(layers.weight("embeddings.token_embedding.weight"), ids, _int(0))
    x = op.add(embedded, layers.weight("embeddings.position_embedding.weight"))
    states = [x]
    for index in range(config["num_hidden_layers"]):
        name = f"encoder.layers.{index}"
        normed = layers.layer_norm(x, f"{name}.layer_norm1", eps)
        query, key, value = (layers.linear(normed, f"{name}.self_attn.{part}_proj") for part in "qkv")
        attended = layers.attention(query, key, value, heads, causal=True)
        x = op.add(x, layers.linear(attended, f"{name}.self_attn.out_proj"))
        hidden = layers.linear(layers.layer_norm(x, f"{name}.layer_norm2", eps), f"{name}.mlp.fc1")
        x = op.add(x, layers.linear(_activated(layers, hidden, config), f"{name}.mlp.fc2"))
        states.append(x)
    if not pooled:
        return ov.Model([states[-2]], [ids], "text_encoder")
    end = layers.input(1, dtype=torch.int64)
    last = op.gather(layers.layer_norm(x, "final_layer_norm", eps), end, _int(1), batch_dims=1)
    projected = op.reshape(layers.linear(last, "text_projection"), np.array([batch, -1]), False)
    return ov.Model([states[-2], projected], [ids, end], "text_encoder_2")


def _middle(layers: Layers, x: Node, name: str, groups: int) -> Node:
    """The VAE's middle block: attention of one head between two residual blocks."""
    attention = f"{name}.attentions.0"
    x = layers.resnet(x, f"{name}.resnets.0", groups, VAE_EPS)
    normed = layers.tokens(layers.group_norm(x, f"{attention}.group_norm", groups, VAE_EPS))
    x = op.add(x, layers.image(layers.attend(normed, normed, attention, heads=1), x))
    return layers.resnet(x, f"{name}.resnets.1", groups, VAE_EPS)


def _transformer(layers: Layers, x: Node, text: Node, name: str, groups: int, heads: int, depth: int) -> Node:
    """diffusers' Transformer2DModel with linear projections."""
    hidden = layers.linear(
        layers.tokens(layers.group_norm(x, f"{name}.norm", groups, TRANSFORMER_EPS)), f"{name}.proj_in"
    )
    for index in range(depth):
        block = f"{name}.transformer_blocks.{index}"
        normed = layers.layer_norm(hidden, f"{block}.norm1")
        hidden = op.add(layers.attend(normed, normed, f"{block}.attn1", heads), hidden)
        normed = layers.layer_norm(hidden, f"{block}.norm2")
        hidden = op.add(layers.attend(normed, text, f"{block}.attn2", heads), hidden)
        wide = layers.linear(layers.layer_norm(hidden, f"{block}.norm3"), f"{block}.ff.net.0.proj")
        half = op.split(wide, op.constant(np.int64(2)), 2)
        gated = op.multiply(half.output(0), op.gelu(half.output(1), "erf"))
        hidden = op.add(layers.linear(gated, f"{block}.ff.net.2"), hidden)
    return op.add(layers.image(layers.linear(hidden, f"{name}.proj_out"), x), x)


def _activated(layers: Layers, x: Node, config: Config) -> Node:
    if config.get("hidden_act", "quick_gelu") == "gelu":
        return op.gelu(x, "erf")
    return op.swish(x, layers.number(1.702))  # quick_gelu: x sigmoid(1.702 x)


def _valid(raw: Node, pixels: Node) -> Node:
    """(B,) float32: 1 where a picture is neither flat in every channel nor anywhere NaN or Inf."""
    sides = np.array([2, 3])
    count = int(np.prod([int(side) for side in pixels.get_output_shape(0)][2:]))
    deviation = op.subtract(
        pixels, op.reduce_mean(pixels, sides, True)
    )  # before it is squared: a sum would be too coarse
    norm = op.reduce_max(op.reduce_l2(deviation, sides, False), np.array([1]), False)
    is_varied = op.greater_equal(norm, _float(FLAT * (count - 1) ** 0.5))
    largest = _float(float(np.finfo(np.float32).max))
    is_finite = op.less(op.reduce_l2(raw, np.array([1, 2, 3]), False), largest)  # NaN is less than nothing
    return op.convert(op.logical_and(is_varied, is_finite), "f32")


def _per_block(value: int | list[int], channels: list[int]) -> list[int]:
    return [value] * len(channels) if isinstance(value, int) else list(value)


def _float(value: float) -> Node:
    return op.constant(np.float32(value))


def _int(value: int) -> Node:
    return op.constant(np.int64(value))
