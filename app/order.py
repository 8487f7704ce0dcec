"""An Order is what any API asks for; resolve() turns it into jobs for the engine, or refuses it by the field's name."""

import secrets
import unicodedata
from dataclasses import dataclass

from app import errors
from app.engine.jobs import Job, new_id
from app.errors import Problem
from models.catalog import Family, Guidance, Variant, Weights

DEFAULT_STEPS = 4
SEED_LIMIT = 2**32
PROMPT_LIMIT = 2000  # characters; the text encoders take fewer
UNSEEN = ("Zs", "Zl", "Zp", "Cc", "Cf")  # Unicode's separators, controls and format characters
BLANK = "\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0"  # letters and marks that are drawn as nothing


def is_blank(prompt: str) -> bool:
    """Whether nothing of a prompt, as far as it is read, can be seen."""
    read = prompt[:PROMPT_LIMIT]
    return all(char in BLANK or "\ufe00" <= char <= "\ufe0f" or unicodedata.category(char) in UNSEEN for char in read)


@dataclass(frozen=True)
class Order:
    """One request for n pictures. None: left to us.

    guidance: 0 and 1 mean without. negative_prompt: None is the absent one, which is not the empty one.
    owner: who asks, so that the same order from somebody else is another one. prompt: cut behind PROMPT_LIMIT. width,
    height: pixels; fit: where they cannot be drawn, the nearest that can. timeout: seconds after which the pictures are
    of no use. Picture k of n has seed + k.
    """

    owner: str
    prompt: str
    variant: str | None = None
    styles: tuple[tuple[str, float], ...] = ()
    negative_prompt: str | None = None
    guidance: float | None = None
    steps: int | None = None
    seed: int | None = None
    n: int = 1
    width: int | None = None
    height: int | None = None
    fit: bool = False
    timeout: float | None = None


@dataclass(frozen=True)
class Limits:
    """What one order may ask of this server. Seconds; pixels of all its pictures together."""

    timeout_s: float
    max_timeout_s: float
    max_pixels: int


def resolve(order: Order, family: Family, limits: Limits, now: float) -> list[Job]:
    """One job per picture, all with one deadline. now: when the order arrived, on the monotonic clock.
    Raises Problem for what the family does not draw or the server does not allow."""
    variant = _variant(order, family)
    width, height = order.width or family.size.default, order.height or family.size.default
    if order.fit:
        width, height = family.size.nearest(width, height)
    for side, pixels in (("width", width), ("height", height)):
        if refusal := family.size.refusal(side, pixels):
            raise Problem(errors.INVALID, refusal, side)
    if order.n * width * height > limits.max_pixels:
        detail = f"n x width x height must be at most {limits.max_pixels} pixels on this server"
        raise Problem(errors.INVALID, detail, "n" if order.n > 1 else "width")
    if order.timeout is not None and order.timeout > limits.max_timeout_s:
        raise Problem(errors.INVALID, f"timeout must be at most {limits.max_timeout_s:g} s on this server", "timeout")
    guidance = _guidance(order, variant)
    if order.styles:
        raise Problem(errors.INVALID, f"there is no style {order.styles[0][0]}", "loras")
    weights = Weights(variant.name, order.styles)
    if order.seed is not None and order.seed + order.n > SEED_LIMIT:
        detail = f"seed must be at most {SEED_LIMIT - order.n} for n = {order.n}, as picture k has seed + k"
        raise Problem(errors.INVALID, detail, "seed")
    seed = secrets.randbelow(SEED_LIMIT - order.n + 1) if order.seed is None else order.seed
    deadline = now + (limits.timeout_s if order.timeout is None else order.timeout)
    away = order.negative_prompt and order.negative_prompt[:PROMPT_LIMIT]
    prompt, drawn = order.prompt[:PROMPT_LIMIT], (height, width, deadline, order.owner, away, guidance)
    return [Job(new_id(), prompt, weights, variant.steps, seed + k, *drawn) for k in range(order.n)]


def _variant(order: Order, family: Family) -> Variant:
    """The weights an order means: by name, or the UNet of its step count."""
    name = order.variant or f"{order.steps or DEFAULT_STEPS}step-unet"
    variant = family.variants.get(name)
    if variant is None and order.variant is None:
        counts = sorted({each.steps for each in family.variants.values()})
        detail = f"there are weights for {', '.join(map(str, counts))} steps, not {order.steps}"
        raise Problem(errors.INVALID, detail, "steps")
    if variant is None:
        raise Problem(errors.INVALID, f"variant must be one of {', '.join(family.variants)}", "variant")
    if order.steps is not None and order.steps != variant.steps:
        detail = f"{name} draws in {variant.steps} steps, not {order.steps}; leave steps out"
        raise Problem(errors.INVALID, detail, "steps")
    return variant


def _guidance(order: Order, variant: Variant) -> float:
    """The scale that an order means, 1 for none: within what the variant's maker declared."""
    allowed = variant.guidance or Guidance(1.0, 1.0, 1.0)
    scale = order.guidance or (allowed.default if order.guidance is None else 1.0)
    without = f"{variant.name} is distilled to run without guidance"
    if not allowed.minimum <= scale <= allowed.maximum:
        between = f"from {allowed.minimum:g} to {allowed.maximum:g} with {variant.name}, not {order.guidance:g}"
        detail = f"must be {between}" if variant.guidance else f"must be 0, 1 or absent: {without}"
        raise Problem(errors.INVALID, f"guidance_scale {detail}", "guidance_scale")
    if order.negative_prompt and scale <= 1:
        how = f"set guidance_scale above 1, to {allowed.maximum:g} at the most" if allowed.maximum > 1 else without
        detail = f"negative_prompt acts through guidance: {how}"
        raise Problem(errors.INVALID, detail, "negative_prompt")
    return scale
