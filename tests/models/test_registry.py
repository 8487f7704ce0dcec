"""The registry: budgets, least recently used out first, and loads that fail without harm."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.catalog import CATALOG, Weights
from models.device import Device, Tier
from models.registry import OverBudget, Registry
from models.weights import BadWeights, MissingWeights, WeightStore

FAMILY = CATALOG["embedded"]
ONE_SET = (
    sum(t.nbytes for t in load_file(FAMILY.directory / FAMILY.variants["4step-unet"].file).values()) * 2
)  # float32


def make_registry(budgets: list[float], directory=None) -> Registry:
    tiers = [Tier("cpu", int(sets * ONE_SET) + 1) for sets in budgets]
    return Registry(WeightStore(FAMILY, directory), Device(), torch.float32, tiers)


def states(registry: Registry) -> dict[str, str]:
    return {row.name: row.state for row in registry.status()}


def test_a_variant_is_resident_once_loaded_and_gone_once_unloaded():
    registry = make_registry([4])
    registry.load(Weights("4step-unet"))
    assert states(registry)["4step-unet"] == "resident"
    registry.unload(Weights("4step-unet"))
    assert states(registry)["4step-unet"] == "on disk"
    with pytest.raises(KeyError):
        registry.use(Weights("4step-unet"))


def test_the_least_recently_used_set_leaves_when_the_budget_is_full():
    registry = make_registry([2])
    registry.load(Weights("1step-unet"))
    registry.load(Weights("2step-unet"))
    registry.use(Weights("1step-unet"))
    registry.load(Weights("4step-unet"))
    resident = {name for name, state in states(registry).items() if state == "resident"}
    assert resident == {"1step-unet", "4step-unet"}


def test_what_the_first_tier_displaces_moves_to_the_next():
    registry = make_registry([1, 1])
    for name in ("1step-unet", "2step-unet", "4step-unet"):
        registry.load(Weights(name))
    resident = {name for name, state in states(registry).items() if state == "resident"}
    assert resident == {"2step-unet", "4step-unet"}


def test_a_set_larger_than_every_budget_is_refused_with_the_budgets():
    with pytest.raises(OverBudget, match="GiB on cpu"):
        make_registry([0.5]).load(Weights("4step-unet"))


def test_switches_are_counted_only_when_the_active_variant_changes():
    registry = make_registry([3])
    registry.load(Weights("1step-unet"))
    registry.load(Weights("2step-unet"))
    for name in ("1step-unet", "1step-unet", "2step-unet", "1step-unet"):
        registry.use(Weights(name))
    assert registry.switches == 3


def test_unloading_and_evicting_in_the_middle_of_loads_leaves_the_registry_whole():
    registry = make_registry([1, 1])
    registry.load(Weights("1step-unet"))
    with ThreadPoolExecutor(3) as pool:
        loads = [pool.submit(registry.load, Weights(name)) for name in ("4step-lora", "2step-unet", "2step-lora")]
        while not all(load.done() for load in loads):
            for name in ("1step-unet", "4step-lora", "2step-unet"):
                registry.unload(Weights(name))
            time.sleep(0.01)
    assert [load.result() for load in loads] == [[]] * 3
    registry.load(Weights("4step-unet"))
    registry.use(Weights("4step-unet"))
    assert "loading" not in states(registry).values()
    assert sum(row.resident_bytes for row in registry.status()) <= 2 * ONE_SET + 2


def damage_truncate(path):
    path.write_bytes(path.read_bytes()[:-1000])


def damage_shape(path):
    state = load_file(path)
    state["conv_out.bias"] = torch.zeros(5)
    save_file(state, path)


def damage_missing_tensor(path):
    state = load_file(path)
    del state["conv_out.bias"]
    save_file(state, path)


def damage_remove(path):
    path.unlink()


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (damage_truncate, BadWeights),
        (damage_shape, BadWeights),
        (damage_missing_tensor, BadWeights),
        (damage_remove, MissingWeights),
    ],
)
def test_a_load_that_fails_says_why_and_leaves_the_others_serving(embedded_copy, damage, error):
    registry = make_registry([8], embedded_copy)
    registry.load(Weights("4step-unet"))
    damage(embedded_copy / FAMILY.variants["8step-unet"].file)
    with pytest.raises(error, match="sdxl_lightning_8step_unet"):
        registry.load(Weights("8step-unet"))
    broken = next(row for row in registry.status() if row.name == "8step-unet")
    assert broken.state == "failed"
    assert "sdxl_lightning_8step_unet" in broken.reason
    registry.use(Weights("4step-unet"))


def damage_dtype(dtype):
    def damage(path):
        save_file({key: tensor.to(dtype) for key, tensor in load_file(path).items()}, path)

    return damage


def damage_number(number):
    def damage(path):
        state = load_file(path)
        state["conv_in.weight"][-1, -1, -1, -1] = number
        save_file(state, path)

    return damage


NO_WEIGHTS = [damage_dtype(dtype) for dtype in (torch.int8, torch.int64, torch.bool, torch.complex64)]
NOT_FINITE = [damage_number(number) for number in (torch.nan, torch.inf, -torch.inf)]


@pytest.mark.parametrize("damage", NO_WEIGHTS + NOT_FINITE)
@pytest.mark.parametrize(
    ("file", "name"),
    [
        (FAMILY.variants["4step-unet"].file, "4step-unet"),
        ("unet/diffusion_pytorch_model.safetensors", "4step-lora"),  # the base, which the LoRA is added to
    ],
)
def test_weights_that_are_no_weights_are_refused_when_loaded(embedded_copy, damage, file, name):
    damage(embedded_copy / file)
    with pytest.raises(BadWeights, match=r"is not floating point|conv_in\.weight has NaN, Inf"):
        make_registry([8], embedded_copy).load(Weights(name))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float8_e4m3fn])
def test_every_floating_point_is_read(embedded_copy, dtype):
    damage_dtype(dtype)(embedded_copy / FAMILY.variants["4step-unet"].file)
    make_registry([8], embedded_copy).load(Weights("4step-unet"))


def test_what_float16_cannot_hold_is_refused(embedded_copy):
    path = embedded_copy / FAMILY.variants["4step-unet"].file
    damage_dtype(torch.float32)(path)
    damage_number(1e6)(path)
    registry = Registry(WeightStore(FAMILY, embedded_copy), Device(), torch.float16, [Tier("cpu", 1 << 40)])
    with pytest.raises(BadWeights, match="cannot hold"):
        registry.load(Weights("4step-unet"))


@pytest.mark.parametrize("name", ["4step-unet", "4step-lora"])
def test_what_is_served_is_a_copy_of_the_file(embedded_copy, name):
    """In the files' own dtype, in which nothing has to be converted."""
    registry = Registry(WeightStore(FAMILY, embedded_copy), Device(), torch.float16, [Tier("cpu", 1 << 40)])
    registry.load(Weights(name))
    before = {key: tensor.clone() for key, tensor in registry.weight_set(Weights(name)).items()}
    for file in (FAMILY.variants[name].file, "unet/diffusion_pytorch_model.safetensors"):
        with (embedded_copy / file).open("r+b") as opened:
            opened.write(b"\xff" * (embedded_copy / file).stat().st_size)
    assert all(torch.equal(before[key], now) for key, now in registry.weight_set(Weights(name)).items())


def test_a_lora_that_is_none_is_refused(embedded_copy):
    save_file(
        {"lora_unet_nonsense.lora_down.weight": torch.zeros(4, 4)}, embedded_copy / FAMILY.variants["4step-lora"].file
    )
    with pytest.raises(BadWeights, match="4step_lora"):
        make_registry([8], embedded_copy).load(Weights("4step-lora"))


def test_a_failed_variant_loads_once_its_file_is_right(embedded_copy):
    path = embedded_copy / FAMILY.variants["8step-unet"].file
    good = path.read_bytes()
    path.write_bytes(good[:100])
    registry = make_registry([8], embedded_copy)
    with pytest.raises(BadWeights):
        registry.load(Weights("8step-unet"))
    path.write_bytes(good)
    registry.load(Weights("8step-unet"))
    assert states(registry)["8step-unet"] == "resident"
