"""The pipeline: prompts to conditioning, latents to latents, latents to pictures. It holds no request and no clock."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from models.catalog import Weights
from models.device import Device
from models.grid import starts
from models.modules import Encoder, UNetFunction, WeightSet, load_decoder, load_text_encoders
from models.original import Kept, Original, put_back
from models.preview import clean_latents, to_rgb
from models.prompts import Conditioning, Prompts, TextFunction
from models.schedule import Schedule, euler_step, model_input
from models.weights import WeightStore

# Step(latents, table, prompt_embeds, pooled, time_ids) -> latents: advance() with its UNet filled in
Step = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


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

    text, encoder, decoder: replaced in place where there is something faster than the modules. steps: for UNets.
    """

    def __init__(self, store: WeightStore, device: Device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.encoders = load_text_encoders(store, device.name, dtype)
        self.text: TextFunction = self.encoders
        self.prompts = Prompts(store, lambda *ids: self.text(*map(device.put, ids)))
        self.vae = load_decoder(store, device.name, dtype)
        self.decoder: Callable[[Tensor], tuple[Tensor, Tensor]] = self.vae
        self.encoder: Callable[[Tensor], tuple[Tensor, Tensor]] = Encoder(self.vae.vae, self.vae.scaling_factor, dtype)
        self.steps: dict[UNetFunction, Step] = {}
        config = store.config("vae")
        self.latent_channels: int = config["latent_channels"]
        self.vae_scale: int = 2 ** (len(config["block_out_channels"]) - 1)  # pixels per latent, 8
        self._colours = device.put(torch.tensor(store.family.preview, dtype=torch.float32))

    def prompts_for(self, weights: Weights, factors: WeightSet) -> Prompts:
        """Prompts as some weights' styles read them. factors: as models.registry.Registry.text_factors gives them."""
        if not factors:
            return self.prompts
        return self.prompts.of(
            repr(weights.styles), lambda *ids: self.encoders.styled(factors, *map(self.device.put, ids))
        )

    def draw(
        self,
        unet: UNetFunction,
        schedule: Schedule,
        prompts: Sequence[str],
        seeds: Sequence[int],
        height: int,
        width: int,
        negative: str | None = None,
        guidance: float = 1.0,
        original: Original | None = None,
        strength: float = 1.0,
        through: Prompts | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Pictures of some prompts, start to end, as decode() returns them: what a server does, without one.
        negative, guidance: as in Conditioning, for all of them. original: the picture that they are drawn over, with a
        strength of models.grid.starts(). through: what encodes the prompts, the plain encoders if None."""
        drawn_over = (negative, guidance, original, strength)
        latents = self.sample(unet, schedule, prompts, seeds, height, width, *drawn_over, through)
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
        negative: str | None = None,
        guidance: float = 1.0,
        original: Original | None = None,
        strength: float = 1.0,
        through: Prompts | None = None,
    ) -> Tensor:
        """Their latents after the last step, (B, 4, h, w) float32."""
        through = through or self.prompts
        found = through.encode(prompts)
        if guidance > 1:
            away = None if negative is None else through.encode([negative])[0]
            found = [through.guide(row, away, guidance) for row in found]
        conditioning = [self.project(unet, row) for row in found]
        path = starts(len(schedule.timesteps))[strength]
        begun = [self.begin(seed, height, width, schedule, path, original, strength) for seed in seeds]
        latents, kept = torch.stack([each[0] for each in begun]), [each[1] for each in begun]
        for number, step in enumerate(path):
            noise = [each[2][number] for each in begun if each[2] is not None]
            row = ([schedule] * len(seeds), latents, [step] * len(seeds), conditioning, noise, kept)
            latents = self.denoise(unet, *row)
        return latents

    def noise(self, seed: int, height: int, width: int, schedule: Schedule) -> Tensor:
        """The starting latents of one picture, (4, h, w) float32: diffusers' own, from a CPU generator, so that a seed
        means the same picture on every device and in any batch."""
        return self.device.put(self._draws(seed, height, width, 1)[0]) * schedule.start

    def begin(
        self,
        seed: int,
        height: int,
        width: int,
        schedule: Schedule,
        path: range,
        original: Original | None = None,
        strength: float = 1.0,
    ) -> tuple[Tensor, Kept | None, Tensor | None]:
        """One picture's latents before the first step of its path, what it puts back, and what is added behind each
        step, (N, 4, h, w) float32: the draws that follow noise()'s, as in diffusers; all beforehand, so that a step
        that is made again adds the same. None where it inpaints nothing, and where the sampler adds nothing."""
        added = None if schedule.added is None else schedule.added[path.start : path.stop]
        if original is not None:
            return original.begin(self.device, seed, schedule.table[path[0], 1], strength, added)
        if added is None:
            return self.noise(seed, height, width, schedule), None, None
        first, *drawn = self._draws(seed, height, width, 1 + len(added))
        behind = self.device.put(torch.stack(drawn)) * added.view(-1, 1, 1, 1)
        return self.device.put(first) * schedule.start, None, behind

    def _draws(self, seed: int, height: int, width: int, count: int) -> Tensor:
        generator = torch.Generator("cpu").manual_seed(seed)
        shape = (1, self.latent_channels, height // self.vae_scale, width // self.vae_scale)
        return torch.cat([torch.randn(shape, generator=generator, dtype=torch.float32) for _ in range(count)])

    @torch.inference_mode()
    def look(self, picture: Tensor, mask: Tensor | None = None) -> Original:
        """A picture to draw over. picture: (H, W, 3) uint8 on the host. mask: (H, W) uint8, above 127 where it is drawn
        anew. As in diffusers the UNet's latents take one pixel in eight of it. What float16 could not hold is encoded
        once more in float32."""
        pixels = self.device.put(picture)[None]
        mean, std = self.encoder(pixels)
        if self.dtype is torch.float16 and not (mean.isfinite() & std.isfinite()).all():
            mean, std = Encoder(self.vae.vae, self.vae.scaling_factor, self.dtype).in_float32()(pixels)
        if mask is None:
            return Original(mean[0], std[0])
        seen = (mask[None, :: self.vae_scale, :: self.vae_scale] > 127).float()  # diffusers binarizes at a half
        return Original(mean[0], std[0], self.device.put(seen))

    @torch.inference_mode()
    def project(self, unet: UNetFunction, row: Conditioning) -> Conditioning:
        """The row with its embeddings as the UNet reads them fastest, if it knows such a way (models.gpu.static). They
        depend on prompt and weights alone: made once per request instead of in each step."""
        project = getattr(unet, "project", None)
        if project is None:
            return row
        away = row.away and self.project(unet, row.away)
        return replace(row, prompt_embeds=project(row.prompt_embeds), away=away)

    @torch.inference_mode()
    def denoise(
        self,
        unet: UNetFunction,
        schedules: Sequence[Schedule],
        latents: Tensor,
        steps: Sequence[int],
        conditioning: Sequence[Conditioning],
        noise: Sequence[Tensor] = (),
        kept: Sequence[Kept | None] = (),
    ) -> Tensor:
        """One step of every row, wherever each row stands. Waits for nothing on the host. A guided row is two of the
        UNet's.

        latents: (B, 4, h, w) float32. schedules, steps: B, each row's schedule and its index into that.
        conditioning: B rows, all as Prompts gave them or all as project() did, and all of one length. noise: B, what
        begin() drew for each row's step, (4, h, w) float32; () where the sampler adds nothing. kept: B, of
        those that inpaint.
        """
        height, width = (side * self.vae_scale for side in latents.shape[-2:])
        guided = [index for index, row in enumerate(conditioning) if row.away is not None]
        rows = [*conditioning, *(row.away for row in conditioning if row.away is not None)]
        both = torch.cat([latents, latents[guided]]) if guided else latents
        table = torch.stack([schedules[index].table[steps[index]] for index in (*range(len(steps)), *guided)])
        embeds = torch.stack([row.prompt_embeds for row in rows])
        pooled = torch.stack([row.pooled for row in rows])
        time_ids = self._time_ids(height, width).repeat(len(rows), 1)  # compiled code reads it as it lies
        run = self.steps.get(unet) or partial(advance, unet)
        moved = run(both, table, embeds, pooled, time_ids)
        towards, away = moved[: len(latents)], moved[len(latents) :]
        if guided:
            # A step is linear in the UNet's output: to guide where both lead is to guide what the UNet says. So no row
            # of the UNet's depends on another, and graphs may split them as they like.
            scale = self.device.put(torch.tensor([conditioning[index].guidance for index in guided])).view(-1, 1, 1, 1)
            towards[guided] = away + scale * (towards[guided] - away)
        if noise:
            towards = towards + torch.stack(tuple(noise))
        if any(kept):
            after = torch.stack([schedule.after[step] for schedule, step in zip(schedules, steps, strict=True)])
            towards = put_back(towards, kept, after)
        return towards

    @torch.inference_mode()
    def preview(self, schedules: Sequence[Schedule], before: Tensor, after: Tensor, steps: Sequence[int]) -> Tensor:
        """What a step of denoise() takes for the finished pictures, (B, h, w, 3) uint8 on the host; waits for it.
        before, after: (B, 4, h, w) float32, the latents around the step, without what a
        sampler adds. schedules, steps: B, as denoise() took them."""
        rows = [schedule.table[step] for schedule, step in zip(schedules, steps, strict=True)]
        sigma, sigma_next = torch.stack(rows).unbind(1)[1:3]
        return to_rgb(clean_latents(before, after, sigma, sigma_next), self._colours).cpu()

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
