"""Modules rewritten for the compiler compute what the originals compute."""

import pytest
import torch
from diffusers.models.upsampling import Upsample2D
from torch import nn

from models.gpu.vectorised import fold_upsamplers, vectorise


@pytest.mark.parametrize("shape", [(2, 12, 5, 7), (3, 12, 9)])
def test_group_norm_equals_torchs(shape):
    norm = nn.GroupNorm(4, 12)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = 3 * torch.randn(shape) + 1
    wanted = norm(x)
    holder = nn.Sequential(norm)
    vectorise(holder)
    assert not isinstance(holder[0], nn.GroupNorm)
    torch.testing.assert_close(holder(x), wanted, rtol=1e-5, atol=1e-5)
    assert holder.state_dict().keys() == {"0.weight", "0.bias"}


def test_a_folded_upsampler_equals_diffusers():
    upsample = Upsample2D(6, use_conv=True, out_channels=5)
    x = torch.randn(2, 6, 7, 9)
    wanted = upsample(x)
    holder = nn.Sequential(upsample)
    fold_upsamplers(holder)
    assert not isinstance(holder[0], Upsample2D)
    torch.testing.assert_close(holder(x), wanted, rtol=1e-5, atol=1e-5)
