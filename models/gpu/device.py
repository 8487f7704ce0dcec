"""A GPU: its streams, its memory, and how many calls it takes at a time."""

import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.device import Device, NoDevice, Tier
from models.gpu.cache import private
from models.gpu.graphs import release_cached_memory
from models.gpu.prepare import STEPS_PRIORITY, prepare
from models.gpu.static import StaticUNet
from models.modules import UNet
from models.pipeline import Pipeline
from models.registry import Registry

FP8_CAPABILITY = (8, 9)  # Ada; Hopper has 9.0


class Gpu(Device):
    """One CUDA device. Steps and encodes share a stream; decodes have one of lower priority; loads have a third.

    cache: where torch.compile keeps what it makes. Raises NoDevice.
    """

    name = "cuda"
    steps_at_a_time = decodes_at_a_time = 1  # of each stream
    max_batch = 8  # SDXL at 1024 px is flat after 8 on an H100
    first_batches = 1
    is_fast = True
    first_call_is_typical = False
    default_dtype = torch.float16

    def __init__(self, cache: Path | None = None) -> None:
        if not torch.cuda.is_available():
            raise NoDevice(
                "DEVICE=cuda, but torch finds no CUDA device here: leave DEVICE out, or install CUDA's torch"
            )
        if cache is not None:
            wanted = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or cache / "inductor"
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(private(Path(wanted)))
        self._steps, self._decodes = torch.cuda.Stream(priority=STEPS_PRIORITY), torch.cuda.Stream(priority=0)
        self._loads = torch.cuda.Stream()
        self.join_steps()

    def tiers(self, host_budget: int, device_budget: int | None) -> list[Tier]:
        """The GPU's memory, then pinned host memory. By default half of what is free once text encoders and VAE are
        there; the other half is for the weights that run (5.1 GB for SDXL), activations and graphs."""
        spare = torch.cuda.mem_get_info()[0] // 2
        return [
            Tier(self.name, spare if device_budget is None else device_budget),
            Tier("cpu", host_budget, pinned=True),
        ]

    def make_unet(self, config: dict[str, Any], dtype: torch.dtype, in_fp8: bool = False) -> UNet:
        """A UNet whose weights stay where they are."""
        if in_fp8 and torch.cuda.get_device_capability() < FP8_CAPABILITY:
            return super().make_unet(config, dtype, in_fp8)  # which says why not
        return StaticUNet(config, self.name, dtype, in_fp8)

    def prepare(self, pipeline: Pipeline, registry: Registry) -> dict[str, float]:
        """The fastest attention, and graphs."""
        return prepare(pipeline, registry.unet)

    def join_steps(self) -> None:
        """The thread that makes the device has joined."""
        torch.cuda.set_stream(self._steps)

    def decoding(self) -> AbstractContextManager[object]:
        """On the decodes' stream."""
        return torch.cuda.stream(self._decodes)

    def loading(self) -> AbstractContextManager[object]:
        """On the loads' stream."""
        return torch.cuda.stream(self._loads)

    def put(self, tensor: Tensor) -> Tensor:
        """Through pinned memory."""
        return tensor.pin_memory().to(self.name, non_blocking=True)

    def to_host(self, tensor: Tensor) -> Tensor:
        """Into pinned memory."""
        host = torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
        self.wait()
        return host

    def wait(self) -> None:
        """Of this thread's stream."""
        torch.cuda.current_stream().synchronize()

    def memory_used(self) -> int | None:
        """What torch has allocated."""
        return torch.cuda.memory_allocated()

    def release_memory(self) -> None:
        """Empty torch's cache."""
        release_cached_memory()

    @staticmethod
    def is_out_of_memory(error: BaseException) -> bool:
        """CUDA and its libraries say so in their own words."""
        # The last is cuDNN's, where no way to convolve finds room for its workspace.
        words = ("ALLOC_FAILED", "CUDA error: out of memory", "unable to find an engine")
        return isinstance(error, torch.OutOfMemoryError) or any(each in str(error) for each in words)

    @staticmethod
    def is_lost(error: BaseException) -> bool:
        """A CUDA error other than out-of-memory poisons its context for good: only a new process cures it."""
        is_of_cuda = isinstance(error, torch.AcceleratorError) or "CUDA error" in str(error)
        return is_of_cuda and not Gpu.is_out_of_memory(error)
