"""The commands that need the model but no server."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec

from app.engine.load import CANNOT_OPEN, open_model
from app.images import MEDIA_TYPES, encode
from app.settings import EngineSettings
from models.catalog import Family, Weights, one_of
from models.weights import BadWeights, MissingWeights, WeightStore


def draw(settings: EngineSettings, prompt: str, variant: str, seed: int, output: Path) -> None:
    """One picture of `prompt` into `output`. Exits with a sentence where that is impossible."""
    kind = output.suffix.lower().removeprefix(".").replace("jpg", "jpeg")
    if kind not in MEDIA_TYPES:
        sys.exit(f"{output}: the name must end in .png, .jpeg or .webp")
    if output.is_dir() or not os.access(output if output.exists() else output.parent, os.W_OK):
        sys.exit(f"{output} cannot be written: its folder must be there, and writable")
    try:
        model = open_model(msgspec.structs.replace(settings.engine_config(), preload=[variant]), workers=1)
    except CANNOT_OPEN as error:
        sys.exit(str(error))
    steps, side = model.family.variants[variant].steps[0], model.family.size.default
    unet, schedule = model.registry.use(Weights(variant)), model.registry.schedule(variant, steps)
    try:
        pixels, valid = model.pipeline.draw(unet, schedule, [prompt], [seed], side, side)
    except Exception as error:
        sys.exit(f"no picture could be drawn: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
    if not valid.all():
        sys.exit(f"no picture was written: {variant} made a blank or undefined picture; try another seed or variant")
    parameters = {"Steps": steps, "Seed": seed, "Model": f"sdxl-lightning-{variant}"}
    try:
        output.write_bytes(encode(pixels[0].numpy().tobytes(), side, side, kind, 90, parameters))
    except OSError as error:
        sys.exit(f"{output} cannot be written: {error.strerror}")


def list_variants(settings: EngineSettings, family: Family) -> None:
    """Print every variant, its steps, and whether its file is here."""
    here = WeightStore(family, settings.model_dir).variants_here()
    for variant in family.variants.values():
        where = "here" if variant.name in here else "not here"
        print(f"{variant.name}  {one_of(variant.steps)} steps  {where}  {variant.file or 'its own UNet'}")


def weight_files(settings: EngineSettings, family: Family, names: list[str], fetch: bool) -> bool:
    """Fetch (where asked) and verify the base and the named variants; prints a line each. False if any is not right."""
    store = WeightStore(family, settings.model_dir)
    right = True
    for name in (*family.components, *names):
        right &= _report(name, lambda: store.verify(name, download=fetch))  # noqa: B023
    return right


def _report(name: str, check: Callable[[], str]) -> bool:
    try:
        print(f"{name}: {check()}")
    except (MissingWeights, BadWeights, OSError) as error:
        print(f"{name}: {error}")
        return False
    return True
