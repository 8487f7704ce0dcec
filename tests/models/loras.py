"""LoRA files of every kind, made on the spot: random numbers under the names that trainers give them."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from models.catalog import CATALOG
from models.lora import _stability_name
from models.modules import UNet, text_shapes
from models.weights import WeightStore

STORE = WeightStore(CATALOG["embedded"])
STATES = {"unet": UNet(STORE.config("unet")).unet.state_dict(), **text_shapes(STORE)}
KOHYA = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
PARTS = tuple(KOHYA)
Factors = dict[tuple[str, str], tuple[Tensor, Tensor, float]]  # by part and module: down, up, alpha


def layers(part: str, kinds: str = "") -> list[str]:
    """Linear layers ("l") and convolutions ("c") of a part that a LoRA may change."""
    dims = {2: "l", 4: "c"}
    return [
        key.removesuffix(".weight")
        for key, weight in STATES[part].items()
        if key.endswith(".weight") and "embeddings." not in key and dims.get(weight.ndim, "-") in (kinds or "lc")
    ]


def factors(modules: dict[str, list[str]], seed: int, ranks: tuple[int, ...] = (4,), alpha: float = 2.0) -> Factors:
    """Random ones, as strong as a style: ranks take turns, and alphas with them."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for part, names in modules.items():
        for index, name in enumerate(names):
            weight, rank = STATES[part][f"{name}.weight"], ranks[index % len(ranks)]
            down = torch.randn(rank, *weight.shape[1:], generator=generator) / weight[0].numel() ** 0.5
            up = torch.randn(len(weight), rank, *[1] * (weight.ndim - 2), generator=generator) * 0.1
            made[part, name] = (down, up, alpha * (1 + index % len(ranks)))
    return made


def older(part: str, module: str) -> str:
    """A module's name before transformers 5, in which files have it."""
    is_in_blocks = part != "unet" and module != "text_projection"
    return f"text_model.{module.removeprefix('text_model.')}" if is_in_blocks else module


def kohya(made: Factors, stability: bool = False) -> dict[str, Tensor]:
    """kohya's names; those of Stability AI's UNet, in which it trains SDXL, or diffusers'."""
    state = {}
    for (part, module), (down, up, alpha) in made.items():
        bare = _stability_name(module, 2) if part == "unet" and stability else older(part, module)
        stem = f"{KOHYA[part]}_{bare.replace('.', '_')}"
        state |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(alpha)}
    return state


def peft(made: Factors) -> dict[str, Tensor]:
    """What diffusers' save_lora_weights writes, without its metadata: alpha is the rank."""
    state = {}
    for (part, module), (down, up, _) in made.items():
        bare = older(part, module)
        state |= {f"{part}.{bare}.lora_A.weight": down, f"{part}.{bare}.lora_B.weight": up}
    return state


def folded(made: Factors) -> dict[str, Tensor]:
    """The same change in the one form in which diffusers 0.42 reads any alpha: within the matrices."""
    return peft({key: (down, up * alpha / len(down), alpha) for key, (down, up, alpha) in made.items()})


def told(made: Factors) -> dict[str, object]:
    """The metadata that diffusers writes beside PEFT's names: the alphas of all modules."""
    alphas = {}
    for part in KOHYA:
        own = {older(part, module): alpha for (each, module), (_, _, alpha) in made.items() if each == part}
        alphas |= {f"{part}.lora_alpha": 1.0, f"{part}.alpha_pattern": own} if own else {}
    return alphas


def write(folder: Path, name: str, state: dict[str, Tensor], metadata: dict[str, object] | None = None) -> None:
    """As LORA_DIR wants it."""
    folder.mkdir(exist_ok=True, parents=True)
    told = {"lora_adapter_metadata": json.dumps(metadata)} if metadata else None
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, folder / f"{name}.safetensors", told)
