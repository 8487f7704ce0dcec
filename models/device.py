"""The device that computes, as pipeline and registry see it: here a CPU. models/gpu/device.py has a GPU's."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from models.modules import UNet

if TYPE_CHECKING:
    from models.pipeline import Pipeline
    from models.registry import Registry


class NoDevice(Exception):
    """What was asked for is not to be had on this machine; the text says why."""


@dataclass(frozen=True)
class Tier:
    """A kind of memory that holds weight sets. pinned: page-locked host memory, from which a GPU copies fastest."""

    place: str  # "cpu" or "cuda", as torch names it
    budget: int  # bytes
    pinned: bool = False


class Device:
    """A CPU: one memory, and everything is done when the call returns.

    steps_at_a_time, decodes_at_a_time: calls; None means as many as there are worker threads. first_batches: the batch
    sizes that are measured before it serves; the larger ones of max_batch come later, beside the service.
    """

    name = "cpu"  # as torch names it
    steps_at_a_time: int | None = None
    decodes_at_a_time: int | None = None
    max_batch = 16  # rows
    first_batches: int | None = None
    most_bound: int | None = None  # functions made for weight sets that are kept; the least recently used goes
    layout = torch.channels_last  # of convolutions' weights, as they are held
    is_fast = False  # enough for SDXL to be what is served by default, where its weights are here
    first_call_is_typical = True  # where a first call records or compiles, its time says nothing

    @property
    def default_dtype(self) -> torch.dtype:
        """bfloat16 where the CPU has it in hardware."""
        return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32

    def tiers(self, host_budget: int, device_budget: int | None) -> list[Tier]:
        """Where weight sets are held, the fastest memory first. Budgets in bytes; None: what there is to spare."""
        return [Tier(self.name, host_budget)]

    def make_unet(self, config: dict[str, Any], dtype: torch.dtype, in_fp8: bool = False) -> UNet:
        """A UNet that waits for a weight set. Raises NoDevice where fp8 cannot be had."""
        if in_fp8:
            raise NoDevice("FP8=1 needs a GPU that multiplies fp8 (compute capability 8.9 or higher)")
        return UNet(config)

    def prepare(self, pipeline: "Pipeline", registry: "Registry") -> dict[str, float]:
        """Before the warm-up: give the pipeline and the registry what is faster than their modules. Returns
        milliseconds of a step by what was tried on the way, if anything was."""
        return {}

    def later(self, registry: "Registry", done: Callable[[], None]) -> None:
        """Begin, beside the service, what needs no turn of its own. done: is called when that is there."""

    def finish(self, registry: "Registry") -> None:
        """The same at once, where there is no service yet."""

    def join_steps(self) -> None:
        """Put what this thread does from now on in one order with all other threads that encode and step."""

    def decoding(self) -> AbstractContextManager[object]:
        """In it, what this thread does runs beside the steps."""
        return nullcontext()

    def loading(self) -> AbstractContextManager[object]:
        """In it, what this thread copies is copied beside the steps and decodes."""
        return nullcontext()

    def put(self, tensor: Tensor) -> Tensor:
        """A host tensor on the device; the host does not wait."""
        return tensor

    def to_host(self, tensor: Tensor) -> Tensor:
        """A tensor on the host; waits for it."""
        return tensor

    def wait(self) -> None:
        """Until what this thread gave the device is done."""

    def memory_used(self) -> int | None:
        """Bytes of the device's own memory; None where it has none."""
        return None

    def release_memory(self) -> None:
        """Give back memory that is kept for later calls and not in use."""

    @staticmethod
    def is_out_of_memory(error: BaseException) -> bool:
        """Whether the device's memory did not suffice."""
        return isinstance(error, torch.OutOfMemoryError)

    @staticmethod
    def is_lost(error: BaseException) -> bool:
        """Whether the device can do nothing more for this process."""
        return False
