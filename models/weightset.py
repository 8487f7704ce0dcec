"""A variant and its styles to tensors: the only file that looks inside models.catalog.Weights."""

import torch
from torch import Tensor

from models import lora, weights
from models.catalog import Weights
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
        path = self.store.variant_file(variant.name)
        if not variant.file:
            state = self.store.read("unet", place, self.dtype)
            weights.check_fit(self._expected, state, path.name)
        elif variant.kind == "unet":
            state = weights.read(path, place, self.dtype)
            weights.check_fit(self._expected, state, variant.file)
        else:
            state = self.store.read("unet", place)  # as it is: rounded once, behind the sum
            weights.check_fit(self._expected, state, "unet")
            added = weights.read(path, place)
            metadata = (weights.check_header(path).get("__metadata__") or {}).get("lora_adapter_metadata", "{}")
            layers = self.store.config("unet").get("layers_per_block", 2)
            lora.fuse(state, added, layers, self.dtype, variant.file, metadata)
        for key, tensor in state.items():  # one by one, so that there is never a second set
            layout = torch.channels_last if tensor.ndim == 4 else torch.preserve_format
            state[key] = tensor.to(self.dtype, memory_format=layout)
        return state


def is_of(weights: Weights, variant: str) -> bool:
    """Whether these are a variant's weights, with styles or without."""
    return weights.variant == variant
