"""Modules written so that the CPU compiler vectorises them; the same functions as diffusers' and torch's own.

As they are, Inductor compiles group norm to one element at a time (4 ns each, half of a decode). On a GPU they are an
experiment of bench/gpu: a group's 4 channels of 128 lie 256 bytes apart from pixel to pixel, so that sums by group read
whole sectors for a quarter of them, and sums by channel do not.
"""

import torch
import torch.nn.functional as F
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn


def vectorise(module: nn.Module) -> None:
    """Replace what compiles badly, in place, throughout a module. Its parameters keep their names."""
    for name, child in module.named_children():
        if isinstance(child, nn.GroupNorm):
            setattr(module, name, GroupNorm(child))
        else:
            vectorise(child)


def fold_upsamplers(module: nn.Module) -> None:
    """Replace each nearest x2 and 3 x 3 convolution by one transposed convolution, in place; for fixed weights only."""
    for name, child in module.named_children():
        if isinstance(child, Upsample2D) and child.conv is not None and child.interpolate:
            setattr(module, name, FoldedUpsample(child.conv))
        else:
            fold_upsamplers(child)


class GroupNorm(nn.Module):
    """Group norm of (B, C, ...), read as rows of channels that lie side by side: sums by channel, then by group."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.groups, self.eps, self.weight, self.bias = norm.num_groups, norm.eps, norm.weight, norm.bias

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W) or (B, C, N)."""
        rows = x.flatten(2).transpose(1, 2).float()
        mean, square = self._over_groups(rows.mean(1)), self._over_groups((rows * rows).mean(1))
        scale = (square - mean * mean).clamp_min(0).add(self.eps).rsqrt() * self.weight.float()
        normed = (rows - mean) * scale + self.bias.float()
        out: Tensor = normed.to(x.dtype).transpose(1, 2).unflatten(2, x.shape[2:])
        return out

    def _over_groups(self, means: Tensor) -> Tensor:
        """(B, C) to each channel's mean over its group, (B, 1, C). A product of matrices, because the compiler would
        work anything else out again for every pixel."""
        size = means.shape[1] // self.groups
        parts = F.linear(means.unflatten(1, (self.groups, size)), means.new_full((size, size), 1 / size))
        return parts.flatten(1).unsqueeze(1)


class FoldedUpsample(nn.Module):
    """conv3x3(nearest x2(x)) as one 4 x 4 transposed convolution of stride 2: 16 products a pixel instead of 36.

    Each output pixel's three taps fall on two input pixels; taps that fall on the same one are added up here.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        taps = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 1, 1], [0, 0, 1]], dtype=torch.float32).flip(0)
        weight = torch.einsum("oiyx,ay,bx->ioab", conv.weight.float(), taps, taps).to(conv.weight.dtype)
        self.weight = nn.Parameter(weight.contiguous(memory_format=torch.channels_last), requires_grad=False)
        self.bias = conv.bias

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """x: (B, C, H, W). Returns (B, C', 2H, 2W)."""
        return F.conv_transpose2d(x, self.weight, self.bias, stride=2, padding=1)
