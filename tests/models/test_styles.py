"""Styles: pictures are diffusers' with the same adapters, alone and among others; a replaced file is another style."""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.catalog import CATALOG, Style, Weights
from models.device import Device, Tier
from models.pipeline import Pipeline
from models.registry import Registry
from models.styles import Styles
from models.weights import WeightStore
from tests.models import loras, oracle

FAMILY = CATALOG["embedded"]
PROMPTS = ("a red apple on a blue background", "yellow banana, green background", "a robot on a teal background")
SEEDS = (7, 0, 2**32 - 1)
EVERYWHERE = {part: loras.layers(part)[::-5] for part in loras.PARTS}  # the last ones first: a projection, conv_out
UNET = {"unet": loras.layers("unet")}
ATTENTION = {"unet": [name for name in loras.layers("unet", "l") if ".attn2" in name]}
TEXT = {part: loras.layers(part)[:-1] for part in ("text_encoder", "text_encoder_2")}  # kohya has no projection
CONVOLUTIONS = {"unet": loras.layers("unet", "c")}
MIXED = (2, 8, 3)  # ranks, and with them alphas


# By name the factors, and the form they are written in. diffusers reads the same file, or, where 0.42 loses the alphas
# of single modules, these as a part of the matrices.
FILES = {
    "attention": (loras.factors(ATTENTION, 0), loras.kohya),
    "convolutions": (loras.factors(CONVOLUTIONS, 1), loras.kohya),
    "text": (loras.factors(TEXT, 2), loras.kohya),
    "peft": (loras.factors(EVERYWHERE, 3), loras.peft),
    "peft-mixed": (loras.factors(EVERYWHERE, 4, MIXED), loras.peft),
    "everywhere": (loras.factors(EVERYWHERE, 5, MIXED), loras.kohya),
    "stability": (loras.factors(UNET, 6, MIXED), partial(loras.kohya, stability=True)),
    "told": (loras.factors(EVERYWHERE, 7, MIXED), loras.peft),
}
SETS = [  # of a variant, and how much of which styles
    ("4step-unet", {"attention": 1.0}),
    ("2step-unet", {"stability": -0.75}),
    ("1step-unet", {"convolutions": 1.0}),
    ("4step-lora", {"peft": 0.8}),
    ("4step-unet", {"peft-mixed": 1.25}),
    ("4step-unet", {"text": 1.0}),
    ("8step-unet", {"everywhere": 2.0}),
    ("2step-unet", {"told": 1.0}),
    ("4step-unet", {"attention": 0.5, "text": -1.0, "peft": 0.3}),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kind of file."""
    made = tmp_path_factory.mktemp("loras")
    for name, (factors, form) in FILES.items():
        loras.write(made, name, form(factors), loras.told(factors) if name == "told" else None)
        is_read = name in ("attention", "convolutions", "text", "peft", "peft-mixed")
        loras.write(made / "diffusers", name, form(factors) if is_read else loras.folded(factors))
    return made


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline(WeightStore(FAMILY), Device(), torch.float32)


@pytest.fixture(scope="module")
def registry(folder: Path) -> Registry:
    return Registry(WeightStore(FAMILY), Device(), torch.float32, [Tier("cpu", 1 << 40)], styles=folder)


def weights(folder: Path, variant: str, much: dict[str, float]) -> Weights:
    files = Styles(folder).find(much, FAMILY)
    return Weights(variant, tuple(Style(name, scale, files[name].id) for name, scale in sorted(much.items())))


def draw(pipeline: Pipeline, registry: Registry, wanted: Weights, prompts=PROMPTS, seeds=SEEDS) -> Tensor:
    """Latents after the last step."""
    registry.load(wanted)
    schedule = registry.schedule(wanted.variant, FAMILY.variants[wanted.variant].steps)
    through = pipeline.prompts_for(wanted, registry.text_factors(wanted))
    return pipeline.sample(registry.use(wanted), schedule, prompts, seeds, 128, 128, through=through)


@pytest.mark.parametrize(("variant", "much"), SETS)
def test_a_styled_picture_has_diffusers_latents_alone_and_in_a_batch(pipeline, registry, folder, variant, much):
    wanted = weights(folder, variant, much)
    theirs = oracle.draw_styled(variant, folder / "diffusers", much, PROMPTS, SEEDS)
    ours = draw(pipeline, registry, wanted)
    plain = draw(pipeline, registry, Weights(variant))
    assert (plain - theirs).abs().mean() > 0.02  # the styles are seen
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    torch.testing.assert_close(
        draw(pipeline, registry, wanted, PROMPTS[:1], SEEDS[:1])[0], theirs[0], rtol=0, atol=1e-4
    )
