"""Weight files: found, or missed with advice; hostile ones refused; nothing but safetensors read."""

import json
import os
import pickle
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from models.catalog import CATALOG, Weights, read_catalog
from models.device import Device, Tier
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


@pytest.mark.parametrize(
    ("line", "reason"),
    [("steps = 4", "steps must be"), ('kind = "unet"', "unknown kind"), ('.safetensors"', "only safetensors")],
)
def test_a_nonsensical_row_of_the_catalog_fails_at_start_up_with_its_name(tmp_path, line, reason):
    broken = {"steps = 4": "steps = 3", 'kind = "unet"': 'kind = "net"', '.safetensors"': '.ckpt"'}[line]
    source = (Path(CATALOG["embedded"].directory).parent / "catalog.toml").read_text()
    path = write(tmp_path / "catalog.toml", source.replace(line, broken, 3).encode())
    with pytest.raises(ValueError, match=rf"variant \dstep-\w+: {reason}"):
        read_catalog(path)
