"""What `make teacher` and `make distill` leave behind, at toy size."""

from __future__ import annotations

from pathlib import Path

import pytest

from distill import data, distill, teacher
from tests.conftest import needed


@pytest.fixture(autouse=True, scope="session")
def emoji_font() -> str:
    """What every picture is rendered from."""
    return needed(data.FONT, "fonts-noto-color-emoji")


SIZES = teacher.Sizes(
    vae_channels=(8, 8, 8, 8), unet_channels=(16, 32, 32), heads=(1, 2, 2),
    vae_steps=2, vae_crop_steps=2, decoder_steps=2, steps=2, batch=4, jitters=1, every=100, compiled=False,
)  # fmt: skip
ONE, NO_LORA = distill.Counts(1, 1, 1, 1), distill.Counts(1, 1, 0, 1)
PLAN = distill.Plan(many=(1, 1), adversarial=((8, ONE), (4, ONE), (2, ONE), (1, NO_LORA)), switch=1, batch=4)


@pytest.fixture(scope="session")
def plan() -> distill.Plan:
    return PLAN


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> Path:
    """The folder of all results, from an iteration or two of each phase."""
    folder = tmp_path_factory.mktemp("runs")
    teacher.main(folder, SIZES)
    distill.main(folder, PLAN)
    return folder
