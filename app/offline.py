"""The commands that need the model but no server."""

import math
import os
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec

from app.engine.load import CANNOT_OPEN, open_model
from app.engine.work import look
from app.errors import Problem
from app.images import MEDIA_TYPES, encode
from app.order import Limits, Order, resolve
from app.settings import EngineSettings
from app.uploads import keep
from models.catalog import Family, one_of
from models.weights import BadWeights, MissingWeights, WeightStore

LIMITS = Limits(timeout_s=math.inf, max_timeout_s=math.inf, max_pixels=1 << 60)  # whoever calls this has the machine


def draw(settings: EngineSettings, order: Order, output: Path) -> int:
    """The picture of an order into `output`; returns its seed. Exits with a sentence where that is impossible."""
    kind = output.suffix.lower().removeprefix(".").replace("jpg", "jpeg")
    if kind not in MEDIA_TYPES:
        sys.exit(f"{output}: the name must end in .png, .jpeg or .webp")
    if output.is_dir() or not os.access(output if output.exists() else output.parent, os.W_OK):
        sys.exit(f"{output} cannot be written: its folder must be there, and writable")
    try:
        model = open_model(msgspec.structs.replace(settings.engine_config(), preload=[]), workers=1)
        (job,) = resolve(order, model.family, LIMITS, now=0.0)
        model.registry.load(job.weights)
    except (Problem, *CANNOT_OPEN) as error:
        sys.exit(str(error))
    variant = job.weights.variant
    unet, schedule = model.registry.use(job.weights), model.registry.schedule(variant, job.steps)
    size, guide = (job.height, job.width), (job.negative_prompt, job.guidance)
    try:
        over = (look(model.pipeline, job, order.source), job.strength) if order.source and job.strength else ()
        pixels, valid = model.pipeline.draw(unet, schedule, [job.prompt], [job.seed], *size, *guide, *over)
    except Exception as error:
        sys.exit(f"no picture could be drawn: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
    if not valid.all():
        sys.exit(f"no picture was written: {variant} made a blank or undefined picture; try another seed or variant")
    parameters = {"Steps": job.steps, "Seed": job.seed, "Model": f"sdxl-lightning-{variant}"}
    if job.strength is not None:
        parameters["Denoising strength"] = job.strength
    drawn = pixels[0].numpy().tobytes()
    if order.image and order.mask:
        drawn = keep(drawn, order.image, order.mask)
    try:
        output.write_bytes(encode(drawn, job.width, job.height, kind, 90, parameters))
    except OSError as error:
        sys.exit(f"{output} cannot be written: {error.strerror}")
    return job.seed


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
