"""What is opened before the first request, on how many threads, and what is measured of it."""

import json

import msgspec
import pytest
import torch

from app.engine import warmup
from app.engine.cores import lower
from app.engine.load import CANNOT_OPEN, open_model
from app.engine.messages import EngineConfig
from app.settings import EngineSettings
from models.catalog import CATALOG
from models.device import NoDevice
from models.weights import BadWeights, MissingWeights


def config(**changes: object) -> EngineConfig:
    plain = EngineSettings(model="embedded", device="cpu", dtype="float32", threads=1, compile=False).engine_config()
    return msgspec.structs.replace(plain, **changes)


@pytest.fixture(autouse=True)
def threads_as_they_were():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("cores", "quota", "allowed"),
    [
        (8, "max 100000", 8),
        (8, "-1 100000", 8),
        (8, "200000 100000", 2),
        (8, "150000 100000", 1),
        (8, "50000 100000", 1),
        (2, "400000 100000", 2),
    ],
)
def test_threads_are_the_lower_of_affinity_and_quota(cores, quota, allowed):
    assert lower(cores, quota) == allowed


def test_what_is_to_be_resident_is_and_nothing_else():
    model = open_model(config(preload=["2step-lora"]))
    assert [row.name for row in model.registry.status() if row.state == "resident"] == ["2step-lora"]
    assert (model.workers, model.batches, model.dtype, model.device.name) == (1, (1, 2, 4, 8, 16), "float32", "cpu")


def test_an_unknown_name_in_preload_is_refused_with_those_there_are():
    with pytest.raises(MissingWeights, match="no such variant: 3step-unet; there are 1step-unet"):
        open_model(config(preload=["3step-unet"]))


def damage(folder, *names):
    for name in names:
        path = folder / CATALOG["embedded"].variants[name].file
        path.write_bytes(path.read_bytes()[:-1000])


@pytest.mark.parametrize(
    ("preload", "broken", "resident"),
    [
        (None, ["4step-lora", "4step-unet"], 5),
        (["4step-lora", "2step-unet"], ["4step-lora"], 1),
    ],
)
def test_a_variant_that_cannot_be_loaded_leaves_the_others_served(embedded_copy, preload, broken, resident):
    damage(embedded_copy, *broken)
    rows = open_model(config(directory=str(embedded_copy), preload=preload)).registry.status()
    assert sum(row.state == "resident" for row in rows) == resident
    failed = {row.name: row.reason for row in rows if row.state == "failed"}
    assert list(failed) == sorted(broken, reverse="4step-unet" in broken)
    assert all("is not a whole safetensors file" in reason for reason in failed.values())


def test_where_sdxls_one_variant_is_broken_the_first_other_one_is_served(embedded_copy, monkeypatch):
    monkeypatch.setattr("app.engine.load.choose_preload", lambda store: ["4step-unet"])  # as it does for SDXL
    damage(embedded_copy, "4step-unet", "1step-unet")
    rows = open_model(config(directory=str(embedded_copy))).registry.status()
    assert [row.name for row in rows if row.state == "resident"] == ["2step-unet"]


def test_where_no_variant_is_left_the_reason_is_told(embedded_copy):
    damage(embedded_copy, "4step-unet")
    with pytest.raises(BadWeights, match="sdxl_lightning_4step_unet"):
        open_model(config(directory=str(embedded_copy), preload=["4step-unet"]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_device_that_is_not_there_is_refused_in_words():
    with pytest.raises(NoDevice, match="leave DEVICE out"):
        open_model(config(device="cuda"))


@pytest.mark.parametrize(
    ("file", "fault", "named"),
    [
        ("text_encoder_2/config.json", {"layer_norm_eps": float("nan")}, "text_encoder"),
        ("text_encoder/config.json", {"eos_token_id": None}, "tokenizer or text_encoder"),
        ("unet/config.json", {"norm_eps": float("nan")}, "4step-unet: a first step is NaN"),
        ("vae/config.json", {"scaling_factor": 1e-38}, "vae: a first picture has one colour"),
        ("model_index.json", {"force_zeros_for_empty_prompt": "false"}, "model_index.json: force_zeros"),
    ],
)
def test_a_model_that_can_draw_nothing_is_refused_by_the_part_at_fault(embedded_copy, file, fault, named):
    path = embedded_copy / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **fault}))
    with pytest.raises(CANNOT_OPEN, match=named):
        open_model(config(directory=str(embedded_copy), preload=["4step-unet"])).measure((1,))


def test_a_costly_picture_is_measured_once_and_no_batch_is(monkeypatch):
    model = open_model(config(preload=["1step-unet"]))
    decode, calls = model.pipeline.decoder, []
    model.pipeline.decoder = lambda latents: calls.append(len(latents)) or decode(latents)
    assert sorted(model.measure((1, 2)).decode) == [1, 2]
    monkeypatch.setattr(warmup, "COSTLY_S", 0.0)
    calls.clear()
    costs = model.measure((1, 2, 4, 8, 16))
    assert (calls, list(costs.step), list(costs.decode), costs.pixels) == ([1], [1], [1], 128 * 128)
