"""The registry: the UNet is code, weights are data. Which weight sets are held, where, and which one is active."""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from models.catalog import Weights
from models.device import Device, Tier
from models.modules import UNet, UNetFunction, WeightSet
from models.schedule import Schedule, make_schedule
from models.weights import WeightStore
from models.weightset import WeightSets, WholeSet, is_of

# Bind(weight set, has styles) -> the UNet with it
Bind = Callable[[WeightSet, bool], UNetFunction]


class OverBudget(Exception):
    """A weight set is larger than every memory tier it could be held in."""


@dataclass(frozen=True)
class VariantStatus:
    """What the registry knows of a variant. state: "resident", "loading", "failed" or "on disk". resident_bytes: of all
    its weight sets. reason: why it failed."""

    name: str
    state: str
    resident_bytes: int = 0
    reason: str | None = None


class Registry:
    """Weight sets of one family in memory tiers, the fastest first. Out go first those with styles, which are made
    anew in little time, then the others, least recently used first.

    load and unload may run in any thread; use() belongs to the thread that plans. A load that fails changes
    nothing else. `bind` makes a UNet function of a weight set; None runs the one UNet module, `unet`. styles: the
    folder of their files.
    """

    def __init__(
        self,
        store: WeightStore,
        device: Device,
        dtype: torch.dtype,
        tiers: list[Tier],
        unet: UNet | None = None,
        styles: Path | None = None,
    ) -> None:
        self.store, self.device, self.tiers = store, device, tiers
        self.unet = device.make_unet(store.config("unet"), dtype) if unet is None else unet
        self._reader = WeightSets(store, dtype, self.unet.unet.state_dict(), styles)
        self._schedules: dict[tuple[str, int], Schedule] = {}
        for variant in store.family.variants.values():
            for steps in variant.steps:
                self.schedule(variant.name, steps)
        self.active: Weights | None = None
        self.switches = 0
        self.load_seconds = 0.0  # that the last load without styles took
        self.style_seconds = 0.0  # and the last with styles, without what is compiled once for all
        self._switch_seconds: list[float | None] = [None for _ in tiers]  # that the last switch took, by where it was
        self.bind: Bind | None = None
        self._bound: OrderedDict[Weights, UNetFunction] = OrderedDict()
        self._styled: dict[Weights, UNetFunction] = {}  # the same of those with styles, which are compiled once for all
        self._sets: list[OrderedDict[Weights, WholeSet]] = [OrderedDict() for _ in tiers]
        self._loading: set[Weights] = set()
        self._failed: dict[Weights, str] = {}
        self._lock = threading.Lock()
        self._one_load = threading.Lock()  # two loads at once would need twice the memory

    @property
    def bytes_of_a_set(self) -> int:
        """What one weight set takes in memory."""
        return self._reader.bytes_of_one

    def schedule(self, variant: str, steps: int) -> Schedule:
        """The table of a variant at a step count, on the device; made once. Raises ValueError for steps that the
        variant does not declare."""
        if (variant, steps) not in self._schedules:
            made = make_schedule(self.store.family.variants[variant], steps)
            self._schedules[variant, steps] = made.to(self.device.name)
        return self._schedules[variant, steps]

    def load(self, weights: Weights, keep: Sequence[Weights] = ()) -> list[Weights]:
        """Read a weight set into memory; what had to leave for it. keep: those that leave last, the last of them
        first. Raises KeyError for an unknown variant, MissingWeights, BadWeights (of styles StyleGone, BadStyle),
        OverBudget."""
        with self._lock:
            if weights in self._loading or any(weights in tier for tier in self._sets):
                return []
            self._loading.add(weights)
        try:
            with self._one_load, self.device.loading():
                start = time.monotonic()
                left = self._hold(weights, self._read(weights), 0, keep)
                seconds = time.monotonic() - start
                if weights.is_styled:
                    self.style_seconds = seconds
                else:
                    self.load_seconds = seconds
                if self.bind is not None and weights.is_styled:
                    function = self.bind(self.weight_set(weights), True)  # here: the first of all is compiled
                    with self._lock:
                        self._styled[weights] = function
            with self._lock:
                self._failed.pop(weights, None)
            return left
        except Exception as error:
            with self._lock:
                if not weights.is_styled:  # a style's fault is not its variant's
                    self._failed[weights] = str(error)
            raise
        finally:
            with self._lock:
                self._loading.discard(weights)

    def has_room(self, keep: Sequence[Weights]) -> bool:
        """Whether one set more can be held while those of these that are resident stay."""
        room = sum(tier.budget // self.bytes_of_a_set for tier in self.tiers)
        return sum(map(self.is_resident, keep)) < max(1, room)

    def unload(self, weights: Weights) -> None:
        """Forget a weight set; absent ones are no error. The active set stays until the next use()."""
        with self._lock:
            self._forget(weights)
            for tier in self._sets:
                tier.pop(weights, None)

    def is_resident(self, weights: Weights) -> bool:
        """Whether use() would work now."""
        with self._lock:
            return any(weights in tier for tier in self._sets)

    def held(self) -> dict[Weights, float]:
        """Each resident weight set, and the seconds until use() would have it in use: as measured, or until then no
        better than a load."""
        with self._lock:
            known = [self.load_seconds if seconds is None else seconds for seconds in self._switch_seconds]
            return {weights: seconds for tier, seconds in zip(self._sets, known, strict=True) for weights in tier}

    def weight_set(self, weights: Weights) -> WeightSet:
        """Resident tensors, not to be changed. Raises KeyError if they are not resident."""
        with self._lock:
            return self._touch(weights).unet

    def text_factors(self, weights: Weights) -> WeightSet:
        """What these weights' styles add to the text encoders, as WholeSet.text. Raises KeyError if they are not
        resident."""
        with self._lock:
            return self._touch(weights).text

    def use(self, weights: Weights) -> UNetFunction:
        """The UNet with these weights. Raises KeyError if they are not resident."""
        with self._lock:
            weight_set = self._touch(weights).unet
            if self.active != weights:
                start = time.monotonic()
                self.switches += 1
                self.active = weights
                if self.bind is None:
                    self.unet.take(weight_set)
                    self.device.wait()  # or the set might be evicted, and its memory used anew, before it is read
                tier = next(index for index, held in enumerate(self._sets) if weights in held)
                self._switch_seconds[tier] = time.monotonic() - start
            if self.bind is None:
                return self.unet
            return self._function(weights, weight_set)

    def use_compiled(self, bind: Bind) -> None:
        """From the next use() on, run compiled code bound to each weight set instead of the module."""
        with self._lock:
            self.bind, self.active = bind, None

    def bind_all(self) -> None:
        """Make the functions of all resident weight sets now, not at their first use."""
        with self._lock:
            for weights, held in [each for tier in self._sets for each in tier.items()]:
                self._function(weights, held.unet)

    def status(self) -> list[VariantStatus]:
        """One line per variant, in the catalog's order."""
        with self._lock:
            return [self._status(name) for name in self.store.family.variants]

    def _status(self, name: str) -> VariantStatus:
        plain = Weights(name)
        held = [whole for tier in self._sets for weights, whole in tier.items() if is_of(weights, name)]
        size = sum(whole.nbytes for whole in held)
        if any(plain in tier for tier in self._sets):
            return VariantStatus(name, "resident", size)
        if plain in self._loading:
            return VariantStatus(name, "loading", size)
        reason = self._failed.get(plain)
        return VariantStatus(name, "on disk" if reason is None else "failed", size, reason)

    def _function(self, weights: Weights, weight_set: WeightSet) -> UNetFunction:
        assert self.bind is not None
        if weights.is_styled:
            if weights not in self._styled:
                self._styled[weights] = self.bind(weight_set, True)
            return self._styled[weights]
        if weights not in self._bound:
            self._bound[weights] = self.bind(weight_set, False)
        self._bound.move_to_end(weights)
        while self.device.most_bound is not None and len(self._bound) > self.device.most_bound:
            self._bound.popitem(last=False)
        return self._bound[weights]

    def _forget(self, weights: Weights) -> None:
        self._bound.pop(weights, None)
        self._styled.pop(weights, None)

    def _touch(self, weights: Weights) -> WholeSet:
        for tier in self._sets:
            if weights in tier:
                tier.move_to_end(weights)
                return tier[weights]
        raise KeyError(weights)

    def _read(self, weights: Weights) -> WholeSet:
        # Straight to where it will be held, if it fits there: fused and laid out on the GPU, which is faster.
        place = self.tiers[0].place if self.bytes_of_a_set <= self.tiers[0].budget else "cpu"
        clean = self._clean(weights.variant) if weights.is_styled else None
        found = self._reader.read(weights, place, clean, self.device.layout)
        return WholeSet(self.unet.packed(found.unet), found.text)

    def _clean(self, variant: str) -> WeightSet | None:
        """The variant's own set, where it is resident as its file has it, not quantized."""
        with self._lock:
            found = next((tier[Weights(variant)].unet for tier in self._sets if Weights(variant) in tier), None)
        return found if found is not None and found.keys() == self._reader.names else None

    def _hold(self, weights: Weights, whole: WholeSet, first_tier: int, keep: Sequence[Weights]) -> list[Weights]:
        """Put a set into the first tier large enough; what it displaces moves a tier down, and out of the last. One
        with styles is not worth the move. Returns what left for good."""
        left: list[Weights] = []
        for index in range(first_tier, len(self.tiers)):
            tier, held = self.tiers[index], self._sets[index]
            if whole.nbytes > tier.budget:
                continue
            while (first := self._first_out(index, whole.nbytes, keep)) is not None:
                if index + 1 < len(self.tiers) and (first[0] in keep or not first[0].is_styled):
                    left += self._hold(*first, index + 1, keep)  # it is below before it is gone from here
                with self._lock:
                    held.pop(first[0], None)
                    self._forget(first[0])
                if not self.is_resident(first[0]):
                    left.append(first[0])
            # No lock: gigabytes move here.
            parts = (whole.unet, whole.text)
            placed = WholeSet(*({key: _placed(tensor, tier) for key, tensor in part.items()} for part in parts))
            self.device.wait()
            with self._lock:
                held[weights] = placed
            return left
        if first_tier == 0:
            budgets = ", ".join(f"{tier.budget / 2**30:.1f} GiB on {tier.place}" for tier in self.tiers)
            raise OverBudget(f"{weights} takes {whole.nbytes / 2**30:.1f} GiB, more than any budget ({budgets})")
        return left

    def _first_out(self, index: int, coming: int, keep: Sequence[Weights]) -> tuple[Weights, WholeSet] | None:
        """Which set of a tier goes first, if `coming` bytes more would not fit into its budget."""
        with self._lock:
            held, order = self._sets[index], {weights: place for place, weights in enumerate(reversed(keep))}
            if sum(whole.nbytes for whole in held.values()) + coming <= self.tiers[index].budget:
                return None
            # Of equals the first, which is the least recently used.
            return min(held.items(), key=lambda each: (order.get(each[0], -1), not each[0].is_styled))


def _placed(tensor: Tensor, tier: Tier) -> Tensor:
    moved = tensor.to(tier.place, non_blocking=True)  # to the host: into pinned memory
    return moved.pin_memory() if tier.pinned else moved
