"""`make teacher`: the base model, trained as SDXL is (epsilon prediction, text dropout for guidance, EMA).

A whole diffusers folder comes out at runs/base; a run that was cut goes on from its checkpoints.
"""

from __future__ import annotations

import copy
import random
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPTokenizer

from distill import autoencoder, data, latents, model, nets, sheets
from distill.diffusion import LAST, STEPS, add_noise, levels
from distill.latents import Latents
from distill.text import token_ids
from distill.training import Ema, Log, average_gradients, begin, cosine, device, is_writer, join_group, load, save

DROPOUT = 0.1  # of the captions, replaced by "" for classifier-free guidance
COARSE = 6000  # iterations that favour high noise; after them backgrounds are right, and what is soft is decided below


@dataclass(frozen=True)
class Sizes:
    """What separates a toy from the shipped model."""

    vae_channels: model.Widths = autoencoder.CHANNELS
    unet_channels: model.Widths = nets.CHANNELS
    heads: model.Widths = nets.HEADS
    vae_steps: int = 2000
    vae_crop_steps: int = 5000
    decoder_steps: int = 1500  # sharper pictures of the same latents: 0.35 s each, and the UNet need not know
    steps: int = 16000
    batch: int = 32
    jitters: int = 2
    every: int = 1  # train on every n-th pair
    compiled: bool = True  # where a compiler is: after two minutes, 3/4 of the time (216 ms, not 294: one thread, AMX)


def draw_times(count: int, step: int, generator: torch.Generator) -> Tensor:
    """Evenly; until COARSE half from 600 .. 999: at 16 x 16 latents the background is decided there (measured in
    shared/tiny-model.md)."""
    high = torch.rand(count, generator=generator) < (0.5 if step <= COARSE else 0.0)
    anywhere = torch.randint(0, STEPS, (count,), generator=generator)
    return torch.where(high, torch.randint(600, LAST + 1, (count,), generator=generator), anywhere)


def epsilon_loss(predicted: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """MSE, each sample weighted by 1 + 0.1 sigma^2: a small epsilon error at high noise is a large x0 error."""
    signal, spread = levels(t)
    weight = 1 + 0.1 * (spread / signal).square().flatten()
    return ((predicted - noise).square().mean((1, 2, 3)) * weight).mean()


def batch_of(cache: Latents, tokenizer: CLIPTokenizer, size: int, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latents, noise, times and token ids of this process's part of one step: the same for the same step."""
    rank, processes = join_group()
    size, seed = size // processes, step * processes + rank
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    rows = [rng.randrange(len(cache.pairs)) for _ in range(size)]
    said = [data.paraphrase(data.objects()[cache.pairs[i][0]], cache.pairs[i][1], rng) for i in rows]
    said = ["" if rng.random() < DROPOUT else prompt for prompt in said]
    x0 = cache.x0[rows]
    noise = torch.randn(x0.shape, generator=generator).to(x0)
    return x0, noise, draw_times(size, step, generator).to(x0.device), token_ids(tokenizer, said).to(x0.device)


def train_unet(made: model.Model, cache: Latents, folder: Path, sizes: Sizes, lr: float = 1e-3) -> None:
    """Train UNet and text encoders together; leaves the EMA weights in `made`."""
    unet, encoders = made.unet.to(device(), memory_format=torch.channels_last), made.encoders.to(device())
    both = torch.nn.ModuleDict({"unet": unet, "encoders": encoders}).train()
    compiles = sizes.compiled and shutil.which("g++") is not None
    fast_unet, fast_encoders = (torch.compile(unet), torch.compile(encoders)) if compiles else (unet, encoders)
    params = list(both.parameters())
    optimizer = torch.optim.AdamW(params, lr=lr, weight_decay=0.01, fused=True)
    ema = Ema(both, decay=0.998)
    path = folder / "teacher.pt"
    log = Log(folder / "teacher.jsonl", sizes.steps, load(path, both=both, optimizer=optimizer, ema=ema))
    for step in log.steps():
        x0, noise, t, ids = batch_of(cache, made.tokenizer, sizes.batch, step)
        for group in optimizer.param_groups:
            group["lr"] = cosine(step, sizes.steps, lr)
        with torch.autocast(device().type, torch.bfloat16):
            text = fast_encoders(ids)
            out = fast_unet(
                add_noise(x0, noise, t), t, encoder_hidden_states=text.context, added_cond_kwargs=text.added
            ).sample
        loss = epsilon_loss(out.float(), noise, t)
        optimizer.zero_grad()
        loss.backward()
        average_gradients(params)
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        ema.update(step)
        log.note(step, loss=loss)
        if step % 250 == 0 or step == sizes.steps:
            save(path, step, both=both, optimizer=optimizer, ema=ema)
            if is_writer():
                write_sheet(made, ema, both, folder / f"teacher-{step}.png")
    both.load_state_dict(ema.state_dict())
    both.eval()


def write_sheet(made: model.Model, ema: Ema, both: torch.nn.Module, path: Path) -> None:
    """Held-out pairs drawn with the EMA weights: look at it."""
    ours = copy.deepcopy(both.state_dict())
    both.load_state_dict(ema.state_dict())
    sheets.write_grid(made, data.pairs(held_out=True)[::20][:24], path, steps=8, guidance=3.0)
    both.load_state_dict(ours)


def main(runs: Path = Path("runs"), sizes: Sizes = Sizes()) -> model.Model:
    """Autoencoder, latents, text encoders and UNet, decoder; then runs/embedded, the folder diffusers reads."""
    begin()
    folder = runs / "embedded"
    made = model.fresh(folder, sizes.unet_channels, sizes.vae_channels, sizes.heads)
    made.vae = autoencoder.train(runs, sizes.vae_steps, sizes.vae_crop_steps, channels=sizes.vae_channels)
    cache = latents.cached(made.vae, runs / "latents.pt", sizes.jitters, sizes.every)
    train_unet(made, cache, runs, sizes)
    if not is_writer():
        return made  # one process does the rest
    autoencoder.polish_decoder(made.vae, runs, sizes.decoder_steps)
    model.save_base(made, folder)
    return made


if __name__ == "__main__":
    begin()
    if sys.argv[1:] == ["autoencoder"]:  # on a second core, while the UNet trains
        vae = autoencoder.train(Path("runs"), Sizes.vae_steps, Sizes.vae_crop_steps)
        autoencoder.polish_decoder(vae, Path("runs"), Sizes.decoder_steps)
    else:
        main()
