"""The UNet's large linear layers in fp8: only where FP8=1 asks for it, and only to be asked for where `make bench-gpu
PART=check` finds the pictures close enough.

By torch's own scaled product, which torchao calls too: torchao 0.18 scales by row for bfloat16 weights alone, and on a
GPU alone, so it could be neither used with ours nor tested here (docs/performance.md).
"""

import torch
from torch import Tensor, nn

FP8 = torch.float8_e4m3fn
LARGEST = 448.0  # that it holds
ALIGNED = 16  # what both sides of a matrix must be multiples of, for the tensor cores


class Fp8Linear(nn.Module):
    """A linear layer whose weights have a scale a column of its output. What comes in is scaled by row at each call, so
    that no row of a batch depends on another. The values of the weights are left undefined."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty_like(linear.weight, dtype=FP8), requires_grad=False)
        self.scale = nn.Parameter(linear.weight.new_empty(linear.out_features, 1, dtype=torch.float32), False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in). Returns (..., out) in x's dtype; the product comes out in bfloat16, which all kernels write."""
        rows, scale = scaled(x.flatten(0, -2))
        # Not F.scaled_mm: torch 2.11's compiler knows no way but this one to compute it, and may fuse what is around.
        product = torch._scaled_mm(rows, self.weight.t(), scale, self.scale.t(), out_dtype=torch.bfloat16)
        out: Tensor = product.to(x.dtype).unflatten(0, x.shape[:-1])
        return out if self.bias is None else out + self.bias


def scaled(rows: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix in fp8, and the scale of each of its rows, (rows, 1) float32, such that their product is the matrix."""
    scale = (rows.abs().amax(dim=1, keepdim=True).float() / LARGEST).clamp_min(torch.finfo(torch.float32).tiny)
    return (rows.float() / scale).to(FP8), scale


def is_large(key: str, weight: Tensor) -> bool:
    """Whether a weight of SDXL's UNet is worth it: of an attention or a feed-forward. Not the keys and values of the
    prompt, made once a request, nor embeddings and projections in and out, which are small and which quality needs."""
    is_text = ".attn2.to_k." in key or ".attn2.to_v." in key
    is_matrix = weight.ndim == 2 and key.endswith(".weight") and not any(side % ALIGNED for side in weight.shape)
    return is_matrix and (".attn" in key or ".ff.net." in key) and not is_text


def quantize(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A weight set of the UNet with its large matrices in fp8, each with its scale beside it."""
    found = dict(weights)
    for key, weight in weights.items():
        if is_large(key, weight):
            found[key], found[key.removesuffix("weight") + "scale"] = scaled(weight)
    return found


def replace_large(unet: nn.Module) -> None:
    """Give a UNet layers for the weights that quantize() makes; their values are left undefined."""
    for name, module in list(unet.named_modules()):
        if isinstance(module, nn.Linear) and is_large(f"{name}.weight", module.weight):
            unet.set_submodule(name, Fp8Linear(module))
