"""The UNet's large linear layers in fp8, by torchao: only where FP8=1 asks for it, and only to be asked for where `make
bench-gpu PART=check` finds the pictures close enough. Written against torchao 0.18, which needs a GPU: not yet run."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class NoFp8(Exception):
    """fp8 was asked for and is not to be had; the text says why."""


def is_large(key: str, weight: Tensor) -> bool:
    """Whether a weight of SDXL's UNet is worth it: of an attention or a feed-forward. Not the keys and values of the
    prompt, made once a request, nor embeddings and projections in and out, which are small and which quality needs."""
    is_text = ".attn2.to_k." in key or ".attn2.to_v." in key
    return weight.ndim == 2 and key.endswith(".weight") and (".attn" in key or ".ff.net." in key) and not is_text


def quantizer() -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """A function that makes fp8 tensors of a weight set's large matrices, scaled by row; activations are scaled by row
    at each call, so that no row of a batch depends on another. Raises NoFp8."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9):
        raise NoFp8("FP8=1 needs a GPU that multiplies fp8 (compute capability 8.9 or higher)")
    try:
        from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_
    except ImportError as error:
        raise NoFp8("FP8=1 needs torchao, which is not installed: pip install torchao") from error
    config = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())

    def quantized(weight: Tensor) -> Tensor:
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(weight.to("cuda"), requires_grad=False)
        shell = nn.Sequential(linear)  # torchao replaces the weights of what a module holds
        try:
            quantize_(shell, config)
        except (AssertionError, NotImplementedError) as error:  # of some versions: float16, which the weights are
            raise NoFp8(f"FP8=1: this torchao does not take {weight.dtype} weights: {error}") from error
        return linear.weight.data

    return lambda weights: {k: quantized(w) if is_large(k, w) else w for k, w in weights.items()}


def place(unet: nn.Module, weights: dict[str, Tensor]) -> None:
    """Give the module's large layers weights of the fp8 kind, to copy others into."""
    for key, weight in weights.items():
        if is_large(key, weight):
            owner = unet.get_submodule(key.removesuffix(".weight"))
            owner.weight = nn.Parameter(weight.clone(), requires_grad=False)
