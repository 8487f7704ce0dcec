"""The pipeline: prompts to conditioning, latents to latents, latents to pictures. It holds no request and no clock."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from transformers import BatchEncoding, CLIPTokenizer

from models.device import Device
from models.grid import starts
from models.modules import Encoder, UNetFunction, load_decoder, load_text_encoders
from models.original import Kept, Original, put_back
from models.schedule import Schedule, euler_step, model_input
from models.weights import WeightStore

# Step(latents, table, prompt_embeds, pooled, time_ids) -> latents: advance() with its UNet filled in
Step = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]

PROMPTS_CACHED = 1024  # prompts; SDXL's take 318 KB each in fp16 (77 x 2048 + 1280), so 0.3 GB in all


@dataclass(frozen=True)
class Conditioning:
    """One prompt as the UNet reads it. prompt_embeds: (L, C), pooled: (P,), both in the model's dtype.
    truncated: the prompt had more tokens than the text encoders take, and its end was cut."""

    prompt_embeds: Tensor
    pooled: Tensor
    truncated: bool


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

    text, decoder: replaced in place where there is something faster than the modules. steps: the same for UNets.
    """

    def __init__(self, store: WeightStore, device: Device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.tokenizers = [
            CLIPTokenizer.from_pretrained(store.component_folder(part), local_files_only=True)
            for part in ("tokenizer", "tokenizer_2")
        ]
        for tokenizer, part in zip(self.tokenizers, ("text_encoder", "text_encoder_2"), strict=True):
            # Not what its own folder says: a number above this has no embedding.
            tokenizer.model_max_length = store.config(part).get("max_position_embeddings", 77)  # CLIP's default
        self.text: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = load_text_encoders(store, device.name, dtype)
        self.vae = load_decoder(store, device.name, dtype)
        self.decoder: Callable[[Tensor], tuple[Tensor, Tensor]] = self.vae
        self.encoder = Encoder(self.vae.vae, self.vae.scaling_factor, dtype)
        self.steps: dict[UNetFunction, Step] = {}
        config = store.config("vae")
        self.latent_channels: int = config["latent_channels"]
        self.vae_scale: int = 2 ** (len(config["block_out_channels"]) - 1)  # pixels per latent, 8
        self._prompts: OrderedDict[tuple[str, str], Conditioning] = OrderedDict()

    def draw(
        self,
        unet: UNetFunction,
        schedule: Schedule,
        prompts: Sequence[str],
        seeds: Sequence[int],
        height: int,
        width: int,
        original: Original | None = None,
        strength: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """Pictures of some prompts, start to end, as decode() returns them: what a server does, without one.
        original: the picture that they are drawn over, with a strength of models.grid.starts()."""
        latents = self.sample(unet, schedule, prompts, seeds, height, width, original, strength)
        self.device.wait()
        return self.decode(list(latents))

    def sample(
        self,
        unet: UNetFunction,
        schedule: Schedule,
        prompts: Sequence[str],
        seeds: Sequence[int],
        height: int,
        width: int,
        original: Original | None = None,
        strength: float = 1.0,
    ) -> Tensor:
        """Their latents after the last step, (B, 4, h, w) float32."""
        conditioning = [self.project(unet, row) for row in self.encode(prompts)]
        path, kept = starts(len(schedule.timesteps))[strength], list[Kept | None]()
        if original is None:
            rows = [self.noise(seed, height, width, schedule) for seed in seeds]
        else:
            sigma = schedule.table[path[0], 1]
            begun = [original.begin(self.device, seed, sigma, strength) for seed in seeds]
            rows, kept = [latents for latents, _ in begun], [each for _, each in begun]
        latents = torch.stack(rows)
        for step in path:
            latents = self.denoise(unet, schedule, latents, [step] * len(seeds), conditioning, kept)
        return latents

    @torch.inference_mode()
    def encode(self, prompts: Sequence[str], owners: Sequence[str] | None = None) -> list[Conditioning]:
        """Conditioning of each prompt; new ones go through the text encoders in one batch, known ones are cached.
        owners: who asks for each. They share no cache, for the time that a prompt takes tells whether it is known."""
        asked = list(zip(owners or [""] * len(prompts), prompts, strict=True))
        new = [each for each in dict.fromkeys(asked) if each not in self._prompts]
        if new:
            tokens = [self._tokenize(tokenizer, [prompt for _, prompt in new]) for tokenizer in self.tokenizers]
            embeds, pooled = self.text(*(self.device.put(each.input_ids) for each in tokens))
            is_full = (tokens[0].attention_mask | tokens[1].attention_mask).all(dim=1).tolist()
            for row, each in enumerate(new):
                is_cut = is_full[row] and self._is_cut(each[1])
                self._prompts[each] = Conditioning(embeds[row].clone(), pooled[row].clone(), is_cut)
        found = []
        for each in asked:
            self._prompts.move_to_end(each)
            found.append(self._prompts[each])
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

    def forget_prompts(self) -> None:
        """Encode every prompt anew from now on."""
        self._prompts.clear()

    def noise(self, seed: int, height: int, width: int, schedule: Schedule) -> Tensor:
        """The starting latents of one picture, (4, h, w) float32: diffusers' own, from a CPU generator, so that a seed
        means the same picture on every device and in any batch."""
        generator = torch.Generator("cpu").manual_seed(seed)
        shape = (1, self.latent_channels, height // self.vae_scale, width // self.vae_scale)
        noise = torch.randn(shape, generator=generator, dtype=torch.float32)[0]
        return self.device.put(noise) * schedule.sigmas[0]  # trailing: init_noise_sigma = sigma_max

    @torch.inference_mode()
    def look(self, picture: Tensor, mask: Tensor | None = None) -> Original:
        """A picture to draw over. picture: (H, W, 3) uint8 on the host. mask: (H, W) uint8, above 127 where it is drawn
        anew. As in diffusers the UNet's latents take one pixel in eight of it. What float16 could not hold is encoded
        once more in float32."""
        pixels = self.device.put(picture)[None]
        mean, std = self.encoder(pixels)
        if self.dtype is torch.float16 and not (mean.isfinite() & std.isfinite()).all():
            mean, std = self.encoder.in_float32()(pixels)
        if mask is None:
            return Original(mean[0], std[0])
        seen = (mask[None, :: self.vae_scale, :: self.vae_scale] > 127).float()  # diffusers binarizes at a half
        return Original(mean[0], std[0], self.device.put(seen))

    @torch.inference_mode()
    def project(self, unet: UNetFunction, row: Conditioning) -> Conditioning:
        """The row with its embeddings as the UNet reads them fastest, if it knows such a way (models.gpu.static). They
        depend on prompt and weights alone: made once per request instead of in each step."""
        project = getattr(unet, "project", None)
        return row if project is None else replace(row, prompt_embeds=project(row.prompt_embeds))

    @torch.inference_mode()
    def denoise(
        self,
        unet: UNetFunction,
        schedule: Schedule,
        latents: Tensor,
        steps: Sequence[int],
        conditioning: Sequence[Conditioning],
        kept: Sequence[Kept | None] = (),
    ) -> Tensor:
        """One step of every row, wherever each row stands. Waits for nothing on the host.

        latents: (B, 4, h, w) float32. steps: B, each row's index into the schedule's table.
        conditioning: B rows, all as encode() gave them or all as project() did. kept: B, of those that inpaint.
        """
        height, width = (side * self.vae_scale for side in latents.shape[-2:])
        table = schedule.table[self.device.put(torch.tensor(steps))]
        embeds = torch.stack([row.prompt_embeds for row in conditioning])
        pooled = torch.stack([row.pooled for row in conditioning])
        time_ids = self._time_ids(height, width).repeat(len(conditioning), 1)  # compiled code reads it as it lies
        run = self.steps.get(unet) or partial(advance, unet)
        stepped = run(latents, table, embeds, pooled, time_ids)
        return put_back(stepped, kept, table[:, 2]) if any(kept) else stepped

    def _time_ids(self, height: int, width: int) -> Tensor:
        # SDXL's micro-conditioning: original size, crop corner, target size; in the model's dtype, as in diffusers
        return self.device.put(torch.tensor([[height, width, 0, 0, height, width]], dtype=self.dtype))

    @torch.inference_mode()
    def decode(self, latents: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Pictures (B, H, W, 3) uint8, and (B,) bool, False where one is NaN or flat; both on the host.

        Blocks the calling thread and no other: called beside the thread that denoises, it overlaps the next steps.
        latents: B of (4, h, w), which the device has finished (device.wait() after their last step). What float16
        could not hold is decoded once more in float32.
        """
        with self.device.decoding():
            # Stacked here, not by the caller: on its stream the copy would wait behind the step that runs now.
            pixels, valid = self._decode(self.decoder, latents)
            if self.dtype is torch.float16 and not valid.all():
                exact = self.vae.in_float32()  # each time: with weights that are right for float16 it is never needed
                for row in (~valid).nonzero().flatten().tolist():
                    pixels[row : row + 1], valid[row : row + 1] = self._decode(exact, latents[row : row + 1])
            return self.device.to_host(pixels), valid

    @staticmethod
    def _decode(decoder: Callable[[Tensor], tuple[Tensor, Tensor]], latents: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        pixels, valid = decoder(torch.stack(tuple(latents)))
        return pixels, valid.cpu()  # which waits for both
