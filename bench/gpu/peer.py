"""diffusers' own pipeline on the rig: the oracle of `check` and the peer of `stages`."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from bench.gpu.rig import Rig
from bench.gpu.timing import VARIANT
from bench.painter import call, png, quietly_open, scheduler
from bench.work import prompts


class Peer:
    """StableDiffusionXLPipeline as SDXL-Lightning's model card sets it up, in channels_last and without a progress bar;
    one for all variants: its UNet is given their weights. It draws in a thread of its own, on the stream that torch
    gives to anybody: cuDNN remembers by thread what it has tuned."""

    def __init__(self, rig: Rig) -> None:
        self.rig, self.variant = rig, ""
        self._thread = ThreadPoolExecutor(1, "diffusers")
        self.pipeline: Any = quietly_open(rig.directory, rig.dtype).to(rig.device)
        for part in (self.pipeline.unet, self.pipeline.vae):
            part.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        if rig.device == "cuda":
            torch.cuda.synchronize()

    def use(self, variant: str) -> None:
        """Load a variant's weights and set its schedule."""
        self._thread.submit(self._use, variant).result()

    def _use(self, variant: str) -> None:
        row = self.rig.family.variants[variant]
        if variant == self.variant:
            return  # a scheduler's tables are not to be made anew within the time of a picture
        self.pipeline.unet.load_state_dict(load_file(self.rig.directory / row.file, device=self.rig.device))
        self.pipeline.scheduler = scheduler(self.pipeline, row)
        self.variant = variant

    def draw(self, variant: str, prompts: Sequence[str], seeds: Sequence[int], pixels: int) -> Tensor:
        """Pictures (B, H, W, 3) uint8 on the host, from our noise: float32 from a CPU generator, then in its dtype."""
        return self._thread.submit(self._draw, variant, prompts, seeds, pixels).result()

    def draw_files(self, variant: str, batch: int, pixels: int) -> list[bytes]:
        """A batch of PNGs, by the encoder that we use."""
        images = self.draw(variant, prompts()[:batch], range(batch), pixels)
        return [png(image) for image in images]

    def compile(self) -> None:
        """Its UNet and its decoder, as diffusers' documentation has it; on a CPU they are traced alone."""
        self.use(VARIANT)  # before its UNet is wrapped
        backend = "inductor" if self.rig.device == "cuda" else "eager"
        whole = partial(torch.compile, fullgraph=True, dynamic=False, backend=backend)
        self.pipeline.unet, self.pipeline.vae.decode = whole(self.pipeline.unet), whole(self.pipeline.vae.decode)

    @torch.inference_mode()
    def _draw(self, variant: str, prompts: Sequence[str], seeds: Sequence[int], pixels: int) -> Tensor:
        self._use(variant)
        torch.backends.cudnn.benchmark = True  # ours has it on only while it records, and with fewer trials
        torch.backends.cudnn.benchmark_limit = 10  # torch's own
        side = pixels // 8
        noise = [torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        latents = torch.cat(noise).to(self.rig.device, self.rig.dtype)
        steps = self.rig.family.variants[variant].steps[0]
        return call(self.pipeline, list(prompts), steps, height=pixels, width=pixels, latents=latents)
