"""An Order is what any API asks for; resolve() turns it into jobs for the engine, or refuses it by the field's name."""

import re
import secrets
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from app import errors
from app.engine.jobs import Job, Source, new_id
from app.errors import Problem
from app.uploads import Bitmap
from models.catalog import Family, Guidance, Style, Variant, Weights, one_of
from models.grid import snap, spelled
from models.styles import StyleFile

STRENGTH, STRENGTH_OF_A_MASK = 0.75, 1.0  # where none is given
MOST_STYLES = 4
MOST_NAMED = 50  # of the styles there are, in a refusal
SEED_LIMIT = 2**32
PROMPT_LIMIT = 2000  # characters; the text encoders take fewer
UNSEEN = ("Zs", "Zl", "Zp", "Cc", "Cf")  # Unicode's separators, controls and format characters
IGNORED = re.compile(  # the rest of Unicode's Default_Ignorable_Code_Point; and Braille's and music's empty signs
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2065\u3164\ufe00-\ufe0f\uffa0\ufff0-\ufff8\U000e0000-\U000e0fff"
    "\u2800\U0001d159]"
)


def is_blank(prompt: str) -> bool:
    """Whether nothing of a prompt, as far as it is read, can be seen."""
    return all(unicodedata.category(char) in UNSEEN for char in IGNORED.sub("", prompt[:PROMPT_LIMIT]))


@dataclass(frozen=True)
class Order:
    """One request for n pictures. None: left to us.

    guidance: 0 and 1 mean without. negative_prompt: None is the absent one, which is not the empty one.
    owner: who asks, so that the same order from somebody else is another one. prompt: cut behind PROMPT_LIMIT. width,
    height: pixels; fit: where they cannot be drawn, the nearest that can. timeout: seconds after which the pictures are
    of no use. image: what they draw over. mask: of the image, 255 where it is drawn anew. strength: above 0, to 1.
    Picture k of n has seed + k. previews: show them while they are drawn. styles: by name how much of each.
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
    previews: bool = False
    image: Bitmap | None = None
    mask: Bitmap | None = None
    strength: float | None = None

    @property
    def source(self) -> Source | None:
        """What the engine is told of image and mask."""
        if self.image is None:
            return None
        return Source(self.image.pixels, self.mask.pixels if self.mask else b"")


@dataclass(frozen=True)
class Limits:
    """What one order may ask of this server. Seconds; pixels of all its pictures together."""

    timeout_s: float
    max_timeout_s: float
    max_pixels: int


def resolve(
    order: Order, family: Family, limits: Limits, now: float, styles: Mapping[str, StyleFile] = MappingProxyType({})
) -> list[Job]:
    """One job per picture, all with one deadline. now: when the order arrived, on the monotonic clock. styles: those
    that there are, by name. Raises Problem for what the family does not draw or the server does not allow."""
    variant, steps = _variant(order, family)
    width, height = _size(order, family)
    strength = _strength(order, variant, steps)
    if order.n * width * height > limits.max_pixels:
        detail = f"n x width x height must be at most {limits.max_pixels} pixels on this server"
        raise Problem(errors.INVALID, detail, "n" if order.n > 1 else "width")
    if order.timeout is not None and order.timeout > limits.max_timeout_s:
        raise Problem(errors.INVALID, f"timeout must be at most {limits.max_timeout_s:g} s on this server", "timeout")
    guidance = _guidance(order, variant)
    weights = Weights(variant.name, _styles(order, styles))
    if order.seed is not None and order.seed + order.n > SEED_LIMIT:
        detail = f"seed must be at most {SEED_LIMIT - order.n} for n = {order.n}, as picture k has seed + k"
        raise Problem(errors.INVALID, detail, "seed")
    seed = secrets.randbelow(SEED_LIMIT - order.n + 1) if order.seed is None else order.seed
    deadline = now + (limits.timeout_s if order.timeout is None else order.timeout)
    ids = [new_id() for _ in range(order.n)]
    away = order.negative_prompt and order.negative_prompt[:PROMPT_LIMIT]
    over = (strength, None if strength is None else ids[0])
    prompt, drawn = (
        order.prompt[:PROMPT_LIMIT],
        (height, width, deadline, order.owner, away, guidance, *over, order.previews),
    )
    return [Job(id, prompt, weights, steps, seed + k, *drawn) for k, id in enumerate(ids)]


def _size(order: Order, family: Family) -> tuple[int, int]:
    """Width and height of what is drawn: as asked, else the image's, else the family's own."""
    own = (family.size.default,) * 2 if order.image is None else (order.image.width, order.image.height)
    width, height = order.width or own[0], order.height or own[1]
    if order.fit:
        width, height = family.size.nearest(width, height)
    for side, pixels, asked in (("width", width, order.width), ("height", height, order.height)):
        if refusal := family.size.refusal(side, pixels):
            raise Problem(errors.INVALID, refusal, side if asked or order.image is None else "image")
    for field, given in (("image", order.image), ("mask", order.mask)):
        if given is not None and (given.width, given.height) != (width, height):
            detail = f"{field} has {given.width} x {given.height} pixels, and {width} x {height} are drawn"
            raise Problem(errors.INVALID, detail, field)
    if order.mask is not None and not _is_seen(order.mask, family.size.multiple):
        detail = f"mask has too little white: the model looks at one pixel in {family.size.multiple} each way"
        raise Problem(errors.INVALID, detail, "mask")
    return width, height


def _is_seen(mask: Bitmap, every: int) -> bool:
    """Whether one of the pixels that the model looks at is white."""
    rows = range(0, len(mask.pixels), every * mask.width)
    return any(255 in mask.pixels[row : row + mask.width : every] for row in rows)


def _strength(order: Order, variant: Variant, steps: int) -> float | None:
    """The strength on the variant's grid; None where nothing is drawn over."""
    if order.image is None:
        for field, given in (("mask", order.mask), ("strength", order.strength)):
            if given is not None:
                raise Problem(errors.INVALID, f"{field} needs an image to draw over", field)
        return None
    default = STRENGTH if order.mask is None else STRENGTH_OF_A_MASK
    strength = snap(default if order.strength is None else order.strength, steps)
    if strength is None:
        detail = f"{variant.name} draws over an image at strengths {spelled(steps)}, and none below"
        raise Problem(errors.INVALID, detail, "strength")
    return strength


def _variant(order: Order, family: Family) -> tuple[Variant, int]:
    """The weights and the steps that an order means."""
    if (variant := family.choose(order.variant, order.steps)) is not None:
        return variant, order.steps or variant.steps[0]
    if order.variant is not None and order.variant not in family.variants:
        raise Problem(errors.INVALID, f"variant must be one of {', '.join(family.variants)}", "variant")
    named = [each for each in family.variants.values() if order.variant in (None, each.name)]
    allowed = one_of({steps for each in named for steps in each.steps})
    detail = f"{order.variant or 'this model'} draws in {allowed} steps, not {order.steps}"
    raise Problem(errors.INVALID, detail, "steps")


def _styles(order: Order, styles: Mapping[str, StyleFile]) -> tuple[Style, ...]:
    """Sorted by their names, so that their order makes no difference; without those that change nothing."""
    if len(order.styles) > MOST_STYLES:
        raise Problem(errors.INVALID, f"there can be at most {MOST_STYLES} styles", "loras")
    if unknown := [name for name, _ in order.styles if name not in styles]:
        known = sorted(styles)
        there_are = f"there are {', '.join(known[:MOST_NAMED])}" if known else "there is none"
        more = f" and {len(known) - MOST_NAMED} more" if len(known) > MOST_NAMED else ""
        raise Problem(errors.INVALID, f"there is no style {unknown[0]}; {there_are}{more}", "loras")
    if len({name for name, _ in order.styles}) < len(order.styles):
        raise Problem(errors.INVALID, "a style can be named once only", "loras")
    for name, scale in order.styles:
        if not -2 <= scale <= 2 or abs(scale - round(scale, 2)) > 1e-6:
            detail = f"the scale of {name} must be from -2 to 2 in steps of 0.01, not {scale:g}"
            raise Problem(errors.INVALID, detail, "loras")
    rounded = [(name, round(scale, 2)) for name, scale in sorted(order.styles)]
    return tuple(Style(name, scale, styles[name].id) for name, scale in rounded if scale)


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
