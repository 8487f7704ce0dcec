"""python -m bench.previews: fit the map of a family's latents to colours (models/catalog.toml), and say how far its
previews are from full decodes, and what they cost a step. MODEL, MODEL_DIR and DEVICE as for the server."""

import json
import statistics
import time

import torch
from torch import Tensor

from app.engine.load import Model, open_model
from app.settings import EngineSettings
from models.catalog import HERE, Weights
from models.preview import clean_latents, to_rgb

VARIANTS = ("2step-unet", "4step-unet", "8step-unet")
PROMPTS, EACH, HELD_OUT = 60, 4, 20  # prompts, pictures of each; prompts that only the error is taken from
REPEATS = 200


def main() -> None:
    """Fit, and print all of it as JSON."""
    model = open_model(EngineSettings().engine_config(), workers=1)
    prompts = _prompts()
    colours = _fit(*_seen(model, prompts[HELD_OUT:], "4step-unet")[:2])
    found = {"preview": colours.double().round(decimals=1).tolist()}
    for variant in VARIANTS:
        latents, pictures, steps = _seen(model, prompts[:HELD_OUT], variant)
        error = (to_rgb(latents, colours).float() - pictures).abs().mean(dim=(1, 2, 3))
        found[variant] = [round(error[steps == step].mean().item(), 1) for step in steps.unique()]
    print(json.dumps({**found, "cost": _cost(model)}, indent=1))


def _prompts() -> list[str]:
    """What the embedded model knows; SDXL knows it, too."""
    words = json.loads((HERE / "embedded" / "vocabulary.json").read_text())
    objects, backgrounds = [each["name"] for each in words["objects"]], list(words["backgrounds"])
    step = len(objects) // PROMPTS
    return [f"a {objects[k * step]} on a {backgrounds[k % len(backgrounds)]} background" for k in range(PROMPTS)]


def _seen(model: Model, prompts: list[str], variant: str) -> tuple[Tensor, Tensor, Tensor]:
    """What each step but the last takes for the clean latents (N, 4, h, w), its full decode with 8 x 8 pixels averaged
    (N, h, w, 3), and which step it is (N,), from 1."""
    pipeline, registry = model.pipeline, model.registry
    registry.load(Weights(variant))
    unet, schedule = registry.use(Weights(variant)), registry.schedule(variant, model.family.variants[variant].steps[0])
    side, latents, pictures, numbers = model.family.size.default, list[Tensor](), list[Tensor](), list[int]()
    for number, prompt in enumerate(prompts):
        rows = [pipeline.project(unet, row) for row in pipeline.prompts.encode([prompt] * EACH)]
        before = torch.stack([pipeline.noise(EACH * number + k, side, side, schedule) for k in range(EACH)])
        for step in range(len(schedule.timesteps) - 1):
            after = pipeline.denoise(unet, [schedule] * EACH, before, [step] * EACH, rows)
            sigma, sigma_next = schedule.sigmas[step : step + 2].unsqueeze(1)
            clean = clean_latents(before, after, sigma, sigma_next)
            pixels = pipeline.decode(list(clean))[0].float()
            pictures.append(torch.nn.functional.avg_pool2d(pixels.permute(0, 3, 1, 2), 8).permute(0, 2, 3, 1))
            latents.append(clean.cpu())
            numbers += [step + 1] * EACH
            before = after
    return torch.cat(latents), torch.cat(pictures), torch.tensor(numbers)


def _fit(latents: Tensor, pictures: Tensor) -> Tensor:
    """The (5, 3) colours with the least square error."""
    channels = latents.permute(0, 2, 3, 1).reshape(-1, latents.shape[1])
    ones = torch.ones(len(channels), 1)
    colours: Tensor = torch.linalg.lstsq(torch.cat([channels, ones], dim=1), pictures.reshape(-1, 3)).solution
    return colours


def _cost(model: Model) -> dict[str, float]:
    """Milliseconds of a step, and of a preview after it, in turns: one row, medians."""
    pipeline, registry = model.pipeline, model.registry
    unet, schedule = registry.use(Weights("4step-unet")), registry.schedule("4step-unet", 4)
    side = model.family.size.default
    rows = [pipeline.project(unet, row) for row in pipeline.prompts.encode(["a red apple"])]
    before = pipeline.noise(0, side, side, schedule).unsqueeze(0)
    times: dict[str, list[float]] = {"step": [], "preview": []}
    for _ in range(REPEATS):
        start = time.perf_counter()
        after = pipeline.denoise(unet, [schedule], before, [0], rows)
        pipeline.device.wait()
        stepped = time.perf_counter()
        pipeline.preview([schedule], before, after, [0])
        times["step"].append(stepped - start)
        times["preview"].append(time.perf_counter() - stepped)
    return {name: round(statistics.median(each) * 1000, 3) for name, each in times.items()}


if __name__ == "__main__":
    main()
