"""An Order is what any API asks for; resolve() turns it into jobs for the engine, or refuses it by the field's name."""

import hashlib
import secrets
import unicodedata
from dataclasses import dataclass

from app import errors
from app.engine.jobs import Job, new_id
from app.errors import Problem
from models.catalog import Family, Variant, Weights, one_of

SEED_LIMIT = 2**32
PROMPT_LIMIT = 2000  # characters
UNSEEN = ("Zs", "Zl", "Zp", "Cc", "Cf")  # Unicode's separators, controls and format characters
BLANK = "\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0"  # letters and marks that are drawn as nothing


def is_blank(prompt: str) -> bool:
    """Whether nothing of a prompt can be seen."""
    return all(char in BLANK or "\ufe00" <= char <= "\ufe0f" or unicodedata.category(char) in UNSEEN for char in prompt)


@dataclass(frozen=True)
class Order:
    """One request for n pictures. None: left to us.

    owner: who asks, so that the same order from somebody else is another one. width, height: pixels. timeout: seconds
    after which the pictures are of no use. Picture k of n has seed + k.
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
    timeout: float | None = None

    @property
    def fingerprint(self) -> str:
        """The same when the same owner sends the same order again: how a promise of Retry-After is recognised."""
        return hashlib.sha256(repr(self).encode(errors="surrogatepass")).hexdigest()


@dataclass(frozen=True)
class Limits:
    """What one order may ask of this server. Seconds; pixels of all its pictures together."""

    timeout_s: float
    max_timeout_s: float
    max_pixels: int


def resolve(order: Order, family: Family, limits: Limits, now: float) -> list[Job]:
    """One job per picture, all with one deadline. now: when the order arrived, on the monotonic clock.
    Raises Problem for what the family does not draw or the server does not allow."""
    variant, steps = _variant(order, family)
    width, height = order.width or family.size.default, order.height or family.size.default
    for side, pixels in (("width", width), ("height", height)):
        if refusal := family.size.refusal(side, pixels):
            raise Problem(errors.INVALID, refusal, side)
    if order.n * width * height > limits.max_pixels:
        detail = f"n x width x height must be at most {limits.max_pixels} pixels on this server"
        raise Problem(errors.INVALID, detail, "n" if order.n > 1 else "width")
    if order.timeout is not None and order.timeout > limits.max_timeout_s:
        raise Problem(errors.INVALID, f"timeout must be at most {limits.max_timeout_s:g} s on this server", "timeout")
    if order.guidance is not None and order.guidance not in (0, 1):
        raise Problem(errors.INVALID, f"guidance must be 0 or absent: {variant.name} draws without it", "guidance")
    if order.negative_prompt:
        raise Problem(errors.INVALID, "negative_prompt acts through guidance, which is off", "negative_prompt")
    if order.styles:
        raise Problem(errors.INVALID, f"there is no style {order.styles[0][0]}", "loras")
    weights = Weights(variant.name, order.styles)
    seed = secrets.randbelow(SEED_LIMIT - order.n + 1) if order.seed is None else order.seed
    deadline = now + (limits.timeout_s if order.timeout is None else order.timeout)
    drawn = (height, width, deadline, order.owner)
    return [Job(new_id(), order.prompt, weights, steps, seed + k, *drawn) for k in range(order.n)]


def _variant(order: Order, family: Family) -> tuple[Variant, int]:
    """The weights and the steps an order means: by name, or the first that declare its steps, or the default."""
    variants = list(family.variants.values())
    if order.variant is not None or order.steps is None:
        variants = [each for each in variants if each.name == (order.variant or family.default)]
        if not variants:
            raise Problem(errors.INVALID, f"variant must be one of {', '.join(family.variants)}", "variant")
    if order.steps is None:
        return variants[0], variants[0].steps[0]
    for variant in variants:
        if order.steps in variant.steps:
            return variant, order.steps
    who = order.variant or "this model"
    allowed = one_of({steps for each in variants for steps in each.steps})
    raise Problem(errors.INVALID, f"{who} draws in {allowed} steps, not {order.steps}", "steps")
