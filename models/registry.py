"""The registry: the UNet is code, weights are data. Which weight sets are held, where, and which one is active."""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from models.catalog import Weights
from models.device import Device, Tier
from models.modules import UNet, UNetFunction, WeightSet
from models.schedule import Schedule, make_schedule
from models.weights import WeightStore
from models.weightset import WeightSets, is_of


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
    """Weight sets of one family in memory tiers, the fastest first, least recently used out first.

    load and unload may run in any thread; use() belongs to the thread that plans. A load that fails changes
    nothing else. `bind` makes a UNet function of a weight set; None runs the one UNet module, `unet`.
    """

    def __init__(
        self, store: WeightStore, device: Device, dtype: torch.dtype, tiers: list[Tier], unet: UNet | None = None
    ) -> None:
        self.store, self.device, self.tiers = store, device, tiers
        self.unet = device.make_unet(store.config("unet"), dtype) if unet is None else unet
        self._reader = WeightSets(store, dtype, self.unet.unet.state_dict())
        self._schedules: dict[tuple[str, int], Schedule] = {}
        for variant in store.family.variants.values():
            for steps in variant.steps:
                self.schedule(variant.name, steps)
        self.active: Weights | None = None
        self.switches = 0
        self.load_seconds = 0.0  # that the last load took
        self._switch_seconds: list[float | None] = [None for _ in tiers]  # that the last switch took, by where it was
        self.bind: Callable[[WeightSet], UNetFunction] | None = None
        self._bound: OrderedDict[Weights, UNetFunction] = OrderedDict()
        self._sets: list[OrderedDict[Weights, WeightSet]] = [OrderedDict() for _ in tiers]
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

    def load(self, weights: Weights) -> None:
        """Read a weight set into memory. Raises KeyError for an unknown variant, MissingWeights, BadWeights,
        OverBudget."""
        with self._lock:
            if weights in self._loading or any(weights in tier for tier in self._sets):
                return
            self._loading.add(weights)
        try:
            with self._one_load, self.device.loading():
                start = time.monotonic()
                self._hold(weights, self._read(weights), first_tier=0)
                self.load_seconds = time.monotonic() - start
            with self._lock:
                self._failed.pop(weights, None)
        except Exception as error:
            with self._lock:
                self._failed[weights] = str(error)
            raise
        finally:
            with self._lock:
                self._loading.discard(weights)

    def unload(self, weights: Weights) -> None:
        """Forget a weight set; absent ones are no error. The active set stays until the next use()."""
        with self._lock:
            self._bound.pop(weights, None)
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
            return self._touch(weights)

    def use(self, weights: Weights) -> UNetFunction:
        """The UNet with these weights. Raises KeyError if they are not resident."""
        with self._lock:
            weight_set = self._touch(weights)
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

    def use_compiled(self, bind: Callable[[WeightSet], UNetFunction]) -> None:
        """From the next use() on, run compiled code bound to each weight set instead of the module."""
        with self._lock:
            self.bind, self.active = bind, None

    def bind_all(self) -> None:
        """Make the functions of all resident weight sets now, not at their first use."""
        with self._lock:
            for weights, weight_set in [each for tier in self._sets for each in tier.items()]:
                self._function(weights, weight_set)

    def status(self) -> list[VariantStatus]:
        """One line per variant, in the catalog's order."""
        with self._lock:
            return [self._status(name) for name in self.store.family.variants]

    def _status(self, name: str) -> VariantStatus:
        held = [weight_set for tier in self._sets for weights, weight_set in tier.items() if is_of(weights, name)]
        if held:
            return VariantStatus(name, "resident", sum(map(_size, held)))
        if any(is_of(weights, name) for weights in self._loading):
            return VariantStatus(name, "loading")
        reason = next((reason for weights, reason in self._failed.items() if is_of(weights, name)), None)
        return VariantStatus(name, "on disk" if reason is None else "failed", reason=reason)

    def _function(self, weights: Weights, weight_set: WeightSet) -> UNetFunction:
        assert self.bind is not None
        if weights not in self._bound:
            self._bound[weights] = self.bind(weight_set)
        self._bound.move_to_end(weights)
        while self.device.most_bound is not None and len(self._bound) > self.device.most_bound:
            self._bound.popitem(last=False)
        return self._bound[weights]

    def _touch(self, weights: Weights) -> WeightSet:
        for tier in self._sets:
            if weights in tier:
                tier.move_to_end(weights)
                return tier[weights]
        raise KeyError(weights)

    def _read(self, weights: Weights) -> WeightSet:
        # Straight to where it will be held, if it fits there: fused and laid out on the GPU, which is faster.
        fits = self.bytes_of_a_set <= self.tiers[0].budget
        return self.unet.packed(self._reader.read(weights, self.tiers[0].place if fits else "cpu"))

    def _hold(self, weights: Weights, weight_set: WeightSet, first_tier: int) -> None:
        """Put a set into the first tier large enough; what it displaces moves a tier down, and out of the last."""
        for index in range(first_tier, len(self.tiers)):
            tier, held = self.tiers[index], self._sets[index]
            if _size(weight_set) > tier.budget:
                continue
            while (oldest := self._oldest_over_budget(index, _size(weight_set))) is not None:
                if index + 1 < len(self.tiers):
                    self._hold(*oldest, first_tier=index + 1)  # it is below before it is gone from here
                with self._lock:
                    held.pop(oldest[0], None)
                    self._bound.pop(oldest[0], None)
            placed = {key: _placed(tensor, tier) for key, tensor in weight_set.items()}  # no lock: gigabytes move here
            self.device.wait()
            with self._lock:
                held[weights] = placed
            return
        if first_tier == 0:
            budgets = ", ".join(f"{tier.budget / 2**30:.1f} GiB on {tier.place}" for tier in self.tiers)
            size = f"{_size(weight_set) / 2**30:.1f} GiB"
            raise OverBudget(f"{weights} takes {size}, more than any budget ({budgets})")

    def _oldest_over_budget(self, index: int, coming: int) -> tuple[Weights, WeightSet] | None:
        """The least recently used set of a tier, if `coming` bytes more would not fit into its budget."""
        with self._lock:
            held = self._sets[index]
            if sum(map(_size, held.values())) + coming <= self.tiers[index].budget:
                return None
            return next(iter(held.items()))


def _size(weight_set: WeightSet) -> int:
    return sum(tensor.nbytes for tensor in weight_set.values())


def _placed(tensor: Tensor, tier: Tier) -> Tensor:
    moved = tensor.to(tier.place, non_blocking=True)  # to the host: into pinned memory
    return moved.pin_memory() if tier.pinned else moved
