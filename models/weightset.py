"""A variant and its styles to tensors: the only file that looks inside models.catalog.Weights."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from models import lora, weights
from models.catalog import Style, Weights
from models.modules import WeightSet, text_shapes
from models.styles import SUFFIX, look_at


class BadStyle(weights.BadWeights):
    """A style's file cannot be used, whatever it is asked for with; the text says why, for whoever asked."""


class StyleGone(weights.MissingWeights):
    """A style's file was removed or replaced since it was asked for."""


@dataclass(frozen=True)
class WholeSet:
    """A weight set: the UNet's tensors, and what styles add to the text encoders: for each weight the two factors,
    PART.WEIGHT.up (out, rank) and .down (rank, in) float32."""

    unet: WeightSet
    text: WeightSet

    @cached_property
    def nbytes(self) -> int:
        """What it takes in memory; what it shares with the set that its styles were added to counts, too."""
        return sum(tensor.nbytes for part in (self.unet, self.text) for tensor in part.values())


class WeightSets:
    """Reads weight sets of one family. expected: the UNet's own state, for names and shapes. styles: their folder."""

    def __init__(
        self, store: weights.WeightStore, dtype: torch.dtype, expected: dict[str, Tensor], styles: Path | None = None
    ) -> None:
        self.store, self.dtype, self._expected, self._styles = store, dtype, expected, styles

    @property
    def bytes_of_one(self) -> int:
        """What one weight set takes in memory: 5.1 GB for SDXL in float16."""
        return sum(tensor.numel() for tensor in self._expected.values()) * self.dtype.itemsize

    @property
    def names(self) -> Collection[str]:
        """Of a set's tensors, as they are read."""
        return self._expected.keys()

    def read(
        self,
        wanted: Weights,
        place: str,
        clean: WeightSet | None = None,
        layout: torch.memory_format = torch.channels_last,
    ) -> WholeSet:
        """All tensors of a weight set on a device, those of convolutions in a layout. A LoRA is added to a clean base,
        never to what was changed before. clean: the UNet's of the variant without styles, where they are at hand.
        Raises KeyError for an unknown variant, MissingWeights, BadWeights, and for styles StyleGone, BadStyle."""
        state = self._variant(wanted.variant, place) if clean is None else dict(clean)
        text: WeightSet = {}
        if wanted.styles:
            styles = [(style.scale, self._style(style, place)) for style in wanted.styles]
            try:
                unet = [(scale, found.get(lora.UNET, {})) for scale, found in styles]
                lora.add(state, unet, self.dtype, ", ".join(style.name for style in wanted.styles))
            except weights.BadWeights as error:
                raise BadStyle(str(error)) from error
            text = _factors(styles)
        for key, tensor in state.items():  # one by one, so that there is never a second set
            state[key] = tensor.to(self.dtype, memory_format=layout if tensor.ndim == 4 else torch.preserve_format)
        return WholeSet(state, text)

    def _variant(self, name: str, place: str) -> WeightSet:
        variant = self.store.family.variants[name]
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
            found = self._changes(path, place, {lora.UNET: self._expected})
            lora.add(state, [(1.0, found[lora.UNET])], self.dtype, variant.file)
        return state

    def _style(self, style: Style, place: str) -> lora.Changes:
        """What one changes. Its file is the same before and after it is read, or it is none."""
        if self._styles is None or not self._is_there(style):
            raise StyleGone(f"the style {style.name} is not there any more")
        try:
            found = self._changes(self._styles / f"{style.name}{SUFFIX}", place, self._parts)
        except weights.BadWeights as error:
            if self._is_there(style):
                raise BadStyle(str(error)) from error
        if not self._is_there(style):
            raise StyleGone(f"the style {style.name} was replaced while it was read")
        return found

    def _is_there(self, style: Style) -> bool:
        found = self._styles and look_at(self._styles, style.name)
        return bool(found and found.id == style.file)

    @cached_property
    def _parts(self) -> dict[str, Mapping[str, Tensor]]:
        return {lora.UNET: self._expected, **text_shapes(self.store)}

    def _changes(self, path: Path, place: str, parts: Mapping[str, Mapping[str, Tensor]]) -> lora.Changes:
        state = weights.read(path, place)
        metadata = (weights.check_header(path).get("__metadata__") or {}).get("lora_adapter_metadata", "{}")
        layers = self.store.config("unet").get("layers_per_block", 2)
        return lora.changes(state, parts, layers, path.name, metadata)


def is_of(weights: Weights, variant: str) -> bool:
    """Whether these are a variant's weights, with styles or without."""
    return weights.variant == variant


def _factors(styles: list[tuple[float, lora.Changes]]) -> WeightSet:
    """What styles add to the text encoders, one product for each weight."""
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for much, changes in styles:
        for part in lora.TEXT:
            for name, change in changes.get(part, {}).items():
                factors = (much * change.scale * change.up.float(), change.down.float())
                found.setdefault(f"{part}.{name}", []).append(factors)
    text = {}
    for name, factors_of in found.items():
        ups, downs = zip(*factors_of, strict=True)
        text[f"{name}.up"], text[f"{name}.down"] = torch.cat(ups, dim=1), torch.cat(downs)
    return text
