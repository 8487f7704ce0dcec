"""The layers of SDXL's networks as OpenVINO operators, written so that a CPU never changes the layout of a tensor.

The graphs are built from the configuration and the weights' names: to convert the modules instead, by tracing them,
takes 3.5 s for a UNet at every start, and leaves constants without names. In bfloat16 every product is bfloat16, and
what decides about precision (sums over groups, their inverse root) is float32 by explicit conversions.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import openvino as ov
import torch
from openvino import opset15 as op
from torch import Tensor

Node = Any  # openvino's Python bindings are not typed
TYPES = {torch.float32: ov.Type.f32, torch.bfloat16: ov.Type.bf16, torch.int64: ov.Type.i64, torch.uint8: ov.Type.u8}

# What a nearest x2 and a 3 x 3 convolution make of each input pixel: taps that fall on the same pixel are added up.
FOLD = torch.tensor([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]], dtype=torch.float32)


def as_ov(tensor: Tensor) -> Any:
    """An OpenVINO tensor over the memory of a contiguous torch tensor."""
    if tensor.dtype is torch.bfloat16:
        return ov.Tensor(tensor.view(torch.int16).numpy().view(np.uint16), ov.Shape(list(tensor.shape)), ov.Type.bf16)
    return ov.Tensor(tensor.numpy(), shared_memory=True)


class Layers:
    """Layers over one weight set, for one batch size. Images are (B, C, H, W), sequences (B, L, C).

    weights: by the names of the modules' state. Raises KeyError, with the name, for one that is missing.
    """

    def __init__(self, weights: Mapping[str, Tensor], dtype: torch.dtype, batch: int) -> None:
        self.weights, self.dtype, self.batch = weights, dtype, batch

    def input(self, *shape: int, dtype: torch.dtype | None = None) -> Node:
        """A parameter of the graph, (batch, *shape)."""
        return op.parameter([self.batch, *shape], TYPES[dtype or self.dtype])

    def weight(self, name: str, *shape: int) -> Node:
        """A constant, in another shape if that is given."""
        tensor = self.weights[name].to(self.dtype)
        return self.constant(tensor.reshape(shape) if shape else tensor)

    def constant(self, tensor: Tensor) -> Node:
        """A constant in the tensor's own dtype, with a copy of its numbers: OpenVINO keeps no tensor of torch's."""
        owned = ov.Tensor(TYPES[tensor.dtype], ov.Shape(list(tensor.shape)))
        as_ov(tensor.contiguous()).copy_to(owned)
        return op.constant(owned)

    def number(self, value: float) -> Node:
        """A constant in the graph's dtype."""
        return self.constant(torch.tensor(value, dtype=self.dtype))

    def wide(self, x: Node) -> Node:
        """x in float32."""
        return op.convert(x, "f32") if self.dtype is torch.bfloat16 else x

    def narrow(self, x: Node) -> Node:
        """x in the graph's dtype."""
        return op.convert(x, "bf16") if self.dtype is torch.bfloat16 else x

    def linear(self, x: Node, name: str) -> Node:
        """With the bias, if it has one."""
        out = op.matmul(x, self.weight(f"{name}.weight"), False, True)
        return op.add(out, self.weight(f"{name}.bias")) if f"{name}.bias" in self.weights else out

    def conv(self, x: Node, name: str, stride: int = 1, before: int | None = None) -> Node:
        """A 1 x 1 or 3 x 3 convolution that keeps the size, or halves it. before: rows and columns of padding above and
        to the left, where there are not as many as below and to the right."""
        weight = self.weight(f"{name}.weight")
        pad = [_shape(weight)[-1] // 2] * 2
        out = op.convolution(x, weight, [stride, stride], pad if before is None else [before] * 2, pad, [1, 1])
        return op.add(out, self.weight(f"{name}.bias", 1, -1, 1, 1))

    def upsample(self, x: Node, name: str) -> Node:
        """conv3x3(nearest x2(x)) as one 4 x 4 transposed convolution of stride 2: 16 products per pixel, not 36."""
        weight = torch.einsum("oiyx,ay,bx->ioab", self.weights[f"{name}.weight"].float(), FOLD, FOLD)
        out = op.convolution_backprop_data(
            x, self.constant(weight.to(self.dtype)), strides=[2, 2], pads_begin=[1, 1], pads_end=[1, 1]
        )
        return op.add(out, self.weight(f"{name}.bias", 1, -1, 1, 1))

    def group_norm(self, x: Node, name: str, groups: int, eps: float) -> Node:
        """By sums per channel, then per group: one scale and one shift per channel, so that x keeps its layout."""
        _, channels, height, width = _shape(x)
        split, whole = [self.batch, groups, channels // groups, 1], [self.batch, channels, 1, 1]
        wide, pixels, inside = self.wide(x), np.array([2, 3]), np.array([2])
        mean = op.reduce_mean(_reshape(op.reduce_mean(wide, pixels, True), split), inside, True)
        norm = op.reduce_l2(_reshape(op.reduce_l2(wide, pixels, True), split), inside, True)
        square = op.multiply(op.multiply(norm, norm), _float(groups / (channels * height * width)))
        variance = op.maximum(op.subtract(square, op.multiply(mean, mean)), _float(0.0))
        inverse = op.power(op.add(variance, _float(eps)), _float(-0.5))
        scale = op.multiply(inverse, self.wide(self.weight(f"{name}.weight", 1, *split[1:])))
        shift = op.subtract(self.wide(self.weight(f"{name}.bias", 1, *split[1:])), op.multiply(mean, scale))
        scaled = op.multiply(x, self.narrow(_reshape(scale, whole)))
        return op.add(scaled, self.narrow(_reshape(shift, whole)))

    def layer_norm(self, x: Node, name: str, eps: float = 1e-5) -> Node:
        """Over the last axis. eps: torch's default, which diffusers and CLIP use."""
        normed = op.mvn(x, np.array([-1]), True, eps, "inside_sqrt")
        return op.add(op.multiply(normed, self.weight(f"{name}.weight")), self.weight(f"{name}.bias"))

    def silu(self, x: Node) -> Node:
        """x sigmoid(x)."""
        return op.swish(x, self.number(1.0))

    def attention(self, queries: Node, keys: Node, values: Node, heads: int, causal: bool = False) -> Node:
        """Scaled dot products, (B, L, C). causal: no token sees a later one."""
        _, length, channels = _shape(queries)
        query, key, value = (self._heads(x, heads) for x in (queries, keys, values))
        if causal:
            later = torch.full((length, length), torch.finfo(torch.float32).min).triu(1).to(self.dtype)
            scores = op.multiply(op.matmul(query, key, False, True), self.number((channels // heads) ** -0.5))
            out = op.matmul(op.softmax(op.add(scores, self.constant(later)), -1), value, False, False)
        else:
            out = op.scaled_dot_product_attention(query, key, value, causal=False)
        return _reshape(op.transpose(out, np.array([0, 2, 1, 3])), [self.batch, length, channels])

    def attend(self, x: Node, context: Node, name: str, heads: int) -> Node:
        """diffusers' Attention: projections in, and out."""
        query, key, value = (
            self.linear(of, f"{name}.{part}") for of, part in ((x, "to_q"), (context, "to_k"), (context, "to_v"))
        )
        return self.linear(self.attention(query, key, value, heads), f"{name}.to_out.0")

    def resnet(self, x: Node, name: str, groups: int, eps: float, embedding: Node | None = None) -> Node:
        """diffusers' ResnetBlock2D."""
        hidden = self.conv(self.silu(self.group_norm(x, f"{name}.norm1", groups, eps)), f"{name}.conv1")
        if embedding is not None:
            shift = self.linear(embedding, f"{name}.time_emb_proj")
            hidden = op.add(hidden, _reshape(shift, [self.batch, -1, 1, 1]))
        hidden = self.conv(self.silu(self.group_norm(hidden, f"{name}.norm2", groups, eps)), f"{name}.conv2")
        is_wider = f"{name}.conv_shortcut.weight" in self.weights
        return op.add(self.conv(x, f"{name}.conv_shortcut") if is_wider else x, hidden)

    def tokens(self, x: Node) -> Node:
        """An image as a sequence of its pixels."""
        _, channels, height, width = _shape(x)
        return _reshape(op.transpose(x, np.array([0, 2, 3, 1])), [self.batch, height * width, channels])

    def image(self, x: Node, like: Node) -> Node:
        """A sequence of pixels as an image of the size of `like`."""
        _, channels, height, width = _shape(like)
        return op.transpose(_reshape(x, [self.batch, height, width, channels]), np.array([0, 3, 1, 2]))

    def _heads(self, x: Node, heads: int) -> Node:
        _, length, channels = _shape(x)
        split = _reshape(x, [self.batch, length, heads, channels // heads])
        return op.transpose(split, np.array([0, 2, 1, 3]))


def _shape(x: Node) -> list[int]:
    return [int(side) for side in x.get_output_shape(0)]


def _reshape(x: Node, shape: list[int]) -> Node:
    return op.reshape(x, np.array(shape), False)


def _float(value: float) -> Node:
    return op.constant(np.float32(value))
