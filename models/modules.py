"""The nn modules of a family: text encoders, decoder, UNet; and how the first two get their weights."""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from torch.func import functional_call
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from models import weights

WeightSet = dict[str, Tensor]
# UNet(latents, timestep (B,), prompt_embeds (B, L, C), pooled (B, P), time_ids (B, 6)) -> (B, 4, h, w)
UNetFunction = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]

FLAT = 1 / 255  # a picture that deviates less than this in every channel is of one colour: a numeric fault, no picture


class TextEncoders(nn.Module):
    """CLIP ViT-L and OpenCLIP bigG (or their miniatures), as diffusers' SDXL pipeline uses them."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, ids: Tensor, ids_2: Tensor) -> tuple[Tensor, Tensor]:
        """ids, ids_2: (B, L) int64. Returns prompt_embeds (B, L, C) and pooled (B, P)."""
        one = self.first(ids, output_hidden_states=True)
        two = self.second(ids_2, output_hidden_states=True)
        # "2" because SDXL reads the penultimate layer (SDXL report, sec. 2.1).
        return torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=-1), two.text_embeds

    @torch.inference_mode()
    def styled(self, factors: WeightSet, ids: Tensor, ids_2: Tensor) -> tuple[Tensor, Tensor]:
        """The same where each weight is W + up @ down, by factors as models.weightset.WholeSet has them. The sums are
        made anew each time, since they would take as much memory as the encoders; and row by row, so that no row
        depends on its neighbours. Not for two threads at a time: the module has these weights meanwhile."""
        modules = {"text_encoder": "first", "text_encoder_2": "second"}
        own, changed = dict(self.named_parameters()), {}
        for key in factors:
            part, name = key.removesuffix(".up").split(".", 1)
            if key.endswith(".up"):
                weight = own[f"{modules[part]}.{name}"]
                total = weight.float() + factors[key] @ factors[f"{part}.{name}.down"]
                changed[f"{modules[part]}.{name}"] = total.to(weight.dtype)
        rows = [functional_call(self, changed, pair) for pair in zip(ids.split(1), ids_2.split(1), strict=True)]
        embeds, pooled = zip(*rows, strict=True)
        return torch.cat(embeds), torch.cat(pooled)


class Decoder(nn.Module):
    """The VAE's decoder with the way to bytes behind it, so that only bytes leave the device."""

    def __init__(self, vae: Any, scaling_factor: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.vae, self.scaling_factor, self.dtype = vae, scaling_factor, dtype

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """latents: (B, 4, h, w) float32. Returns pictures (B, 8h, 8w, 3) uint8, and (B,) bool: is it valid, that is
        neither flat in every channel nor anywhere NaN or Inf?"""
        latents = latents / self.scaling_factor  # 0.13025 for SDXL, from vae/config.json
        raw = self.vae.decode(latents.to(self.dtype), return_dict=False)[0].float()
        pixels = (raw / 2 + 0.5).clamp(0, 1)
        valid = (pixels.flatten(2).std(dim=2).amax(dim=1) >= FLAT) & raw.isfinite().flatten(1).all(dim=1)
        return (pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous(), valid

    def in_float32(self) -> "Decoder":
        """A copy that computes in float32: 0.3 GB for SDXL."""
        return Decoder(copy.deepcopy(self.vae).float(), self.scaling_factor, torch.float32)


class Encoder(nn.Module):
    """The VAE's encoder with the way from bytes before it."""

    def __init__(self, vae: Any, scaling_factor: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.vae, self.scaling_factor, self.dtype = vae, scaling_factor, dtype

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """pictures: (B, 8h, 8w, 3) uint8. Returns mean and standard deviation of their latents, both (B, 4, h, w)
        float32."""
        raw = pictures.permute(0, 3, 1, 2).float() / 255 * 2 - 1
        moments = self.vae.encode(raw.to(self.dtype), return_dict=False)[0].parameters.float()
        mean, log_variance = moments.chunk(2, dim=1)
        std = (log_variance.clamp(-30, 20) / 2).exp()  # diffusers' bounds (DiagonalGaussianDistribution)
        return mean * self.scaling_factor, std * self.scaling_factor

    def in_float32(self) -> "Encoder":
        """A copy that computes in float32: 0.3 GB for SDXL."""
        return Encoder(copy.deepcopy(self.vae).float(), self.scaling_factor, torch.float32)


class UNet(nn.Module):
    """diffusers' UNet with plain tensor arguments, so that it can be exported and captured."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        if (channels := config.get("in_channels", 4)) != 4:
            raise weights.BadWeights(f"unet/config.json: in_channels must be 4, not {channels}: for inpainting it is 9")
        with init_empty_weights():
            self.unet = UNet2DConditionModel.from_config(config).eval().requires_grad_(False)

    def forward(self, latents: Tensor, timestep: Tensor, embeds: Tensor, pooled: Tensor, time_ids: Tensor) -> Tensor:
        """Shapes as in UNetFunction; embeds may be project(embeds)."""
        added = {"text_embeds": pooled, "time_ids": time_ids}
        out: Tensor = self.unet(latents, timestep, self.project(embeds), added_cond_kwargs=added, return_dict=False)[0]
        return out

    def project(self, embeds: Tensor) -> Tensor:
        """Embeddings of prompts as this UNet reads them fastest, made once per request."""
        return embeds

    def packed(self, weight_set: WeightSet) -> WeightSet:
        """A weight set as take() wants it."""
        return weight_set

    @torch.inference_mode()
    def take(self, weight_set: WeightSet) -> None:
        """Compute with this weight set from now on, where it lies."""
        self.unet.load_state_dict(weight_set, strict=True, assign=True)


TEXT_ENCODERS = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}


def load_text_encoders(store: weights.WeightStore, place: str, dtype: torch.dtype) -> TextEncoders:
    """Both text encoders with their weights, on a device. Raises MissingWeights, BadWeights."""
    return TextEncoders(
        *(_filled(lambda: _text_encoder(store, part), store, part, place, dtype) for part in TEXT_ENCODERS)  # noqa: B023
    )


def text_shapes(store: weights.WeightStore) -> dict[str, WeightSet]:
    """The state of each text encoder, for names and shapes: it holds no numbers."""
    # Not init_empty_weights(), which changes modules in all threads: another may give the UNet its weights meanwhile.
    with torch.device("meta"):
        return {part: _text_encoder(store, part).state_dict() for part in TEXT_ENCODERS}


def _text_encoder(store: weights.WeightStore, part: str) -> nn.Module:
    encoder: nn.Module = TEXT_ENCODERS[part](CLIPTextConfig.from_dict(store.config(part)))
    return encoder


def load_decoder(store: weights.WeightStore, place: str, dtype: torch.dtype) -> Decoder:
    """The decoder with its weights, on a device. Raises MissingWeights, BadWeights."""
    config = store.config("vae")
    if moved := [key for key in ("latents_mean", "latents_std", "shift_factor") if config.get(key) is not None]:
        raise weights.BadWeights(f"vae/config.json: {moved[0]} is not what SDXL's latents are made with")
    scale: Any = config.get("scaling_factor")
    if type(scale) not in (int, float) or not 0 < scale < math.inf:
        raise weights.BadWeights(f"vae/config.json: scaling_factor must be a number above 0, not {scale!r}")
    vae = _filled(lambda: AutoencoderKL.from_config(config), store, "vae", place, dtype)
    return Decoder(vae, scale, dtype)


def _filled(
    make: Callable[[], nn.Module], store: weights.WeightStore, part: str, place: str, dtype: torch.dtype
) -> nn.Module:
    state = store.read(part, place, dtype)
    with init_empty_weights():  # random numbers for 0.7 billion parameters would take seconds
        module = make()
    if (ids := state.pop(weights.POSITION_IDS, None)) is not None and ids.flatten().tolist() != [*range(ids.numel())]:
        raise weights.BadWeights(f"{part}: {weights.POSITION_IDS} are not 0, 1, 2 and so on")
    if not any(key.startswith("text_model.") for key in module.state_dict()):
        # SDXL's files have CLIP's older names; transformers 5 dropped the prefix from CLIPTextModel
        renamed = {key.removeprefix("text_model."): tensor for key, tensor in state.items()}
        if len(renamed) < len(state):
            raise weights.BadWeights(f"{part}: it has a tensor twice, with the prefix text_model and without")
        state = renamed
    weights.check_fit(module.state_dict(), state, part)
    module.load_state_dict(state, strict=True, assign=True)
    module = module.to(place, dtype).eval().requires_grad_(False)
    laid_out: nn.Module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return laid_out
