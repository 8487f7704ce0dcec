"""Checkpoints in one file and in directories, against diffusers' from_single_file and from_pretrained."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

from bench import ldm
from models.catalog import Weights, families
from models.device import Device, Tier
from models.modules import UNet
from models.pipeline import Pipeline
from models.registry import Registry
from models.weights import BadWeights, MissingWeights, WeightStore
from tests.conftest import EMBEDDED
from tests.models.test_samplers import PROMPTS, scheduler, theirs

LORA = "sdxl_lightning_4step_lora.safetensors"
OWN = """
[family.own]
like = "{like}"
{where}
default = "own"

[[family.own.variant]]
name = "own"
steps = [4, 5]
{weights}
"""


def family(path: Path, where='file = "own.safetensors"', weights='kind = "unet"'):
    return families({str(path): OWN.format(like="embedded", where=where, weights=weights)})["own"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A catalog's folder, with the 4-step model and the teacher as checkpoints of one file."""
    folder = tmp_path_factory.mktemp("own")
    ldm.write(EMBEDDED, EMBEDDED / "sdxl_lightning_4step_unet.safetensors", folder / "own.safetensors")
    ldm.write(EMBEDDED, EMBEDDED / "unet" / "diffusion_pytorch_model.safetensors", folder / "teacher.safetensors")
    return folder


def latents(store: WeightStore, steps: int):
    """Of one picture, its text and its weights from the store."""
    registry = Registry(store, Device(), torch.float32, [Tier("cpu", 1 << 40)])
    registry.load(Weights("own"))
    parts = registry.use(Weights("own")), registry.schedule("own", steps)
    return Pipeline(store, Device(), torch.float32).sample(*parts, [PROMPTS[0]], [7], 128, 128)[0]


def single_file(path: Path) -> StableDiffusionXLPipeline:
    pipeline = StableDiffusionXLPipeline.from_single_file(str(path), config=str(EMBEDDED), local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("steps", [4, 5])
def test_a_checkpoint_of_one_file_draws_what_diffusers_draws_with_it(folder, steps):
    own = family(folder / "models.toml")
    oracle = single_file(folder / "own.safetensors")
    oracle.scheduler = scheduler(own.variants["own"])
    expected = theirs(oracle, PROMPTS[0], 7, steps)
    torch.testing.assert_close(latents(WeightStore(own), steps), expected, rtol=0, atol=1e-4)


def test_a_lightning_lora_is_added_to_another_base(folder):
    own = family(folder / "models.toml", 'file = "teacher.safetensors"', f'kind = "lora"\nfile = "{LORA}"')
    oracle = single_file(folder / "teacher.safetensors")
    oracle.load_lora_weights(EMBEDDED / LORA)
    oracle.scheduler = scheduler(own.variants["own"])
    expected = theirs(oracle, PROMPTS[0], 7, 4)
    torch.testing.assert_close(latents(WeightStore(own), 4), expected, rtol=0, atol=1e-4)


def test_a_directory_draws_what_diffusers_draws_with_it_and_its_vae_may_be_lent(embedded_copy):
    """Its own UNet, text encoders and VAE are changed, so that none of ours passes for them."""
    for part in ("text_encoder", "text_encoder_2", "vae"):
        path = next((embedded_copy / part).glob("*.safetensors"))
        save_file({key: tensor * 1.01 for key, tensor in load_file(path).items()}, path)
    unet = embedded_copy / "unet" / "diffusion_pytorch_model.safetensors"
    shutil.copy(EMBEDDED / "sdxl_lightning_4step_unet.safetensors", unet)
    own = family(embedded_copy.parent / "models.toml", f'directory = "{embedded_copy.name}"')
    oracle = StableDiffusionXLPipeline.from_pretrained(embedded_copy, use_safetensors=True)
    oracle.set_progress_bar_config(disable=True)
    oracle.scheduler = scheduler(own.variants["own"])
    torch.testing.assert_close(latents(WeightStore(own), 4), theirs(oracle, PROMPTS[0], 7, 4), rtol=0, atol=1e-4)
    lent = family(embedded_copy.parent / "models.toml", f'directory = "{embedded_copy.name}"\nvae = "embedded"')
    key = "decoder.conv_out.weight"
    ours = load_file(EMBEDDED / "vae" / "diffusion_pytorch_model.safetensors")[key]
    assert torch.equal(WeightStore(own).read("vae")[key], ours * 1.01)
    assert torch.equal(WeightStore(lent).read("vae")[key], ours)


def changed(folder: Path, tmp_path: Path, change) -> WeightStore:
    state = load_file(folder / "own.safetensors")
    save_file(change(state), tmp_path / "own.safetensors")
    return WeightStore(family(tmp_path / "models.toml"))


UNET, FIRST, SECOND, VAE = (
    "model.diffusion_model.",
    "conditioner.embedders.0.transformer.",
    "conditioner.embedders.1.model.",
    "first_stage_model.",
)


def without(prefix: str):
    return lambda state: {key: tensor for key, tensor in state.items() if not key.startswith(prefix)}


def renamed(old: str, new: str):
    return lambda state: {key.replace(old, new): tensor for key, tensor in state.items()}


def inpainting(state):
    key = UNET + "input_blocks.0.0.weight"
    return {**state, key: torch.zeros(state[key].shape[0], 9, 3, 3)}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (renamed("conditioner.embedders.0.", "cond_stage_model."), "Stable Diffusion 1 or 2"),
        (renamed("conditioner.embedders.0.transformer.", "conditioner.embedders.0.model."), "refiner"),
        (inpainting, r"must read 4 channels, not \[9\]"),
        (without(UNET), "holds no unet"),
        (without(FIRST), "holds no text_encoder$"),
        (without(SECOND), "holds no text_encoder_2"),
        (without(VAE), "holds no vae; "),
        (lambda state: {**state, "v_pred": torch.zeros(0)}, "predicts v"),
    ],
)
def test_a_file_that_is_no_whole_sdxl_is_refused_by_what_it_is(folder, tmp_path, change, reason):
    store = changed(folder, tmp_path, change)
    with pytest.raises(BadWeights, match=f"^family own: own.safetensors cannot be served: .*{reason}"):
        store.read("text_encoder")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda state: {**state, UNET + "input_blocks.0.0.extra": torch.zeros(1)}, "1 of its UNet's tensors"),
        (without(UNET + "label_emb.0.0.weight"), "label_emb"),
    ],
)
def test_every_tensor_of_its_unet_is_used_or_the_file_is_refused(folder, tmp_path, change, reason):
    with pytest.raises(BadWeights, match=f"own.safetensors: its unet is not SDXL's: .*{reason}"):
        changed(folder, tmp_path, change).read("unet")


def test_a_file_without_a_vae_draws_with_one_that_is_lent(folder, tmp_path):
    save_file(without(VAE)(load_file(folder / "own.safetensors")), tmp_path / "own.safetensors")
    own = family(tmp_path / "models.toml", 'file = "own.safetensors"\nvae = "embedded"')
    assert latents(WeightStore(own), 4).isfinite().all()


def test_a_unet_for_inpainting_in_a_directory_is_refused(embedded_copy):
    path = embedded_copy / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "in_channels": 9}))
    store = WeightStore(family(embedded_copy / "models.toml", 'directory = "."'))
    with pytest.raises(BadWeights, match=r"unet/config\.json: in_channels must be 4, not 9"):
        UNet(store.config("unet"))


@pytest.mark.parametrize("part", ["text_encoder_2", "vae", "tokenizer"])
def test_a_directory_that_lacks_a_part_is_refused_with_its_name(embedded_copy, part):
    shutil.rmtree(embedded_copy / part)
    with pytest.raises(MissingWeights, match=rf"^{part}/[\w.]+ of own is not in .*[^.]\.$"):
        Pipeline(WeightStore(family(embedded_copy / "models.toml", 'directory = "."')), Device(), torch.float32)
