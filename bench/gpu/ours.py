"""Our models/ on the rig, called directly, set up as the engine sets it up (app.engine.cuda)."""

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from app.engine import cuda
from bench.gpu.rig import Rig
from models.graphs import Graphed, by_calling
from models.pipeline import Conditioning, Pipeline, advance
from models.registry import Registry, Tier
from models.weights import WeightStore


class Ours:
    """Pipeline and registry with graphs; on a CPU their stand-ins, so that the tiny rig goes the same way."""

    def __init__(self, rig: Rig, cache: Path, in_fp8: bool = False) -> None:
        self.rig, self.on_gpu = rig, rig.device == "cuda"
        if self.on_gpu:
            cuda.set_up(cache)
        start = time.perf_counter()
        store = WeightStore(rig.family, rig.directory)
        self.pipeline = Pipeline(store, rig.device, rig.dtype)
        self.registry = Registry(store, rig.device, rig.dtype, [Tier(rig.device, 1 << 62)])
        self.registry.static = True
        self.registry.in_fp8 = in_fp8
        self.registry.load("4step-unet")
        self.unet = self.registry.use("4step-unet")
        self.synchronize()
        self.load_s = time.perf_counter() - start
        if self.on_gpu:
            cuda.prepare(self.pipeline, self.registry)
        else:
            self.pipeline.text = Graphed(self.pipeline.text, by_calling)
            self.pipeline.decoder = Graphed(self.pipeline.decoder, by_calling, cuda.DECODED)
            self.pipeline.steps[self.unet] = Graphed(partial(advance, self.unet), by_calling)
        self.steps = self.pipeline.steps[self.unet]

    def synchronize(self) -> None:
        """Wait for the device."""
        self.pipeline.synchronize()

    def use(self, variant: str) -> None:
        """Load it if need be, and make it the active one."""
        self.registry.load(variant)
        self.registry.use(variant)

    def start(self, variant: str, prompts: Sequence[str], seeds: Sequence[int], pixels: int) -> "Rows":
        """Rows before their first step: encoded, projected, with their noise."""
        self.use(variant)
        schedule = self.registry.schedules[variant]
        known = [self.pipeline.project(self.unet, row) for row in self.pipeline.encode(prompts)]
        return [
            (self.pipeline.noise(seed, pixels, pixels, schedule), row) for seed, row in zip(seeds, known, strict=True)
        ]

    def step(self, variant: str, rows: "Rows", at: Sequence[int]) -> "Rows":
        """One step of rows that stand at the steps `at`."""
        latents = torch.stack([latents for latents, _ in rows])
        where = self.pipeline.to_device(torch.tensor(at))
        known = [row for _, row in rows]
        out = self.pipeline.denoise(self.unet, self.registry.schedules[variant], latents, where, known)
        return list(zip(out, known, strict=True))

    def draw(self, variant: str, prompts: Sequence[str], seeds: Sequence[int], pixels: int) -> Tensor:
        """Pictures (B, H, W, 3) uint8 on the host, all rows step by step together."""
        rows = self.start(variant, prompts, seeds, pixels)
        for step in range(self.rig.family.variants[variant].steps):
            rows = self.step(variant, rows, [step] * len(rows))
        return self.decode(rows)

    def decode(self, rows: "Rows") -> Tensor:
        """Their pictures. Raises ArithmeticError where one is blank or undefined."""
        self.synchronize()
        pictures, sound = self.pipeline.decode([latents for latents, _ in rows])
        if not sound.all():
            raise ArithmeticError("a picture is blank or undefined")
        return pictures

    def encode_anew(self, prompts: Sequence[str]) -> None:
        """Encode prompts that may be known."""
        self.forget_prompts()
        self.pipeline.encode(prompts)

    def forget_prompts(self) -> None:
        """So that the next call encodes them anew."""
        self.pipeline._prompts.clear()


Rows = list[tuple[Tensor, Conditioning]]
