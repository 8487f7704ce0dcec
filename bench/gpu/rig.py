"""The rig: SDXL's architecture at full size with RANDOM weights, in the layout of the release. Speed does not depend on
the values of weights, so figures hold for the real ones; pictures do not.

Parameters, as in the release: UNet 2,567,463,684; VAE 83,653,863; text encoders 123,060,480 and 694,659,840. The
tokenizer is the embedded model's, with SDXL's length of 77; the embedding tables have CLIP's 49,408 entries, of which
it uses the first 1,717. The tiny rig has the embedded model's architecture instead, and runs on a CPU.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from models.catalog import CATALOG, Family
from models.gpu.graphs import BUCKETS

EMBEDDED = Path(__file__).parents[2] / "models" / "embedded"
LABEL = "RANDOM_WEIGHTS.txt"  # written last: a rig without it is not whole
TOKENS = {"bos_token_id": 1715, "eos_token_id": 1716, "pad_token_id": 1716}  # of the embedded model's tokenizer
CLIP = {"vocab_size": 49408, "max_position_embeddings": 77, **TOKENS}
CONFIGS: dict[str, dict[str, Any]] = {
    "text_encoder": {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "hidden_act": "quick_gelu", "projection_dim": 768, **CLIP,
    },
    "text_encoder_2": {
        "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
        "hidden_act": "gelu", "projection_dim": 1280, **CLIP,
    },
    "unet": {
        "sample_size": 128, "in_channels": 4, "out_channels": 4, "block_out_channels": [320, 640, 1280],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "layers_per_block": 2, "transformer_layers_per_block": [1, 2, 10], "attention_head_dim": [5, 10, 20],
        "cross_attention_dim": 2048, "use_linear_projection": True, "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
    },
    "vae": {
        "block_out_channels": [128, 256, 512, 512], "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4, "layers_per_block": 2, "latent_channels": 4,
        "norm_num_groups": 32, "sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": False,
    },
}  # fmt: skip
CLASSES = {
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
}
RESIDUAL = ("to_out.0", "ff.net.2", "proj_out", "conv2", "out_proj", "fc2")  # what is added to what came before
DAMPED = 0.5  # gain of those, so that rounding errors do not grow with depth as they would in no trained network
PROMPT = ("attn2.to_out.0", "add_embedding.linear_2")  # the ways that a prompt takes into the UNet
HEARD = 4.0  # gain of those: a prompt is heard less through random weights than through trained ones
PIXEL_STD = 0.5  # of the decoder's -1..1: 64 of 255 before clamping
TYPICAL_LATENT = 10.0  # standard deviation of the latents that random weights end at, roughly


@dataclass(frozen=True)
class Rig:
    """A directory with random weights, and the device and dtype in which they are to run."""

    directory: Path
    family: Family
    device: str
    dtype: torch.dtype

    @property
    def is_toy(self) -> bool:
        """Whether it has the embedded model's size."""
        return self.family.name == "embedded"

    @property
    def settings(self) -> dict[str, str]:
        """The server's, to serve it."""
        dtype = str(self.dtype).removeprefix("torch.")
        return {"MODEL": self.family.name, "MODEL_DIR": str(self.directory), "DEVICE": self.device, "DTYPE": dtype}

    @property
    def probed_in(self) -> torch.dtype:
        """What a module computes in while its outputs are scaled: float16 is too slow on a CPU."""
        return torch.bfloat16 if (self.device, self.dtype) == ("cpu", torch.float16) else self.dtype

    @property
    def batches(self) -> tuple[int, ...]:
        """The batch sizes that are measured."""
        return BUCKETS[:2] if self.is_toy else BUCKETS

    @property
    def sizes(self) -> tuple[int, ...]:
        """The pixels a side that are measured; the first is the headline's."""
        return (128,) if self.is_toy else (1024, 512)

    @property
    def variants(self) -> list[str]:
        """1, 2, 4 and 8 steps."""
        return [f"{steps}step-unet" for steps in (1, 2, 4, 8)]


def build(directory: Path, tiny: bool, device: str, dtype: torch.dtype | None = None) -> Rig:
    """Write the rig, unless it is there: 12.3 GB at full size in float16, for which a CPU needs 16 GB of memory.
    Weights are the same at every build on one kind of device. 4step-unet has a UNet of its own; the other three share
    one, through links. dtype: float16 on a GPU, else float32."""
    dtype = dtype or (torch.float16 if device == "cuda" else torch.float32)
    rig = Rig(directory, CATALOG["embedded" if tiny else "sdxl"], device, dtype)
    if (directory / LABEL).exists():
        return rig
    for part in ("tokenizer", "tokenizer_2", "scheduler"):
        shutil.copytree(EMBEDDED / part, directory / part, dirs_exist_ok=True)
        if part != "scheduler":
            _lengthen(directory / part, 24 if tiny else 77)
    shutil.copy(EMBEDDED / "model_index.json", directory)
    for seed, part in enumerate(("text_encoder", "text_encoder_2", "vae")):
        module = _random(part, rig, seed)
        if part == "vae":
            _scale_pixels(module)
        _save(module, rig, directory / part, "model" if part.startswith("text") else "diffusion_pytorch_model")
    first = _save(_unet(rig, seed=10), rig, directory / "unet", "diffusion_pytorch_model")
    second = _save(_unet(rig, seed=11), rig, directory / "unet-2", "diffusion_pytorch_model")
    for name in rig.variants:
        link = directory / rig.family.variants[name].file
        link.unlink(missing_ok=True)
        link.symlink_to(first if name == "4step-unet" else second)
    (directory / LABEL).write_text("Random numbers in the shapes of a model, for timing. They draw nothing.\n")
    return rig


def _lengthen(folder: Path, length: int) -> None:
    path = folder / "tokenizer_config.json"
    config = {**json.loads(path.read_text()), "model_max_length": length}
    path.write_text(json.dumps(config, indent=1))
    special = {key: config[key] for key in ("bos_token", "eos_token", "pad_token", "unk_token")}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=1))


def _random(part: str, rig: Rig, seed: int) -> Any:
    config = json.loads((EMBEDDED / part / "config.json").read_text()) if rig.is_toy else CONFIGS[part]
    with torch.device(rig.device):
        if part.startswith("text"):
            module = CLASSES[part](CLIPTextConfig.from_dict(config))
        else:
            module = CLASSES[part].from_config(config)
    generator = torch.Generator(rig.device).manual_seed(seed)
    for name, tensor in module.named_parameters():
        _fill(name, tensor.data, generator)
    return module.to(rig.probed_in).eval().requires_grad_(False)


def _fill(name: str, tensor: Tensor, generator: torch.Generator) -> None:
    """Matrices and kernels keep the variance of what goes through them; norms and biases do nothing."""
    owner, _, kind = name.rpartition(".")
    if tensor.ndim < 2:
        tensor.fill_(kind == "weight")
    elif owner.endswith("_embedding"):  # token and position tables; a time embedding's layers are called linear_1, _2
        tensor.normal_(generator=generator)
    else:
        gain = HEARD if owner.endswith(PROMPT) else DAMPED if owner.endswith(RESIDUAL) else 1.0
        tensor.normal_(std=gain * tensor[0].numel() ** -0.5, generator=generator)


@torch.inference_mode()
def _scale_pixels(vae: Any) -> None:
    side = vae.config.sample_size // 8
    shape = (1, vae.config.latent_channels, min(side, 64), min(side, 64))
    generator = torch.Generator(vae.device).manual_seed(0)
    latents = TYPICAL_LATENT * torch.randn(shape, generator=generator, device=vae.device)
    pixels = vae.decode((latents / vae.config.scaling_factor).to(vae.dtype)).sample
    vae.decoder.conv_out.weight *= PIXEL_STD / pixels.float().std()


@torch.inference_mode()
def _unet(rig: Rig, seed: int) -> Any:
    """A UNet whose prediction has a standard deviation of 1, as noise has."""
    unet = _random("unet", rig, seed)
    side, width = unet.config.sample_size if rig.is_toy or rig.device != "cpu" else 64, unet.config.cross_attention_dim
    pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=rig.device).to(rig.probed_in)

    generator = torch.Generator(rig.device).manual_seed(seed)
    time_ids = torch.tensor([[8 * side, 8 * side, 0, 0, 8 * side, 8 * side]], device=rig.device, dtype=rig.probed_in)
    added = {"text_embeds": noise(1, pooled), "time_ids": time_ids}
    out = unet(noise(1, 4, side, side), 999, noise(1, 77, width), added_cond_kwargs=added).sample
    unet.conv_out.weight /= out.float().std()
    return unet


def _save(module: Any, rig: Rig, folder: Path, name: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    config = module.config
    text = (
        json.dumps(config.to_dict(), indent=1, default=str) if hasattr(config, "to_dict") else module.to_json_string()
    )
    (folder / "config.json").write_text(text)
    path = folder / f"{name}.safetensors"
    module.to(rig.dtype)
    save_file({key: tensor.contiguous() for key, tensor in module.state_dict().items()}, path)
    return path.absolute()
