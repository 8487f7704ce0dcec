"""LoRA files: each tensor is used as its format says, or the file is refused by the name of the first that is not."""

import json

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
from safetensors.torch import load_file, save_file

from models.catalog import CATALOG, Weights
from models.lora import _stability_name
from models.modules import UNet
from models.weights import BadWeights, WeightStore
from models.weightset import WeightSets

FAMILY = CATALOG["embedded"]
FILE = FAMILY.variants["4step-lora"].file
BASE = load_file(FAMILY.directory / "unet" / "diffusion_pytorch_model.safetensors")
LORA = load_file(FAMILY.directory / FILE)
MODULE = "mid_block.attentions.0.proj_in"
KOHYA = f"lora_unet_{MODULE.replace('.', '_')}"
LAYERS = {key.removesuffix(".weight") for key, weight in BASE.items() if key.endswith(".weight") and weight.ndim > 1}
DIFFUSERS = {f"lora_unet_{module.replace('.', '_')}": module for module in LAYERS}


def fused(folder, lora, metadata=None, dtype=torch.float32):
    save_file(lora, folder / FILE, metadata)
    store = WeightStore(FAMILY, folder)
    read = WeightSets(store, dtype, UNet(store.config("unet")).unet.state_dict()).read
    return read(Weights("4step-lora"), "cpu").unet


def renamed(down, up, alpha, name):
    ends = {"lora_down.weight": down, "lora_up.weight": up, "alpha": alpha}
    parts = {key: key.split(".", 1) for key in LORA}
    return {f"{name(DIFFUSERS[stem])}.{ends[end]}": LORA[key] for key, (stem, end) in parts.items() if ends[end]}


def stability(module):
    return f"lora_unet_{_stability_name(module, 2).replace('.', '_')}"


@pytest.mark.parametrize(
    ("lora", "metadata", "scale"),
    [
        (LORA, None, 0.5),  # alpha 6, rank 12
        (renamed("lora_down.weight", "lora_up.weight", "alpha", stability), None, 0.5),
        (renamed("lora_A.weight", "lora_B.weight", "alpha", "unet.{}".format), None, 0.5),
        (renamed("lora_A.weight", "lora_B.weight", None, "unet.{}".format), None, 1.0),
        (renamed("lora.down.weight", "lora.up.weight", None, "unet.{}".format), None, 1.0),
        (renamed("lora_A.weight", "lora_B.weight", None, "unet.{}".format), {"unet.lora_alpha": 3, "unet.r": 12}, 0.25),
        (LORA | {f"{KOHYA}.alpha": torch.tensor(24.0)}, None, 0.5),
    ],
)
def test_every_tensor_is_used_with_its_scale_under_every_naming(embedded_copy, lora, metadata, scale):
    ours = fused(embedded_copy, lora, metadata and {"lora_adapter_metadata": json.dumps(metadata)})
    changed = 0
    for stem, module in DIFFUSERS.items():
        weight = BASE[f"{module}.weight"].float()
        if f"{stem}.alpha" in LORA:
            down, up = LORA[f"{stem}.lora_down.weight"].float(), LORA[f"{stem}.lora_up.weight"].float()
            alone = 2.0 if stem == KOHYA and lora.get(f"{KOHYA}.alpha") == 24 else scale
            weight, changed = weight + alone * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape), changed + 1
        torch.testing.assert_close(ours[f"{module}.weight"].contiguous(), weight, rtol=1e-6, atol=1e-6)
    assert changed * 3 == len(LORA)


def without(*keys):
    return {key: tensor for key, tensor in LORA.items() if key not in keys}


def beside(key, tensor=None):
    return LORA | {key: torch.ones(4, 4) if tensor is None else tensor}


OTHERS = {
    "lora_mid.weight": "a LoRA with a third matrix",
    "hada_w1_a": "LoHa",
    "lokr_w1": "LoKr",
    "dora_scale": "DoRA",
    "oft_blocks": "OFT",
    "diff": "a difference of whole weights",
}
TE = "lora_te1_text_model_encoder_layers_0_mlp_fc1"


@pytest.mark.parametrize(
    ("lora", "named"),
    [
        ({}, "no tensor"),
        ({f"{TE}.{end}": torch.ones(4, 4) for end in ("lora_down.weight", "lora_up.weight", "alpha")}, TE),
        (beside(f"{TE}.lora_down.weight"), f"{TE}.lora_down.weight"),
        (beside("text_encoder.x.lora_A.weight"), "text_encoder.x.lora_A"),
        (beside("text_model.embeddings.position_ids", torch.arange(24)), "position_ids"),
        (beside("lora_unet_nowhere.lora_down.weight"), "lora_unet_nowhere"),
        *((beside(f"{KOHYA}.{end}"), f"{KOHYA}.{end} is of {name}") for end, name in OTHERS.items()),
        ({"clip_l": torch.ones(4, 4), "clip_g": torch.ones(4, 4)}, "an embedding"),
        ({"transformer.single_blocks.0.lora_A.weight": torch.ones(4, 4)}, "another model"),
        ({"model.diffusion_model.out.2.weight": torch.ones(4, 4)}, "a checkpoint"),
        (beside(f"unet.{MODULE}.lora_A.weight"), "not one of its own"),
        (without(f"{KOHYA}.alpha"), KOHYA),
        (without(f"{KOHYA}.lora_up.weight"), KOHYA),
        (without(f"{KOHYA}.lora_down.weight"), KOHYA),
        (beside(f"{KOHYA}.lora_down.weight", torch.ones(12, 5)), "do not fit"),
        (beside(f"{KOHYA}.lora_up.weight", torch.ones(5, 12)), "do not fit"),
        (beside(f"{KOHYA}.lora_down.weight", torch.ones(())), "do not fit"),
        (
            beside(f"{KOHYA}.lora_down.weight", LORA[f"{KOHYA}.lora_down.weight"][:0])
            | {f"{KOHYA}.lora_up.weight": LORA[f"{KOHYA}.lora_up.weight"][:, :0]},
            "do not fit",
        ),
        (beside(f"{KOHYA}.alpha", torch.ones(2)), "not one number"),
        (beside(f"{KOHYA}.alpha", torch.tensor(torch.nan)), f"{KOHYA}.alpha has NaN"),
        ({key: tensor.to(torch.int8) for key, tensor in LORA.items()}, "not floating point"),
    ],
)
def test_a_file_with_a_tensor_that_cannot_be_used_is_refused_by_its_name(embedded_copy, lora, named):
    with pytest.raises(BadWeights, match=named) as refused:
        fused(embedded_copy, {key: tensor.contiguous() for key, tensor in lora.items()})
    assert FILE in str(refused.value)


@pytest.mark.parametrize(
    "told",
    [
        '{"unet.use_dora": true}',
        '{"unet.alpha_pattern": {"x": 2}}',
        '{"unet.alpha_pattern": {"x": "y"}}',
        '{"unet.init_lora_weights": "pissa"}',
        "[]",
        "{",
    ],
)
def test_an_adapters_metadata_that_are_not_read_are_refused(embedded_copy, told):
    with pytest.raises(BadWeights, match="lora_adapter_metadata"):
        fused(embedded_copy, LORA, {"lora_adapter_metadata": told})


def test_a_sum_that_the_dtype_cannot_hold_is_refused(embedded_copy):
    with pytest.raises(BadWeights, match="more than"):
        fused(embedded_copy, beside(f"{KOHYA}.alpha", torch.tensor(1e9)), dtype=torch.float16)


def test_stability_ais_names_are_the_ones_that_diffusers_reads():
    """On SDXL's own layout."""
    config = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (320, 640, 1280),
        "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [5, 10, 20],
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    }
    unet = UNet(config).unet
    layers = [key[:-7] for key, weight in unet.state_dict().items() if key.endswith(".weight") and weight.ndim > 1]
    state, expected = {}, {}
    for module in layers:
        for end in ("lora_down.weight", "lora_up.weight"):
            tensor = state[f"lora_unet_{_stability_name(module, 3).replace('.', '_')}.{end}"] = torch.zeros(1)
            expected[id(tensor)] = module
    theirs = convert_unet_state_dict_to_peft(
        StableDiffusionXLPipeline.lora_state_dict(dict(state), unet_config=unet.config)[0]
    )
    found = {id(tensor): key.removeprefix("unet.").split(".lora_")[0] for key, tensor in theirs.items()}
    assert {key: name.replace(".processor", "") for key, name in found.items()} == expected
