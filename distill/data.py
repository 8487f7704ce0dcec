"""The pictures: Noto Color Emoji (SIL OFL 1.1) over plain backgrounds, with captions.

Everything here is a pure function of its arguments; a random draw comes from the generator it is given.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIZE = 128  # pixels
FILL = 0.86  # the object's longer side, as a part of the picture's width
SCALES = (0.92, 1.08)  # jitter: enough to keep the autoencoder from learning pictures by heart
SHIFT = 1  # pixels
FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
FONT_SIZE = 109  # the font's only bitmap size

BACKGROUNDS = {
    "white": "#fafafa",
    "black": "#1a1a1a",
    "gray": "#8c8c8c",
    "red": "#d62d30",
    "orange": "#f28c28",
    "yellow": "#fadb46",
    "green": "#37a24b",
    "teal": "#30b4b4",
    "blue": "#2d6cdf",
    "purple": "#8c4fbf",
    "pink": "#fba0c4",
    "brown": "#835637",
}


@dataclass(frozen=True)
class Object:
    name: str  # the Unicode name
    codepoint: str  # hexadecimal, as "1F34E"
    aliases: tuple[str, ...]  # what people would type instead


@cache
def objects() -> tuple[Object, ...]:
    """The vocabulary: one line an object, `CODEPOINT name | alias | ...`."""
    rows = []
    for line in Path(__file__).with_name("objects.txt").read_text().splitlines():
        codepoint, names = line.split(" ", 1)
        name, *aliases = names.split(" | ")
        rows.append(Object(name, codepoint, tuple(aliases)))
    return tuple(rows)


def is_held_out(name: str, background: str) -> bool:
    """A tenth of the pairs, chosen by a hash of the pair: the training loader never emits them."""
    return hashlib.sha256(f"held out 2026: {name} / {background}".encode()).digest()[0] % 10 == 0


def pairs(held_out: bool = False) -> list[tuple[int, str]]:
    """(index of the object, background) of every pair that is, or is not, held out."""
    return [(i, b) for i, thing in enumerate(objects()) for b in BACKGROUNDS if is_held_out(thing.name, b) == held_out]


def article(noun: str) -> str:
    plural = noun.endswith("s") and not noun.endswith(("ss", "us", "ros"))
    if plural or noun in {"bacon", "bread", "broccoli", "butter", "garlic", "lightning", "popcorn", "milk", "sushi"}:
        return noun
    vowel = noun.startswith(("a", "e", "i", "o", "u", "hour")) and not noun.startswith(("ewe", "uni", "ufo", "eu"))
    return f"an {noun}" if vowel else f"a {noun}"


def caption(name: str, background: str) -> str:
    """The canonical one: "a red apple on a blue background"."""
    return f"{article(name)} on {article(background)} background"


def paraphrase(thing: Object, background: str, rng: random.Random) -> str:
    """What a person might type: the canonical caption half of the time."""
    if rng.random() < 0.5:
        return caption(thing.name, background)
    name = rng.choice((thing.name, *thing.aliases))
    whole = f"{article(background)} background"
    on = rng.choice((f"on {whole}", f"on {background}", f"with {whole}"))
    text = rng.choice(
        (
            f"{article(name)} {on}",
            f"{name} {on}",
            f"{name}, {background} background",
            f"an emoji of {article(name)} {on}",
            f"a picture of {article(name)} {on}",
            f"{background} background, {name}",
        )
    )
    return text.capitalize() if rng.random() < 0.1 else text


@cache
def glyph(codepoint: str) -> Image.Image:
    """The emoji, cut to its outline. RGBA."""
    font = ImageFont.truetype(FONT, FONT_SIZE)
    canvas = Image.new("RGBA", (160, 160))
    ImageDraw.Draw(canvas).text((8, 8), chr(int(codepoint, 16)), font=font, embedded_color=True)
    return canvas.crop(canvas.getbbox())


def draw(codepoint: str, background: str, rng: random.Random | None = None) -> np.ndarray:
    """One picture, uint8 (128, 128, 3); without a generator, the object is exactly centred at 0.86 of the width."""
    art, where = place(codepoint, rng)
    picture = Image.new("RGB", (SIZE, SIZE), BACKGROUNDS[background])
    picture.paste(art, where, art)
    return np.asarray(picture)


def place(codepoint: str, rng: random.Random | None) -> tuple[Image.Image, tuple[int, int]]:
    """The object at its size, and its upper left corner."""
    art = glyph(codepoint)
    scale = rng.uniform(*SCALES) if rng else 1.0
    dx, dy = (rng.randint(-SHIFT, SHIFT), rng.randint(-SHIFT, SHIFT)) if rng else (0, 0)
    ratio = FILL * scale * SIZE / max(art.size)
    width, height = (max(1, round(side * ratio)) for side in art.size)
    art = art.resize((width, height), Image.Resampling.LANCZOS)
    return art, ((SIZE - width) // 2 + dx, (SIZE - height) // 2 + dy)


def cut_out(codepoint: str, rng: random.Random) -> np.ndarray:
    """The object over nothing: uint8 (128, 128, 4), straight alpha."""
    art, where = place(codepoint, rng)
    picture = Image.new("RGBA", (SIZE, SIZE))
    picture.paste(art, where)
    return np.asarray(picture)


def draw_batch(chosen: list[tuple[int, str]], rng: random.Random) -> np.ndarray:
    """uint8 (B, 128, 128, 3), jittered."""
    return np.stack([draw(objects()[i].codepoint, background, rng) for i, background in chosen])
