"""The pipeline: prompts to conditioning, latents to latents, latents to pictures. It holds no request and no clock."""

import copy
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL
from torch import Tensor, nn
from transformers import (
    BatchEncoding,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedModel,
)

from models import weights
from models.schedule import Schedule, euler_step, model_input

# UNet(latents, timestep (B,), prompt_embeds (B, L, C), pooled (B, P), time_ids (B, 6)) -> (B, 4, h, w)
UNetFunction = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
# Step(latents, table, prompt_embeds, pooled, time_ids) -> latents: advance() with its UNet filled in
Step = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]

PROMPTS_CACHED = 1024  # prompts; SDXL's take 318 KB each in fp16 (77 x 2048 + 1280), so 0.3 GB in all
STEPS_PRIORITY = -1  # of the CUDA stream that steps and encodes share; it goes before 0, the decodes'
FLAT = 1 / 255  # a picture whose pixels deviate less than this is black or blank: a numeric fault, not a picture


@dataclass(frozen=True)
class Conditioning:
    """One prompt as the UNet reads it. prompt_embeds: (L, C), pooled: (P,), both in the model's dtype.
    truncated: the prompt had more tokens than the text encoders take, and its end was cut."""

    prompt_embeds: Tensor
    pooled: Tensor
    truncated: bool


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


class Decoder(nn.Module):
    """The VAE's decoder with the way to bytes behind it, so that only bytes leave the device."""

    def __init__(self, vae: Any, scaling_factor: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.vae, self.scaling_factor, self.dtype = vae, scaling_factor, dtype

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """latents: (B, 4, h, w) float32. Returns pictures (B, 8h, 8w, 3) uint8, and (B,) bool: is it
        sound, that is neither flat nor anywhere NaN or Inf?"""
        latents = latents / self.scaling_factor  # 0.13025 for SDXL, from vae/config.json
        raw = self.vae.decode(latents.to(self.dtype), return_dict=False)[0].float()
        pixels = (raw / 2 + 0.5).clamp(0, 1)
        sound = (pixels.flatten(1).std(dim=1) >= FLAT) & raw.isfinite().flatten(1).all(dim=1)
        return (pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous(), sound


def advance(
    unet: UNetFunction, latents: Tensor, table: Tensor, embeds: Tensor, pooled: Tensor, time_ids: Tensor
) -> Tensor:
    """One step of every row: all that a CUDA graph holds. latents: (B, 4, h, w) float32. table: (B, 4), the rows of
    models.schedule.Schedule.table. The rest as the UNet takes it."""
    timestep, sigma, sigma_next, predicts_sample = table.unbind(1)
    scaled = model_input(latents, sigma).to(embeds.dtype).contiguous(memory_format=torch.channels_last)
    out = unet(scaled, timestep.contiguous(), embeds, pooled, time_ids)  # compiled code reads it as it lies
    return euler_step(latents, out.float(), sigma, sigma_next, predicts_sample)


class Pipeline:
    """Everything of a family but the UNet's weights, which the registry owns.

    steps: how to step a UNet where there is a faster way than to call it (models.graphs); text and decoder are replaced
    in place for the same end.
    """

    def __init__(self, store: weights.WeightStore, device: str, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        on_gpu = device.startswith("cuda")
        self._steps_stream = torch.cuda.Stream(priority=STEPS_PRIORITY) if on_gpu else None
        self._decode_stream = torch.cuda.Stream(priority=0) if on_gpu else None
        self.use_stream()
        self.tokenizers = [
            CLIPTokenizer.from_pretrained(store.component_folder(part), local_files_only=True)
            for part in ("tokenizer", "tokenizer_2")
        ]
        self.text: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = TextEncoders(
            self._text_encoder(store, "text_encoder", CLIPTextModel),
            self._text_encoder(store, "text_encoder_2", CLIPTextModelWithProjection),
        )
        vae_config = store.config("vae")
        vae = self._filled(lambda: AutoencoderKL.from_config(vae_config), store, "vae")
        self.vae = Decoder(vae, vae_config["scaling_factor"], dtype)
        self.decoder: Callable[[Tensor], tuple[Tensor, Tensor]] = self.vae
        self.steps: dict[UNetFunction, Step] = {}
        self.latent_channels: int = vae_config["latent_channels"]
        self.vae_scale = 2 ** (len(vae_config["block_out_channels"]) - 1)  # pixels per latent, 8
        self._prompts: OrderedDict[str, Conditioning] = OrderedDict()

    def use_stream(self) -> None:
        """Make what this thread does on a GPU go first there, and in one order with what others do that called this.
        To be called by each thread that encodes or steps; the one that made the pipeline has."""
        if self._steps_stream is not None:
            torch.cuda.set_stream(self._steps_stream)

    def _text_encoder(self, store: weights.WeightStore, part: str, kind: type[PreTrainedModel]) -> nn.Module:
        return self._filled(lambda: kind(CLIPTextConfig.from_dict(store.config(part))), store, part)

    def _filled(self, make: Callable[[], nn.Module], store: weights.WeightStore, part: str) -> nn.Module:
        state = weights.read(store.component_file(part), self.device)
        with init_empty_weights():  # random numbers for 0.7 billion parameters would take seconds
            module = make()
        state.pop("text_model.embeddings.position_ids", None)  # older exports of CLIP carry this constant
        if not any(key.startswith("text_model.") for key in module.state_dict()):
            # SDXL's files have CLIP's older names; transformers 5 dropped the prefix from CLIPTextModel
            state = {key.removeprefix("text_model."): tensor for key, tensor in state.items()}
        fill(module, state, part)
        module = module.to(self.device, self.dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return module.eval().requires_grad_(False)

    @torch.inference_mode()
    def encode(self, prompts: Sequence[str]) -> list[Conditioning]:
        """Conditioning of each prompt; new prompts go through the text encoders in one batch, known ones are cached."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._prompts]
        if new:
            tokens = [self._tokenize(tokenizer, new) for tokenizer in self.tokenizers]
            embeds, pooled = self.text(*(self.to_device(each.input_ids) for each in tokens))
            is_full = (tokens[0].attention_mask | tokens[1].attention_mask).all(dim=1).tolist()
            for row, prompt in enumerate(new):
                is_cut = is_full[row] and self._is_cut(prompt)
                self._prompts[prompt] = Conditioning(embeds[row].clone(), pooled[row].clone(), is_cut)
        found = []
        for prompt in prompts:
            self._prompts.move_to_end(prompt)
            found.append(self._prompts[prompt])
        while len(self._prompts) > PROMPTS_CACHED:
            self._prompts.popitem(last=False)
        return found

    @staticmethod
    def _tokenize(tokenizer: CLIPTokenizer, prompts: list[str]) -> BatchEncoding:
        return tokenizer(
            prompts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
        )

    def _is_cut(self, prompt: str) -> bool:
        return any(len(tokenizer(prompt).input_ids) > tokenizer.model_max_length for tokenizer in self.tokenizers)

    def noise(self, seed: int, height: int, width: int, schedule: Schedule) -> Tensor:
        """The starting latents of one picture, (4, h, w) float32: diffusers' own, from a CPU generator, so that a seed
        means the same picture on every device and in any batch."""
        generator = torch.Generator("cpu").manual_seed(seed)
        shape = (1, self.latent_channels, height // self.vae_scale, width // self.vae_scale)
        noise = torch.randn(shape, generator=generator, dtype=torch.float32)[0]
        return self.to_device(noise) * schedule.sigmas[0]  # trailing: init_noise_sigma = sigma_max

    def to_device(self, tensor: Tensor) -> Tensor:
        """A host tensor on the device; through pinned memory, so that the host need not wait."""
        return tensor if self._steps_stream is None else tensor.pin_memory().to(self.device, non_blocking=True)

    @torch.inference_mode()
    def project(self, unet: UNetFunction, row: Conditioning) -> Conditioning:
        """The row with the cross-attentions' keys and values of its prompt in place of the embeddings, if the UNet
        takes them (models.attention). They depend on prompt and weights alone: once a request instead of each step."""
        project = getattr(unet, "project", None)
        return row if project is None else replace(row, prompt_embeds=project(row.prompt_embeds))

    @torch.inference_mode()
    def denoise(
        self,
        unet: UNetFunction,
        schedule: Schedule,
        latents: Tensor,
        step: Tensor,
        conditioning: Sequence[Conditioning],
    ) -> Tensor:
        """One step of every row, wherever each row stands. Waits for nothing on the host.

        latents: (B, 4, h, w) float32. step: (B,) int64 on the device, each row's index into the schedule.
        conditioning: B rows, all as encode() gave them or all as project() did.
        """
        height, width = (side * self.vae_scale for side in latents.shape[-2:])
        embeds = torch.stack([row.prompt_embeds for row in conditioning])
        pooled = torch.stack([row.pooled for row in conditioning])
        time_ids = self._time_ids(height, width).repeat(len(conditioning), 1)  # compiled code reads it as it lies
        run = self.steps.get(unet) or partial(advance, unet)
        return run(latents, schedule.table[step], embeds, pooled, time_ids)

    def _time_ids(self, height: int, width: int) -> Tensor:
        # SDXL's micro-conditioning: original size, crop corner, target size; in the model's dtype, as in diffusers
        return self.to_device(torch.tensor([[height, width, 0, 0, height, width]], dtype=self.dtype))

    @torch.inference_mode()
    def decode(self, latents: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Pictures (B, H, W, 3) uint8, and (B,) bool, False where one is NaN or flat; both on the host.

        Blocks the calling thread and no other: called beside the thread that denoises, it overlaps the next steps; on
        a GPU on a stream of its own. latents: B of (4, h, w), which the device has finished (synchronize() after their
        last step). What float16 could not hold is decoded once more in float32.
        """
        pixels, sound = self._decode(self.decoder, latents)
        if self.dtype is torch.float16 and not sound.all():
            # Made anew each time, 0.3 GB for SDXL: with weights that are right for float16 it is never needed.
            with torch.cuda.stream(self._decode_stream):  # which reads them; no stream, no effect
                exact = Decoder(copy.deepcopy(self.vae.vae).float(), self.vae.scaling_factor, torch.float32)
                for row in (~sound).nonzero().flatten().tolist():
                    pixels[row : row + 1], sound[row : row + 1] = self._decode(exact, latents[row : row + 1])
        return self._to_host(pixels), sound

    def _decode(
        self, decoder: Callable[[Tensor], tuple[Tensor, Tensor]], latents: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        with torch.cuda.stream(self._decode_stream):
            # Stacked here, not by the caller: on its stream the copy would wait behind the step that runs now.
            pixels, sound = decoder(torch.stack(tuple(latents)))
            return pixels, sound.cpu()  # which waits for both

    def _to_host(self, pixels: Tensor) -> Tensor:
        """In one copy into pinned memory."""
        if self._decode_stream is None:
            return pixels
        with torch.cuda.stream(self._decode_stream):
            host = torch.empty_like(pixels, device="cpu", pin_memory=True).copy_(pixels, non_blocking=True)
            self._decode_stream.synchronize()
        return host

    def synchronize(self) -> None:
        """Wait until the device has done what it was given."""
        if self._steps_stream is not None:
            torch.cuda.current_stream().synchronize()


def fill(module: nn.Module, state: dict[str, Tensor], name: str) -> None:
    """Load a state dict into a module, every tensor by name and shape. Raises weights.BadWeights where they differ."""
    check_fit(module.state_dict(), state, name)
    module.load_state_dict(state, strict=True, assign=True)


def check_fit(expected: dict[str, Tensor], state: dict[str, Tensor], name: str) -> None:
    """Raises weights.BadWeights, naming `name`, unless `state` has the expected tensors by name and shape."""
    wanted, found = ({key: tuple(value.shape) for key, value in each.items()} for each in (expected, state))
    if wanted != found:
        wrong = sorted(set(wanted.items()) ^ set(found.items()))[:3]
        raise weights.BadWeights(f"{name}: its tensors do not fit this model, first {wrong}")
