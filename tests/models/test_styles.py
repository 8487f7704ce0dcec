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
from models.weightset import BadStyle, StyleGone
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


@pytest.fixture(scope="module")
def shipped() -> Registry:
    folder = FAMILY.directory / "loras"
    return Registry(WeightStore(FAMILY), Device(), torch.float32, [Tier("cpu", 1 << 40)], styles=folder)


def weights(folder: Path, variant: str, much: dict[str, float]) -> Weights:
    files = Styles(folder).find(much, FAMILY)
    return Weights(variant, tuple(Style(name, scale, files[name].id) for name, scale in sorted(much.items())))


def draw(pipeline: Pipeline, registry: Registry, wanted: Weights, prompts=PROMPTS, seeds=SEEDS) -> Tensor:
    """Latents after the last step."""
    registry.load(wanted)
    schedule = registry.schedule(wanted.variant, FAMILY.variants[wanted.variant].steps[0])
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


@pytest.mark.parametrize("variant", FAMILY.variants)
def test_the_style_that_ships_draws_lines_on_paper_with_every_variant(pipeline, shipped, variant):
    folder = FAMILY.directory / "loras"
    assert (folder / "line.safetensors").stat().st_size <= 300 * 1024
    found = {}
    for scale in (0.0, 0.8, 1.0):
        wanted = weights(folder, variant, {"line": scale}) if scale else Weights(variant)
        latents = draw(pipeline, shipped, wanted)
        pictures = pipeline.decode(list(latents))[0].float()
        colour = (pictures.amax(dim=3) - pictures.amin(dim=3)).mean()  # 0 in gray
        found[scale] = (colour, pictures[:, :8, :8].mean())  # and a corner
    assert max(found[0.8][0], found[1.0][0]) < 12 < 60 < found[0.0][0]
    assert min(found[0.8][1], found[1.0][1]) > 225


def test_prompts_are_cached_by_the_styles_of_their_text_encoders(pipeline, registry, folder):
    known = pipeline.prompts.encode(PROMPTS[:1])[0]
    found = []
    for much in ({"text": 1.0}, {"text": 0.5}, {"attention": 1.0}, {"text": 1.0}):
        wanted = weights(folder, "4step-unet", much)
        registry.load(wanted)
        found.append(pipeline.prompts_for(wanted, registry.text_factors(wanted)).encode(PROMPTS[:1])[0])
    assert found[3] is found[0]
    assert found[2] is known  # of the UNet alone: one cache
    assert not torch.equal(found[0].prompt_embeds, found[1].prompt_embeds)
    assert pipeline.prompts.encode(PROMPTS[:1])[0] is known


def test_the_base_picture_is_the_same_to_the_bit_after_a_hundred_switches_within_the_budget(pipeline, folder):
    base = Weights("4step-unet")
    sets = [weights(folder, "4step-unet", {name: scale}) for name in FILES for scale in (1.0, -1.0, 0.5)]
    one_set = Registry(WeightStore(FAMILY), Device(), torch.float32, []).bytes_of_a_set
    budget = int(3.2 * one_set)
    registry = Registry(WeightStore(FAMILY), Device(), torch.float32, [Tier("cpu", budget)], styles=folder)
    before = draw(pipeline, registry, base, PROMPTS[:1], SEEDS[:1])
    gone = 0
    for switch in range(100):
        gone += len(registry.load(sets[switch * 5 % len(sets)]))
        registry.use(sets[switch * 5 % len(sets)])
        assert sum(row.resident_bytes for row in registry.status()) <= budget
    assert gone == 98  # two fit
    assert registry.is_resident(base)
    assert registry.switches == 101
    assert torch.equal(draw(pipeline, registry, base, PROMPTS[:1], SEEDS[:1]), before)


def test_styled_sets_leave_before_others_and_those_to_keep_last(folder):
    one_set = Registry(WeightStore(FAMILY), Device(), torch.float32, []).bytes_of_a_set
    registry = Registry(WeightStore(FAMILY), Device(), torch.float32, [Tier("cpu", int(3.2 * one_set))], styles=folder)
    old, new = Weights("2step-unet"), weights(folder, "2step-unet", {"attention": 1.0})
    other, third = (weights(folder, "2step-unet", {"attention": scale}) for scale in (0.5, 0.25))
    for each in (old, new, other):
        registry.load(each)
    assert registry.load(third, keep=[new]) == [other]
    assert registry.load(Weights("1step-unet")) == [new]
    assert not registry.has_room([old, third, Weights("1step-unet")])


@pytest.mark.parametrize("budgets", [(1.2, 2.2), (0.5, 2.2)])
def test_a_styled_set_that_leaves_the_first_tier_is_not_moved_down(folder, budgets):
    one_set = Registry(WeightStore(FAMILY), Device(), torch.float32, []).bytes_of_a_set
    tiers = [Tier("cpu", int(sets * one_set)) for sets in budgets]
    registry = Registry(WeightStore(FAMILY), Device(), torch.float32, tiers, styles=folder)
    first, second = (weights(folder, "2step-unet", {"attention": scale}) for scale in (1.0, 0.5))
    registry.load(first)
    left = registry.load(second)
    assert left == ([first] if budgets[0] > 1 else [])


def test_a_file_that_was_replaced_since_it_was_asked_for_is_not_read(folder, tmp_path):
    loras.write(tmp_path, "x", loras.kohya(loras.factors(ATTENTION, 0)))
    registry = Registry(WeightStore(FAMILY), Device(), torch.float32, [Tier("cpu", 1 << 40)], styles=tmp_path)
    wanted = weights(tmp_path, "4step-unet", {"x": 1.0})
    loras.write(tmp_path, "x", loras.kohya(loras.factors(ATTENTION, 1)))
    with pytest.raises(StyleGone, match="style x"):
        registry.load(wanted)
    assert weights(tmp_path, "4step-unet", {"x": 1.0}) != wanted


@pytest.mark.parametrize("name", ["text_model.encoder.layers.0.mlp.fc1", "text_projection"])
def test_a_text_encoders_tensor_that_does_not_fit_is_refused_by_its_name(tmp_path, name):
    key = f"text_encoder_2.{name}"
    loras.write(tmp_path, "x", {f"{key}.lora_A.weight": torch.ones(2, 7), f"{key}.lora_B.weight": torch.ones(7, 2)})
    registry = Registry(WeightStore(FAMILY), Device(), torch.float32, [Tier("cpu", 1 << 40)], styles=tmp_path)
    with pytest.raises(BadStyle, match=f"{key}.lora_A.weight and its up do not fit"):
        registry.load(weights(tmp_path, "4step-unet", {"x": 1.0}))


def test_the_folder_is_looked_at_again_for_unknown_names_at_most_once_a_second(tmp_path):
    now = [0.0]
    styles = Styles(tmp_path, clock=lambda: now[0])
    assert styles.find(["x"], FAMILY) == {}
    loras.write(tmp_path, "x", loras.kohya(loras.factors(ATTENTION, 0)))
    loras.write(tmp_path, "x" * 65, loras.kohya(loras.factors(ATTENTION, 0)))
    assert styles.find(["x"], FAMILY) == {}
    now[0] = 1.0
    assert styles.find(["x"], FAMILY).keys() == {"x"}
    (tmp_path / "x.safetensors").unlink()
    assert styles.find(["x"], FAMILY) == {}  # a known one is looked at each time
    assert Styles(tmp_path / "nowhere").all(FAMILY) == []
