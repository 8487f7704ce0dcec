"""The registry: the UNet is code, a variant is a weight set. Which sets are held, where, and which one is active."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor, nn

from models import fp8, weights
from models.attention import share_text_weights
from models.catalog import Variant
from models.pipeline import UNetFunction, check_fit
from models.schedule import Schedule, make_schedule

WeightSet = dict[str, Tensor]


class OverBudget(Exception):
    """A weight set is larger than every memory tier it could be held in."""


@dataclass(frozen=True)
class Tier:
    """A kind of memory that holds weight sets. pinned: page-locked host memory, from which a GPU copies fastest."""

    device: str
    budget: int  # bytes
    pinned: bool = False


@dataclass(frozen=True)
class VariantStatus:
    """What the registry knows of a variant. state: "resident", "loading", "failed" or "on disk"."""

    name: str
    state: str
    resident_bytes: int = 0
    reason: str = ""


class UNet(nn.Module):
    """diffusers' UNet with plain tensor arguments, so that it can be exported and captured."""

    def __init__(self, config: dict) -> None:
        super().__init__()
        with init_empty_weights():
            self.unet = UNet2DConditionModel.from_config(config).eval().requires_grad_(False)
        self.text_weights: Tensor | None
        self.register_buffer("text_weights", None, persistent=False)  # models.attention.share_text_weights

    def forward(self, latents: Tensor, timestep: Tensor, embeds: Tensor, pooled: Tensor, time_ids: Tensor) -> Tensor:
        """Shapes as in models.pipeline.UNetFunction; embeds may be project(embeds)."""
        added = {"text_embeds": pooled, "time_ids": time_ids}
        return self.unet(latents, timestep, self.project(embeds), added_cond_kwargs=added, return_dict=False)[0]

    def project(self, embeds: Tensor) -> Tensor:
        """Embeddings of prompts (..., L, C) as all cross-attentions' keys and values (..., L, columns), where their
        weights are shared; what is projected already, or need not be, comes back as it is."""
        if self.text_weights is None or embeds.shape[-1] == len(self.text_weights):
            return embeds
        return F.linear(embeds, self.text_weights)


class Registry:
    """Weight sets of one family in memory tiers, the fastest first, least recently used out first.

    load and unload may run in any thread; use() belongs to the thread that plans. A load that fails changes
    nothing else. `bind` makes a UNet function of a weight set; None runs the one UNet module (see models.compiled).
    `static`: the module has weights of its own, into which a set is copied; else it refers to the set's.
    `in_fp8`: each set's large matrices are quantized as it is loaded (models.fp8); only where `static`.
    """

    def __init__(self, store: weights.WeightStore, device: str, dtype: torch.dtype, tiers: list[Tier]) -> None:
        self.store, self.device, self.dtype, self.tiers = store, device, dtype, tiers
        self.config = store.config("unet")
        scheduler = store.config("scheduler")
        self.schedules: dict[str, Schedule] = {
            name: make_schedule(variant, scheduler).to(device) for name, variant in store.family.variants.items()
        }
        self.unet = UNet(self.config)
        self._expected = self.unet.unet.state_dict()  # on the meta device; in fp8 the module will have others
        self.static = device != "cpu"  # CUDA graphs need the addresses to stay
        self.active: str | None = None
        self.switches = 0
        self.bind: Callable[[WeightSet], UNetFunction] | None = None
        self.in_fp8 = False
        self._bound: dict[str, UNetFunction] = {}
        self._sets: list[OrderedDict[str, WeightSet]] = [OrderedDict() for _ in tiers]
        self._loading: set[str] = set()
        self._failed: dict[str, str] = {}
        self._lock = threading.Lock()
        self._one_load = threading.Lock()  # two loads at once would need twice the memory
        self._stream = torch.cuda.Stream() if device != "cpu" else None  # of the loads, beside the steps

    def load(self, name: str) -> None:
        """Read a variant into memory, fusing a LoRA into a clean copy of the base. Raises KeyError for an unknown name,
        weights.MissingWeights, weights.BadWeights, OverBudget."""
        variant = self.store.family.variants[name]
        with self._lock:
            if name in self._loading or any(name in tier for tier in self._sets):
                return
            self._loading.add(name)
        try:
            with self._one_load, torch.cuda.stream(self._stream):  # no stream, no effect
                self._hold(name, self._read(variant), first_tier=0)
            with self._lock:
                self._failed.pop(name, None)
        except Exception as error:
            with self._lock:
                self._failed[name] = str(error)
            raise
        finally:
            with self._lock:
                self._loading.discard(name)

    def unload(self, name: str) -> None:
        """Forget a variant's weights; absent names are no error. The active set stays until the next use()."""
        with self._lock:
            self._bound.pop(name, None)
            for tier in self._sets:
                tier.pop(name, None)

    def is_resident(self, name: str) -> bool:
        """Whether use() would work now."""
        with self._lock:
            return any(name in tier for tier in self._sets)

    def weight_set(self, name: str) -> WeightSet:
        """A resident variant's tensors, not to be changed. Raises KeyError if it is not resident."""
        with self._lock:
            return self._touch(name)

    def use(self, name: str) -> UNetFunction:
        """The UNet with this variant's weights. Raises KeyError if the variant is not resident."""
        with self._lock:
            weight_set = self._touch(name)
            if self.active != name:
                self.switches += 1
                self.active = name
                if self.bind is None:
                    self._activate(weight_set)
            if self.bind is None:
                return self.unet
            if name not in self._bound:
                self._bound[name] = self.bind(weight_set)
            return self._bound[name]

    def use_compiled(self, bind: Callable[[WeightSet], UNetFunction]) -> None:
        """From the next use() on, run compiled code bound to each weight set instead of the module."""
        with self._lock:
            self.bind, self.active = bind, None

    def status(self) -> list[VariantStatus]:
        """One line a variant, in the catalog's order."""
        with self._lock:
            return [self._status(name) for name in self.store.family.variants]

    def _status(self, name: str) -> VariantStatus:
        for tier in self._sets:
            if name in tier:
                return VariantStatus(name, "resident", _size(tier[name]))
        if name in self._loading:
            return VariantStatus(name, "loading")
        if name in self._failed:
            return VariantStatus(name, "failed", reason=self._failed[name])
        return VariantStatus(name, "on disk")

    def _touch(self, name: str) -> WeightSet:
        for tier in self._sets:
            if name in tier:
                tier.move_to_end(name)
                return tier[name]
        raise KeyError(name)

    def _hold(self, name: str, weight_set: WeightSet, first_tier: int) -> None:
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
            self._wait()
            with self._lock:
                held[name] = placed
            return
        if first_tier == 0:
            budgets = ", ".join(f"{tier.budget / 2**30:.1f} GiB on {tier.device}" for tier in self.tiers)
            raise OverBudget(f"{name} takes {_size(weight_set) / 2**30:.1f} GiB, more than any budget ({budgets})")

    def _oldest_over_budget(self, index: int, coming: int) -> tuple[str, WeightSet] | None:
        """The least recently used set of a tier, if `coming` bytes more would not fit into its budget."""
        with self._lock:
            held = self._sets[index]
            if sum(map(_size, held.values())) + coming <= self.tiers[index].budget:
                return None
            return next(iter(held.items()))

    def _activate(self, weight_set: WeightSet) -> None:
        unet = self.unet.unet
        if not self.static:
            with torch.inference_mode():
                unet.load_state_dict(weight_set, strict=True, assign=True)
            return
        if unet.conv_in.weight.is_meta:
            unet.to(self.dtype).to_empty(device=self.device).to(memory_format=torch.channels_last)
            self.unet.text_weights = share_text_weights(unet)
            if self.in_fp8:
                fp8.replace_large(unet)
        own = unet.state_dict()
        with torch.inference_mode():
            # In few launches: one by one, 1,680 of them would take longer than the copy.
            for dtype in {tensor.dtype for tensor in own.values()}:
                keys = [key for key, tensor in own.items() if tensor.dtype is dtype]
                torch._foreach_copy_(
                    [_copied(own[key]) for key in keys], [_copied(weight_set[key]) for key in keys], non_blocking=True
                )
        self._wait()  # or the set might be evicted, and its memory used anew, before it is read

    def bytes_of_a_set(self) -> int:
        """What one weight set takes in memory: 5.1 GB for SDXL in float16."""
        return sum(tensor.numel() for tensor in self._expected.values()) * self.dtype.itemsize

    def _read(self, variant: Variant) -> WeightSet:
        # Straight to where it will be held, if it fits there: fused and laid out on the GPU, which is faster.
        fits = self.bytes_of_a_set() <= self.tiers[0].budget
        device = self.tiers[0].device if fits else "cpu"
        state = weights.read(self.store.variant_file(variant.name), device)
        if variant.kind == "lora":
            with torch.device("meta"):  # of this thread alone; accelerate's way would be of all threads
                unet = UNet2DConditionModel.from_config(self.config)
            base = weights.read(self.store.component_file("unet"), device)
            check_fit(self._expected, base, "unet")
            # The published base is float16: fused in that, the sum is rounded once, as it would be on its way from
            # float32 (and the LoRA's product once more, by 1/2048 of itself), at half of the 10 GB.
            exact = torch.float16 if self.dtype is torch.float16 else torch.float32
            unet.load_state_dict({key: tensor.to(exact) for key, tensor in base.items()}, assign=True)
            _fuse_lora(unet, state, variant)
            state = unet.state_dict()
        else:
            check_fit(self._expected, state, variant.file)
        laid_out = {
            key: tensor.to(self.dtype, memory_format=torch.channels_last if tensor.ndim == 4 else torch.preserve_format)
            for key, tensor in state.items()
        }
        return fp8.quantize(laid_out) if self.in_fp8 else laid_out

    def _wait(self) -> None:
        """Until the copies that this thread has begun are done."""
        if self._stream is not None:
            torch.cuda.current_stream().synchronize()


def _fuse_lora(unet: Any, state: WeightSet, variant: Variant) -> None:
    """Add a kohya-format LoRA to a UNet's weights, with diffusers' and peft's own code."""
    try:
        lora, alphas = StableDiffusionXLPipeline.lora_state_dict(state, unet_config=unet.config)
        unet.load_lora_adapter(lora, network_alphas=alphas, prefix="unet", adapter_name=variant.name)
        unet.fuse_lora()
        unet.unload_lora()
    except (ValueError, RuntimeError, KeyError) as error:
        raise weights.BadWeights(f"{variant.file} is no LoRA of this UNet: {error}") from error


def _copied(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8) if tensor.dtype is fp8.FP8 else tensor  # torch's copies in groups know no fp8


def _size(weight_set: WeightSet) -> int:
    return sum(tensor.nbytes for tensor in weight_set.values())


def _placed(tensor: Tensor, tier: Tier) -> Tensor:
    moved = tensor.to(tier.device, non_blocking=True)  # to the host: into pinned memory
    return moved.pin_memory() if tier.pinned else moved
