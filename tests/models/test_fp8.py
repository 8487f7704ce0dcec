"""fp8: which weights it is for, what a layer makes of its rows, what becomes of pictures, where it is not to be had."""

import pytest
import torch
from torch import nn

from bench.fidelity import psnr
from models.catalog import CATALOG, Weights
from models.device import Device, NoDevice, Tier
from models.gpu.device import Gpu
from models.gpu.fp8 import FP8, Fp8Linear, is_large, scaled
from models.gpu.prepare import use_graphs
from models.modules import UNet
from models.pipeline import Pipeline
from models.registry import Registry
from models.weights import WeightStore
from tests.models.gpu_way import GpuWay

STORE = WeightStore(CATALOG["embedded"])
PROMPTS = ["a red apple on a blue background", "a robot", "pizza, green background"]


def draw(pipeline: Pipeline, registry: Registry, name: str) -> torch.Tensor:
    unet, schedule = registry.use(Weights(name)), registry.schedule(name, STORE.family.variants[name].steps[0])
    return pipeline.draw(unet, schedule, PROMPTS, range(len(PROMPTS)), 128, 128)[0]


def test_the_large_matrices_are_those_of_attention_and_feed_forward():
    unet = UNet(STORE.config("unet")).unet
    large = {key for key, weight in unet.state_dict().items() if is_large(key, weight)}
    block = "mid_block.attentions.0.transformer_blocks.0"
    assert {f"{block}.attn1.to_k.weight", f"{block}.attn2.to_q.weight", f"{block}.ff.net.2.weight"} <= large
    assert not {f"{block}.attn2.to_k.weight", "mid_block.attentions.0.proj_in.weight", "conv_in.weight"} & large
    assert not any("embedding" in key or "norm" in key for key in large)


def test_a_layer_is_near_the_exact_one_for_rows_of_any_size_and_no_row_depends_on_another():
    exact = nn.Linear(64, 96).requires_grad_(False)
    layer = Fp8Linear(exact)
    layer.weight.data, layer.scale.data = scaled(exact.weight)
    x = torch.randn(2, 50, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 4, 50)[:, None]
    x[1, 7] = 0
    for ours, theirs in zip(layer(x).flatten(0, 1), exact(x).flatten(0, 1), strict=True):
        assert (ours - theirs).norm() < 0.06 * theirs.norm()  # of e4m3's 3 bits: 1/32 and less, in each factor
    assert torch.equal(layer(x)[1:, 3:4], layer(x[1:, 3:4]))


def test_variants_in_fp8_draw_nearly_the_same_pictures_and_are_switched_like_others():
    pipeline = Pipeline(STORE, Device(), torch.float32)
    plain = Registry(STORE, Device(), torch.float32, [Tier("cpu", 1 << 40)])
    unet = GpuWay().make_unet(STORE.config("unet"), torch.float32, in_fp8=True)
    ours = Registry(STORE, GpuWay(), torch.float32, [Tier("cpu", 1 << 40)], unet)
    use_graphs(pipeline, ours.unet)
    for name in ("4step-unet", "1step-unet", "2step-lora", "4step-unet"):
        for registry in (plain, ours):
            registry.load(Weights(name))  # after others were in use
        for mine, theirs in zip(draw(pipeline, ours, name), draw(pipeline, plain, name), strict=True):
            assert 30 < psnr(mine.numpy(), theirs.numpy()) < 60  # the gate of bench-gpu; above 60 it would not be fp8
    large = {key: weight for key, weight in ours.weight_set(Weights("4step-unet")).items() if weight.dtype is FP8}
    assert len(large) == sum(isinstance(module, Fp8Linear) for module in ours.unet.modules()) > 20


def test_without_a_gpu_that_multiplies_fp8_the_setting_is_refused_in_words(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    for kind in (Device(), Gpu.__new__(Gpu)):  # without its streams
        with pytest.raises(NoDevice, match="needs a GPU that multiplies fp8"):
            kind.make_unet(STORE.config("unet"), torch.float16, in_fp8=True)
