"""Our engine without HTTP, queue or messages: models/ Pipeline and Registry, called directly, in a process of its own.

Reads one JSON request a line; answers each with the milliseconds from prompt to PNG bytes.
"""

import json
import sys
import time

import torch

from app import images
from app.engine.messages import FromEngine
from app.engine.worker import build_loop
from app.settings import EngineSettings
from models.pipeline import Pipeline
from models.registry import Registry


class Nowhere:
    """Takes the place of the wire."""

    def send(self, message: FromEngine) -> None:
        """Forget it."""


def draw(pipeline: Pipeline, registry: Registry, prompt: str, variant: str, seed: int) -> bytes:
    """One picture, start to end, with nothing around it."""
    unet, schedule = registry.use(variant), registry.schedules[variant]
    side = registry.store.family.size.default
    conditioning = pipeline.encode([prompt])
    latents = pipeline.noise(seed, side, side, schedule)[None]
    for step in range(len(schedule.timesteps)):
        latents = pipeline.denoise(unet, schedule, latents, torch.tensor([step]), conditioning)
    pixels, _ = pipeline.decode(list(latents))
    return images.encode(pixels[0].numpy().tobytes(), side, side, "png", 90, {"seed": seed})


def main() -> None:
    """Warm up as the server does, say so, and serve the standard input."""
    loop, _ = build_loop(EngineSettings().engine_config(), Nowhere())  # type: ignore[arg-type]
    print(json.dumps({"compiled": loop.compiled}), flush=True)
    for line in sys.stdin:
        ask = json.loads(line)
        start = time.perf_counter()
        draw(loop.pipeline, loop.registry, ask["prompt"], f"{ask['steps']}step-unet", ask["seed"])
        print(1e3 * (time.perf_counter() - start), flush=True)


if __name__ == "__main__":
    main()
