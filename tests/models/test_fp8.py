"""fp8: which weights it is for, and what is said where it is not to be had."""

import pytest
import torch

from models.catalog import CATALOG
from models.fp8 import NoFp8, is_large, quantizer
from models.registry import UNet
from models.weights import WeightStore


def test_the_large_matrices_are_those_of_attention_and_feed_forward():
    unet = UNet(WeightStore(CATALOG["embedded"]).config("unet")).unet
    large = {key for key, weight in unet.state_dict().items() if is_large(key, weight)}
    block = "mid_block.attentions.0.transformer_blocks.0"
    assert {f"{block}.attn1.to_k.weight", f"{block}.attn2.to_q.weight", f"{block}.ff.net.2.weight"} <= large
    assert not {f"{block}.attn2.to_k.weight", "mid_block.attentions.0.proj_in.weight", "conv_in.weight"} & large
    assert not any("embedding" in key or "norm" in key for key in large)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_the_setting_is_refused_in_words():
    with pytest.raises(NoFp8, match="needs a GPU that multiplies fp8"):
        quantizer()
