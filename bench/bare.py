"""Our engine without HTTP, queue or messages: models/ Pipeline and Registry, called directly, in a process of its own.

Reads one JSON request per line; answers each with the milliseconds from prompt to PNG bytes.
"""

import json
import sys
import time

from app import images
from app.engine.load import Model, open_model
from app.settings import EngineSettings
from models.catalog import Weights


def draw(model: Model, prompt: str, steps: int, seed: int) -> bytes:
    """One picture, start to end, with nothing around it."""
    variant, side = f"{steps}step-unet", model.family.size.default
    unet, schedule = model.registry.use(Weights(variant)), model.registry.schedule(variant, steps)
    pixels, _ = model.pipeline.draw(unet, schedule, [prompt], [seed], side, side)
    return images.encode(pixels[0].numpy().tobytes(), side, side, "png", 90, {"seed": seed})


def main() -> None:
    """Warm up as the server does, say so, and serve the standard input."""
    config = EngineSettings().engine_config()
    model = open_model(config)
    model.measure(model.batches[: model.device.first_batches])
    model.device.finish(model.registry)
    print("ready", flush=True)
    for line in sys.stdin:
        ask = json.loads(line)
        start = time.perf_counter()
        draw(model, ask["prompt"], ask["steps"], ask["seed"])
        print(1e3 * (time.perf_counter() - start), flush=True)


if __name__ == "__main__":
    main()
