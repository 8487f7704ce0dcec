"""The commands that need the model but no server."""

import sys
from collections.abc import Callable
from pathlib import Path

import torch

from app.engine.worker import choose_dtype, choose_family
from app.images import MEDIA_TYPES, encode
from app.settings import EngineSettings
from models.catalog import Family
from models.pipeline import Pipeline
from models.registry import Registry, Tier
from models.weights import BadWeights, MissingWeights, WeightStore


def draw(settings: EngineSettings, prompt: str, variant: str, seed: int, output: Path) -> None:
    """One picture of `prompt` into `output`. Exits with a sentence where that is impossible."""
    kind = output.suffix.removeprefix(".").replace("jpg", "jpeg")
    if kind not in MEDIA_TYPES:
        sys.exit(f"{output}: the name must end in .png, .jpeg or .webp")
    config = settings.engine_config()
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    family = choose_family(config, device)
    if variant not in family.variants:
        sys.exit(f"no such variant: {variant}; there are {', '.join(family.variants)}")
    store = WeightStore(family, settings.model_dir)
    try:
        pipeline = Pipeline(store, device, choose_dtype(config, device))
        registry = Registry(store, device, pipeline.dtype, [Tier(device, 1 << 62)])
        registry.load(variant)
    except (MissingWeights, BadWeights) as error:
        sys.exit(str(error))
    unet, schedule = registry.use(variant), registry.schedules[variant]
    side = family.size.default
    latents = pipeline.noise(seed, side, side, schedule)[None]
    conditioning = pipeline.encode([prompt])
    for step in range(family.variants[variant].steps):
        latents = pipeline.denoise(unet, schedule, latents, torch.tensor([step], device=device), conditioning)
    pipeline.synchronize()
    pixels, _ = pipeline.decode(list(latents))
    parameters = {"Steps": family.variants[variant].steps, "Seed": seed, "Model": f"sdxl-lightning-{variant}"}
    output.write_bytes(encode(pixels[0].numpy().tobytes(), side, side, kind, 90, parameters))


def list_variants(settings: EngineSettings, family: Family) -> None:
    """Print every variant, its steps, and whether its file is here."""
    here = WeightStore(family, settings.model_dir).variants_here()
    for variant in family.variants.values():
        print(
            f"{variant.name}  {variant.steps} steps  {'here' if variant.name in here else 'not here'}  {variant.file}"
        )


def weight_files(settings: EngineSettings, family: Family, names: list[str], fetch: bool) -> bool:
    """Fetch (where asked) and verify the base and the named variants; prints a line each. False if any is not right."""
    store = WeightStore(family, settings.model_dir)
    right = True
    for part in family.components:
        right &= _report(part, lambda: store.component_folder(part, download=fetch))  # noqa: B023
    for name in names:
        right &= _report(name, lambda: store.verify(name, download=fetch))  # noqa: B023
    return right


def _report(name: str, check: Callable[[], object]) -> bool:
    try:
        check()
    except (MissingWeights, BadWeights) as error:
        print(f"{name}: {error}")
        return False
    print(f"{name}: right")
    return True
