"""Weight files: found, or missed with advice; hostile ones refused; nothing but safetensors read."""

import json
import os
import pickle
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from models.catalog import CATALOG, Weights
from models.device import Device, Tier
from models.modules import load_decoder
from models.registry import Registry
from models.weights import BadWeights, MissingWeights, WeightStore, check_header, read

SMALL = save({"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4)})


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_a_whole_file_is_read(tmp_path):
    assert read(write(tmp_path / "x.safetensors", SMALL))["a"].shape == (2, 3)


@pytest.mark.parametrize("length", range(0, len(SMALL), 7))
def test_a_truncated_file_is_refused(tmp_path, length):
    with pytest.raises(BadWeights):
        read(write(tmp_path / "x.safetensors", SMALL[:length]))


@given(data=st.binary(max_size=300))
@settings(max_examples=200, deadline=None)
def test_random_bytes_are_refused(tmp_path_factory, data):
    with pytest.raises(BadWeights):
        read(write(tmp_path_factory.mktemp("x") / "x.safetensors", data))


@pytest.mark.parametrize(
    "data",
    [
        struct.pack("<Q", 1 << 40) + b"{}",  # a header of a terabyte
        struct.pack("<Q", 9 << 20) + b"{" + b" " * (9 << 20),  # a header above the limit
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 30000) + b"[" * 30000,  # depth
        struct.pack("<Q", len(h := json.dumps({"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 4]}}).encode()))
        + h
        + bytes(4),
    ],
)
def test_a_hostile_header_is_refused(tmp_path, data):
    with pytest.raises(BadWeights):
        read(write(tmp_path / "x.safetensors", data))


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_a_damaged_file_is_refused_or_has_the_same_tensors_by_other_numbers(tmp_path_factory, data):
    """Flipped, cut and spliced: nothing but a refusal in words, or tensors that lie wholly within the file."""
    damaged = bytearray(SMALL)
    for _ in range(data.draw(st.integers(1, 4))):
        at, value = data.draw(st.integers(0, len(damaged) - 1)), data.draw(st.integers(0, 255))
        match data.draw(st.sampled_from(("flip", "cut", "insert", "repeat"))):
            case "flip":
                damaged[at] = value
            case "cut":
                del damaged[at : at + value]
            case "insert":
                damaged[at:at] = bytes([value]) * value
            case "repeat":
                damaged += damaged[at : at + value]
        if not damaged:
            break
    path = write(tmp_path_factory.mktemp("x") / "x.safetensors", bytes(damaged))
    try:
        tensors = read(path)
    except BadWeights:
        return
    assert sum(tensor.nbytes for tensor in tensors.values()) <= len(damaged)


def test_a_pickle_is_refused_and_never_run(tmp_path):
    canary = tmp_path / "canary"

    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(canary),))

    for name in ("model.bin", "model.pt", "model.ckpt", "model.safetensors"):
        with pytest.raises(BadWeights):
            read(write(tmp_path / name, pickle.dumps(Bomb())))
    assert not canary.exists()


def test_a_fifo_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "x.safetensors")
    with pytest.raises(BadWeights):
        check_header(tmp_path / "x.safetensors")


def test_a_missing_file_names_itself_and_the_way_to_get_it(tmp_path):
    with pytest.raises(MissingWeights, match=r"sdxl_lightning_4step_unet\.safetensors.*MODEL_DIR"):
        WeightStore(CATALOG["embedded"], tmp_path).variant_file("4step-unet")


def test_offline_without_a_cache_the_error_says_what_to_fetch(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(MissingWeights, match=r"sdxl_lightning_4step_unet\.safetensors.*models fetch"):
        WeightStore(CATALOG["sdxl"]).variant_file("4step-unet")


@pytest.mark.parametrize(
    "changed",
    [
        *({key: 0.5} for key in ("latents_mean", "latents_std", "shift_factor")),
        *({"scaling_factor": value} for value in (0, -1, None, "0.13025", float("nan"), float("inf"))),
    ],
)
def test_fields_that_move_the_latents_before_they_are_decoded_are_refused(embedded_copy, changed):
    path = embedded_copy / "vae" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))
    with pytest.raises(BadWeights, match=rf"vae/config.json: {next(iter(changed))}"):
        load_decoder(WeightStore(CATALOG["embedded"], embedded_copy), "cpu", torch.float32)


@pytest.mark.parametrize("content", ["[]", '"org/name"', "{", "1" + "[" * 100_000])
def test_a_config_that_is_no_table_is_refused(embedded_copy, content):
    (embedded_copy / "unet" / "config.json").write_text(content)
    with pytest.raises(BadWeights, match=r"unet/config\.json"):
        WeightStore(CATALOG["embedded"], embedded_copy).config("unet")


def test_every_file_of_the_embedded_model_has_its_digest_in_the_catalog():
    family = CATALOG["embedded"]
    files = {f"{part}/{file}" for part, component in family.components.items() for file in component.files}
    assert family.sha256.keys() == files | {variant.file for variant in family.variants.values()}
    for name in (*family.components, *family.variants):
        assert WeightStore(family).verify(name) == "right"


def test_what_has_no_digest_is_present_and_not_verified(embedded_copy):
    family = replace(CATALOG["embedded"], sha256={})
    assert "not verified: no digest is known of vae/config" in WeightStore(family, embedded_copy).verify("vae")
    path = embedded_copy / "vae" / "diffusion_pytorch_model.safetensors"
    for data in (path.read_bytes()[:-1], path.read_bytes() + b"x"):
        with pytest.raises(BadWeights, match="not a whole safetensors file"):
            WeightStore(family, write(path, data).parent.parent).verify("vae")


def test_a_model_with_a_foreign_class_in_its_index_runs_no_foreign_code(embedded_copy):
    """model_index.json is never read: the classes are ours, fixed in code."""
    index = embedded_copy / "model_index.json"
    index.write_text(json.dumps({"_class_name": "Evil", "unet": ["os", "system"]}))
    config = json.loads((embedded_copy / "unet" / "config.json").read_text())
    (embedded_copy / "unet" / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "evil.Model"}}))
    store = WeightStore(CATALOG["embedded"], embedded_copy)
    assert store.config("unet")["auto_map"]  # seen, and ignored below
    registry = Registry(store, Device(), torch.float32, [Tier("cpu", 1 << 40)])
    registry.load(Weights("4step-unet"))
    assert type(registry.unet.unet).__name__ == "UNet2DConditionModel"
