"""A CPU that goes a GPU's way: weights that stay in place, functions that are recorded by calling, a GPU's errors."""

from typing import Any

import torch

from models.device import Device
from models.gpu.device import Gpu
from models.gpu.prepare import use_graphs
from models.gpu.static import StaticUNet
from models.modules import UNet
from models.pipeline import Pipeline
from models.registry import Registry


class GpuWay(Device):
    """In host memory."""

    first_batches = 1
    first_call_is_typical = False
    is_out_of_memory = staticmethod(Gpu.is_out_of_memory)
    is_lost = staticmethod(Gpu.is_lost)

    def make_unet(self, config: dict[str, Any], dtype: torch.dtype, in_fp8: bool = False) -> UNet:
        return StaticUNet(config, self.name, dtype, in_fp8)

    def prepare(self, pipeline: Pipeline, registry: Registry) -> dict[str, float]:
        use_graphs(pipeline, registry.unet)
        return {}
