"""Experiments: the VAE's decoder written otherwise, at one size. None of them is in the pipeline on a GPU."""

import copy
from collections.abc import Callable
from typing import Any, cast

import torch
from diffusers.models.attention_processor import AttnProcessor

from bench.gpu.ours import Ours
from bench.gpu.timing import milliseconds
from models.gpu.graphs import Graphed, by_calling, on_gpu
from models.gpu.prepare import DECODED
from models.gpu.vectorised import fold_upsamplers, vectorise


def folded_ms(ours: Ours, pixels: int, batches: tuple[int, ...]) -> dict[int, float]:
    """By batch, not compiled, each upsampler as one transposed convolution: 1.55 of 10.47 TFLOP less at 1024 px."""
    graphed = _recorded(ours, _rewritten(ours, fold_upsamplers))
    return {batch: _decode_ms(ours, graphed, pixels, batch) for batch in batches if batch in DECODED}


def plain_attention_ms(ours: Ours, pixels: int) -> float:
    """Of one row, not compiled, its one attention (a head of 512 channels, too wide for flash) as two products."""
    return _decode_ms(ours, _recorded(ours, _rewritten(ours, _attend_plainly)), pixels, 1)


def vectorised_ms(ours: Ours, pixels: int, compiled: Callable[..., Any]) -> float:
    """Of one row, compiled: folded, and with group norms that sum by channel (models.gpu.vectorised)."""
    return _decode_ms(ours, _recorded(ours, compiled(_rewritten(ours, vectorise, fold_upsamplers))), pixels, 1)


def _attend_plainly(decoder: Any) -> None:
    decoder.vae.decoder.mid_block.attentions[0].set_processor(AttnProcessor())


def _rewritten(ours: Ours, *changes: Callable[[Any], None]) -> torch.nn.Module:
    decoder: Any = copy.deepcopy(ours.pipeline.vae).cpu()  # torch's stubs know no memory_format
    for change in changes:
        change(decoder)
    return cast(torch.nn.Module, decoder.to(ours.rig.device, memory_format=torch.channels_last))


def _recorded(ours: Ours, function: Callable[..., Any]) -> Graphed:
    return Graphed(function, on_gpu(0) if ours.on_gpu else by_calling, DECODED)


def _decode_ms(ours: Ours, graphed: Graphed, pixels: int, batch: int) -> float:
    latents = torch.randn(batch, 4, pixels // 8, pixels // 8, device=ours.rig.device)
    return milliseconds(lambda: graphed(latents), ours.synchronize)
