"""The autoencoder: SDXL's AutoencoderKL, 0.86 M parameters, 128 px to 4 x 16 x 16 latents."""

from __future__ import annotations

import math
import random
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from distill import data
from distill.training import Log, cosine, device, load, save

LATENT_NOISE = 0.05  # standard deviation, of latents at 1: the decoder must stand the UNet's small errors
SCALING_FACTOR = 0.13025  # SDXL's: latents are multiplied by it after encoding, divided before decoding

BATCH = 8
PEAK = 1e-3  # learning rate
CHANNELS = (16, 32, 48, 64)


def build(channels: tuple[int, ...] = CHANNELS) -> AutoencoderKL:
    depth = len(channels)
    return AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * depth,
        up_block_types=("UpDecoderBlock2D",) * depth,
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=data.SIZE,
        scaling_factor=SCALING_FACTOR,
        force_upcast=False,
    )


def to_pixels(pictures: np.ndarray) -> Tensor:
    """uint8 (B, H, W, 3) to float (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def mean_latents(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """The posterior's mean, (B, 4, H/8, W/8): its variance is fixed, so nothing is drawn."""
    moments: Tensor = vae.quant_conv(vae.encoder(pixels))
    return moments[:, :4]


def reconstruction_loss(drawn: Tensor, pixels: Tensor) -> Tensor:
    """L1 + MSE + L1 of the gradients (edges are what makes an emoji look sharp)."""
    error = drawn - pixels
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + error.square().mean() + edges


@torch.no_grad()
def start_at_unit_variance(vae: AutoencoderKL, pixels: Tensor) -> None:
    """Scale quant_conv so that latents start at std 1, and fix the variance head at LATENT_NOISE."""
    vae.quant_conv.weight[:4] /= mean_latents(vae, pixels).std()
    vae.quant_conv.weight[4:] = 0
    vae.quant_conv.bias[4:] = 2 * math.log(LATENT_NOISE)


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, pixels: Tensor) -> None:
    """Give each latent channel mean 0 and std 1 / SCALING_FACTOR. Exact: the two 1x1 convolutions absorb it."""
    z = mean_latents(vae, pixels).float()
    mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3)) * SCALING_FACTOR
    vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ mean
    vae.post_quant_conv.weight *= std.view(1, 4, 1, 1)
    vae.quant_conv.bias[:4] = (vae.quant_conv.bias[:4] - mean) / std
    vae.quant_conv.weight[:4] /= std.view(4, 1, 1, 1)
    vae.quant_conv.bias[4:] -= 2 * math.log(SCALING_FACTOR)


@torch.no_grad()
def psnr(vae: AutoencoderKL, pixels: Tensor) -> float:
    drawn = vae.decode(mean_latents(vae, pixels)).sample.clamp(-1, 1)
    return 10 * math.log10(4 / (drawn - pixels).square().mean().item())


def train(folder: Path, steps: int, crop_steps: int, channels: tuple[int, ...] = CHANNELS) -> AutoencoderKL:
    """Encoder and decoder together, on whole pictures and then on crops; latents end up normalised.

    Crops of 64 px take four times as many steps in the same time. Colours are what comes last: after 2,000 whole
    pictures (22 dB) a green frog was still orange.
    """
    vae = build(channels).to(device(), memory_format=torch.channels_last)
    start_at_unit_variance(vae, held_out_pixels())
    _fit(vae, vae, folder / "autoencoder.pt", steps)
    _fit(vae, vae, folder / "autoencoder-crops.pt", crop_steps, crop=64)
    normalise_latents(vae, held_out_pixels())
    return vae.eval()


def polish_decoder(vae: AutoencoderKL, folder: Path, steps: int) -> None:
    """Only the decoder, on whole pictures: sharper pictures of the same latents, while the UNet trains on them."""
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    _fit(vae, torch.nn.ModuleList([vae.decoder, vae.post_quant_conv]), folder / "decoder.pt", steps)


def held_out_pixels() -> Tensor:
    return to_pixels(data.draw_batch(data.pairs(held_out=True)[::5][:64], random.Random(7))).to(device())


def _fit(vae: AutoencoderKL, trained: torch.nn.Module, path: Path, steps: int, crop: int = data.SIZE) -> None:
    pairs, held_out, params = data.pairs(), held_out_pixels(), list(trained.parameters())
    optimizer = torch.optim.AdamW(params, lr=PEAK, weight_decay=1e-4)
    log = Log(path.with_suffix(".jsonl"), steps, load(path, vae=vae, optimizer=optimizer))
    noise = LATENT_NOISE if trained is vae else LATENT_NOISE / SCALING_FACTOR
    for step in log.steps():
        rng = random.Random(f"{path.stem} {step}")
        x, y = rng.randint(0, data.SIZE - crop), rng.randint(0, data.SIZE - crop)
        pictures = data.draw_batch(rng.choices(pairs, k=BATCH), rng)[:, y : y + crop, x : x + crop]
        pixels = to_pixels(pictures).to(device()).contiguous(memory_format=torch.channels_last)
        for group in optimizer.param_groups:
            group["lr"] = cosine(step, steps, PEAK, warmup=50)
        with torch.autocast(device().type, torch.bfloat16):
            with torch.set_grad_enabled(trained is vae):
                z = mean_latents(vae, pixels)
            drawn = vae.decoder(vae.post_quant_conv(z + noise * torch.randn_like(z)))
        loss = reconstruction_loss(drawn.float(), pixels) + 1e-6 * z.float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        log.note(step, loss=loss)
        if step % 250 == 0 or step == steps:
            log.note(step, psnr=psnr(vae, held_out))
            save(path, step, vae=vae, optimizer=optimizer)
