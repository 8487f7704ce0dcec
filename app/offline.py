"""`generate`: a picture without a server."""

import math
import sys
from pathlib import Path

import msgspec

from app.engine.load import CANNOT_OPEN, open_model
from app.engine.work import look
from app.errors import Problem
from app.images import encode
from app.order import Limits, Order, resolve
from app.settings import EngineSettings
from app.uploads import keep

LIMITS = Limits(timeout_s=math.inf, max_timeout_s=math.inf, max_pixels=1 << 60)  # whoever calls this has the machine


def draw(settings: EngineSettings, order: Order, output: Path, kind: str) -> int:
    """The picture of an order into `output`, of this kind; returns its seed. Exits with a sentence where that is
    impossible."""
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
