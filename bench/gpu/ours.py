"""Our models/ on the rig, called directly, set up as the engine sets it up (app.engine.load)."""

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from bench.gpu.rig import Rig
from models.catalog import Weights
from models.device import Device, Tier
from models.gpu.device import Gpu
from models.gpu.prepare import use_graphs
from models.gpu.static import StaticUNet
from models.pipeline import Pipeline
from models.prompts import Conditioning
from models.registry import Registry
from models.schedule import Schedule
from models.weights import WeightStore


class Ours:
    """Pipeline and registry with graphs; on a CPU their stand-ins, so that the tiny rig goes the same way."""

    def __init__(self, rig: Rig, cache: Path, in_fp8: bool = False) -> None:
        self.rig, self.on_gpu = rig, rig.device == "cuda"
        start = time.perf_counter()
        device = Gpu(cache) if self.on_gpu else Device()
        store = WeightStore(rig.family, rig.directory)
        self.pipeline = Pipeline(store, device, rig.dtype)
        self.unet = StaticUNet(store.config("unet"), rig.device, rig.dtype, in_fp8)
        self.registry = Registry(store, device, rig.dtype, [Tier(rig.device, 1 << 62)], self.unet)
        self.use("4step-unet")
        self.synchronize()
        self.load_s = time.perf_counter() - start
        device.prepare(self.pipeline, self.registry)
        if not self.on_gpu:
            use_graphs(self.pipeline, self.unet)
        self.steps = self.pipeline.steps[self.unet]

    def synchronize(self) -> None:
        """Wait for the device."""
        self.pipeline.device.wait()

    def use(self, variant: str) -> None:
        """Load it if need be, and make it the active one."""
        self.registry.load(Weights(variant))
        self.registry.use(Weights(variant))

    def start(self, variant: str, prompts: Sequence[str], seeds: Sequence[int], pixels: int) -> "Rows":
        """Rows before their first step: encoded, projected, with their noise."""
        self.use(variant)
        schedule = self._schedule(variant)
        known = [self.pipeline.project(self.unet, row) for row in self.pipeline.prompts.encode(prompts)]
        return [
            (self.pipeline.noise(seed, pixels, pixels, schedule), row) for seed, row in zip(seeds, known, strict=True)
        ]

    def step(self, variant: str, rows: "Rows", at: Sequence[int]) -> "Rows":
        """One step of rows that stand at the steps `at`."""
        latents = torch.stack([latents for latents, _ in rows])
        known = [row for _, row in rows]
        out = self.pipeline.denoise(self.unet, [self._schedule(variant)] * len(at), latents, at, known)
        return list(zip(out, known, strict=True))

    def draw(self, variant: str, prompts: Sequence[str], seeds: Sequence[int], pixels: int) -> Tensor:
        """Pictures (B, H, W, 3) uint8 on the host, all rows step by step together."""
        self.use(variant)
        return _whole(self.pipeline.draw(self.unet, self._schedule(variant), prompts, seeds, pixels, pixels))

    def decode(self, rows: "Rows") -> Tensor:
        """Their pictures."""
        self.synchronize()
        return _whole(self.pipeline.decode([latents for latents, _ in rows]))

    def encode_anew(self, prompts: Sequence[str]) -> None:
        """Encode prompts that may be known."""
        self.pipeline.prompts.forget()
        self.pipeline.prompts.encode(prompts)

    def _schedule(self, variant: str) -> Schedule:
        return self.registry.schedule(variant, self.rig.family.variants[variant].steps[0])


Rows = list[tuple[Tensor, Conditioning]]


def _whole(drawn: tuple[Tensor, Tensor]) -> Tensor:
    """The pictures. Raises ArithmeticError where one is blank or undefined."""
    pictures, valid = drawn
    if not valid.all():
        raise ArithmeticError("a picture is blank or undefined")
    return pictures
