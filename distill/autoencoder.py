"""The autoencoder: SDXL's AutoencoderKL, 0.86 M parameters, 128 px to 4 x 16 x 16 latents."""

from __future__ import annotations

import math
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from distill import data
from distill.training import Log, cosine, device, load, save

LATENT_NOISE = 0.05  # standard deviation, of latents at 1: the decoder must stand the UNet's small errors
SCALING_FACTOR = 0.13025  # SDXL's: latents are multiplied by it after encoding, divided before decoding


def build(channels: tuple[int, ...] = (16, 32, 48, 64)) -> AutoencoderKL:
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


def to_pixels(pictures) -> Tensor:
    """uint8 (B, H, W, 3) to float (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def mean_latents(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """The posterior's mean, (B, 4, H/8, W/8): its variance is fixed, so nothing is drawn."""
    return vae.quant_conv(vae.encoder(pixels))[:, :4]


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


def train(folder: Path, steps: int, batch: int = 8, lr: float = 1e-3, channels=(16, 32, 48, 64)) -> AutoencoderKL:
    """Train, or go on from folder/autoencoder.pt; the result's latents are normalised."""
    vae = build(channels).to(device(), memory_format=torch.channels_last)
    held_out = to_pixels(data.draw_batch(data.pairs(held_out=True)[::5][:64], random.Random(7))).to(device())
    pairs = data.pairs()
    start_at_unit_variance(vae, held_out)
    params = [p for p in vae.parameters()]
    optimizer = torch.optim.AdamW(params, lr=lr, weight_decay=1e-4)
    path = folder / "autoencoder.pt"
    done = load(path, vae=vae, optimizer=optimizer)
    log = Log(folder / "autoencoder.jsonl", steps, done)
    for step in log.steps():
        rng = random.Random(step)
        pixels = to_pixels(data.draw_batch(rng.choices(pairs, k=batch), rng)).to(device())
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        for group in optimizer.param_groups:
            group["lr"] = cosine(step, steps, lr, warmup=50)
        with torch.autocast(device().type, torch.bfloat16):
            z = mean_latents(vae, pixels)
            drawn = vae.decoder(vae.post_quant_conv(z + LATENT_NOISE * torch.randn_like(z)))
        loss = reconstruction_loss(drawn.float(), pixels) + 1e-6 * z.float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        log.note(step, loss=loss)
        if step % 250 == 0 or step == steps:
            log.note(step, psnr=psnr(vae, held_out))
            save(path, step, vae=vae, optimizer=optimizer)
    normalise_latents(vae, held_out)
    return vae.eval()


if __name__ == "__main__":
    out = Path("runs/embedded")
    train(out, steps=4000).save_pretrained(out / "vae")
