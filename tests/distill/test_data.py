"""The pictures, the captions, and what is never trained on."""

from __future__ import annotations

import random

import numpy as np
import pytest

from distill import data
from distill.text import LENGTH, captions, token_ids, train_tokenizer


def test_the_loader_never_emits_a_held_out_pair():
    held_out = set(data.pairs(held_out=True))
    assert not held_out & set(data.pairs())
    assert len(held_out) + len(data.pairs()) == len(data.objects()) * len(data.BACKGROUNDS)
    assert 0.08 < len(held_out) / (len(data.objects()) * len(data.BACKGROUNDS)) < 0.12


def test_a_plain_picture_is_centred_at_086_of_the_width():
    picture = data.draw("1F34E", "white").astype(int)
    rows, columns = np.nonzero(np.abs(picture - picture[0, 0]).max(-1) > 8)
    assert max(np.ptp(rows), np.ptp(columns)) + 1 == pytest.approx(0.86 * data.SIZE, abs=2)
    assert (rows.min() + rows.max()) / 2 == pytest.approx(63.5, abs=1.5)


def test_the_corner_is_the_backgrounds_colour():
    assert data.draw("1F34E", "blue", random.Random(1))[0, 0].tolist() == [0x2D, 0x6C, 0xDF]


@pytest.mark.parametrize(
    ("name", "background", "text"),
    [
        ("red apple", "blue", "a red apple on a blue background"),
        ("eggplant", "orange", "an eggplant on an orange background"),
        ("unicorn", "red", "a unicorn on a red background"),
        ("grapes", "teal", "grapes on a teal background"),
        ("hourglass", "pink", "an hourglass on a pink background"),
    ],
)
def test_captions_read_like_english(name, background, text):
    assert data.caption(name, background) == text


def test_names_are_unique_and_many():
    names = [name for thing in data.objects() for name in (thing.name, *thing.aliases)]
    assert len(names) == len(set(names))
    assert len(data.objects()) >= 300


def test_any_text_can_be_tokenised_and_captions_fit(tmp_path):
    tokenizer = train_tokenizer(tmp_path)
    odd = "Ünïcode 🍎 and\nlines 123"
    decoded = tokenizer.decode(tokenizer(odd, truncation=False).input_ids, skip_special_tokens=True)
    assert decoded.replace(" ", "") == odd.lower().replace(" ", "").replace("\n", "")
    assert max(len(tokenizer(text).input_ids) for text in captions(2000)) <= LENGTH
    assert token_ids(tokenizer, ["", odd * 9]).shape == (2, LENGTH)
