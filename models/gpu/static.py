"""A UNet with weights of its own: CUDA graphs need the addresses to stay, so a weight set is copied into them."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.gpu import fp8
from models.gpu.attention import share_text_weights
from models.modules import UNet, WeightSet


class StaticUNet(UNet):
    """in_fp8: each set's large matrices are quantized as it is loaded."""

    def __init__(self, config: dict[str, Any], place: str, dtype: torch.dtype, in_fp8: bool = False) -> None:
        super().__init__(config)
        self.place, self.dtype, self.in_fp8 = place, dtype, in_fp8
        self.text_weights: Tensor | None
        self.register_buffer("text_weights", None, persistent=False)  # share_text_weights'

    def project(self, embeds: Tensor) -> Tensor:
        """Embeddings of prompts (..., L, C) as all cross-attentions' keys and values (..., L, columns); what is
        projected already comes back as it is."""
        if self.text_weights is None or embeds.shape[-1] == len(self.text_weights):
            return embeds
        return F.linear(embeds, self.text_weights)

    def packed(self, weight_set: WeightSet) -> WeightSet:
        """In fp8 where that is asked for."""
        return fp8.quantize(weight_set) if self.in_fp8 else weight_set

    def take(self, weight_set: WeightSet) -> None:
        """Copy the set; the host does not wait."""
        if self.unet.conv_in.weight.is_meta:
            self._allocate()
        own = self.unet.state_dict()
        with torch.inference_mode():
            # In few launches: one by one, 1,680 of them would take longer than the copy.
            for dtype in {tensor.dtype for tensor in own.values()}:
                keys = [key for key, tensor in own.items() if tensor.dtype is dtype]
                mine, theirs = ([_copied(each[key]) for key in keys] for each in (own, weight_set))
                torch._foreach_copy_(mine, theirs, non_blocking=True)

    def _allocate(self) -> None:
        self.unet.to(self.dtype).to_empty(device=self.place).to(memory_format=torch.channels_last)
        self.text_weights = share_text_weights(self.unet)
        if self.in_fp8:
            fp8.replace_large(self.unet)


def _copied(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8) if tensor.dtype is fp8.FP8 else tensor  # torch's copies in groups know no fp8
