"""A variant and its styles to tensors: the only file that looks inside models.catalog.Weights."""

from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor

from models import weights
from models.catalog import Variant, Weights
from models.modules import WeightSet


class WeightSets:
    """Reads weight sets of one family. expected: the UNet's own state, for names and shapes."""

    def __init__(self, store: weights.WeightStore, dtype: torch.dtype, expected: dict[str, Tensor]) -> None:
        self.store, self.dtype, self._expected = store, dtype, expected

    @property
    def bytes_of_one(self) -> int:
        """What one weight set takes in memory: 5.1 GB for SDXL in float16."""
        return sum(tensor.numel() for tensor in self._expected.values()) * self.dtype.itemsize

    def read(self, wanted: Weights, place: str) -> WeightSet:
        """All tensors of the UNet, laid out for it, on a device. A LoRA is fused into a clean copy of the base. Raises
        KeyError for an unknown variant, weights.MissingWeights, weights.BadWeights."""
        variant = self.store.family.variants[wanted.variant]
        if wanted.styles:
            raise weights.MissingWeights(f"no such style: {', '.join(name for name, _ in wanted.styles)}")
        state = weights.read(self.store.variant_file(variant.name), place)
        if variant.kind == "lora":
            state = self._fused(state, variant, place)
        else:
            weights.check_fit(self._expected, state, variant.file)
        return {
            key: tensor.to(self.dtype, memory_format=torch.channels_last if tensor.ndim == 4 else torch.preserve_format)
            for key, tensor in state.items()
        }

    def _fused(self, lora: WeightSet, variant: Variant, place: str) -> WeightSet:
        base = weights.read(self.store.component_file("unet"), place)
        weights.check_fit(self._expected, base, "unet")
        # The published base is float16: fused in that, the sum is rounded once, as it would be on its way from
        # float32 (and the LoRA's product once more, by 1/2048 of itself), at half of the 10 GB.
        exact = torch.float16 if self.dtype is torch.float16 else torch.float32
        with torch.device("meta"):  # of this thread alone; accelerate's way would be of all threads
            unet: Any = UNet2DConditionModel.from_config(self.store.config("unet"))
        unet.load_state_dict({key: tensor.to(exact) for key, tensor in base.items()}, assign=True)
        _fuse_lora(unet, lora, variant)
        fused: WeightSet = unet.state_dict()
        return fused


def is_of(weights: Weights, variant: str) -> bool:
    """Whether these are a variant's weights, with styles or without."""
    return weights.variant == variant


def _fuse_lora(unet: Any, state: WeightSet, variant: Variant) -> None:
    """Add a kohya-format LoRA to a UNet's weights, with diffusers' and peft's own code."""
    try:
        lora, alphas = StableDiffusionXLPipeline.lora_state_dict(state, unet_config=unet.config)
        unet.load_lora_adapter(lora, network_alphas=alphas, prefix="unet", adapter_name=variant.name)
        unet.fuse_lora()
        unet.unload_lora()
    except (ValueError, RuntimeError, KeyError) as error:
        raise weights.BadWeights(f"{variant.file} is no LoRA of this UNet: {error}") from error
