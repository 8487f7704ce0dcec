"""`python -m distill.style`: a style LoRA for the embedded model, line drawings of the same renders on white paper.

One LoRA is trained under all step files at once: from the noised line drawing, one move of each should land on the
same drawing with less noise. What prompts say is the data's. A few minutes on one core; it goes on where it was
interrupted.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from PIL import Image, ImageFilter
from torch import Tensor, nn
from torch.nn.utils import parametrize

from distill import data, latents, lora, model, predictors, sheets
from distill import stages as paper
from distill.diffusion import add_noise
from distill.phases import Workshop
from distill.stages import Stage
from distill.training import Log, begin, cosine, device, load, save

SHIPPED = Path(__file__).parents[1] / "models" / "embedded"
NAME = "line"
RANKS = {2: 2, 4: 3}  # by a weight's dimensions: a file of 300 KB at the most, and the look is the convolutions' work
ALPHA = 2.0
RATE = 3e-3
ITERATIONS = 1500
PAPER, INK = 250, 20  # gray values
EDGE = 4.0  # times the steepest slope of a colour, which is then all ink
ORDER = (4, 8, 4, 2, 4, 1)  # step files in turn: most pictures are drawn in 4 steps


def draw_batch(chosen: list[tuple[int, str]], rng: random.Random) -> np.ndarray:
    """Each object as a drawing, uint8 (B, 128, 128, 3): always the same one, whatever its background, and never moved
    (the data's jitter would blur lines that are three pixels wide)."""
    return np.stack([outline(data.draw(data.objects()[i].codepoint, "gray")) for i, _ in chosen])


def outline(picture: np.ndarray) -> np.ndarray:
    """A line drawing of a picture, uint8 (H, W, 3) both: ink where colours change, about three pixels wide."""
    smooth = np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(1.0)), dtype=np.float32)
    across, down = (np.abs(np.diff(smooth, axis=axis, append=smooth.take([-1], axis))).max(2) for axis in (1, 0))
    edges = Image.fromarray((EDGE * np.maximum(across, down)).clip(0, 255).astype(np.uint8))
    lines = np.asarray(edges.filter(ImageFilter.MaxFilter(3)).filter(ImageFilter.GaussianBlur(0.7)), dtype=np.int64)
    return np.repeat((PAPER - lines).clip(INK, PAPER).astype(np.uint8)[..., None], 3, axis=2)


def shared(unets: dict[int, UNet2DConditionModel]) -> nn.ModuleDict:
    """One LoRA, under all these UNets. It changes nothing yet."""
    low = nn.ModuleDict()
    for unet in unets.values():
        unet.requires_grad_(False)
        for name, module in lora.targets(unet).items():
            key = name.replace(".", "_")
            if key not in low:
                low[key] = lora.LowRank(module.weight, RANKS[module.weight.ndim], ALPHA)
            parametrize.register_parametrization(module, "weight", low[key])
    return low


def loss_of(shop: Workshop, student: UNet2DConditionModel, steps: int, step: int) -> Tensor:
    """How far one move lands from the noised drawing."""
    stage = Stage(steps, steps, steps, 1, starts=tuple(range(1, steps + 1)), predicts=model.predicts(steps))
    batch, x0, noise = shop.draw_with_target(stage, NAME, step)
    times = stage.times.to(batch.k.device)
    return paper.mse_loss(paper.follow(stage, predictors.of(student), batch), add_noise(x0, noise, times[batch.k - 1]))


def train(shop: Workshop, unets: dict[int, UNet2DConditionModel], iterations: int) -> None:
    """Train the LoRA under all of them; they have it afterwards."""
    torch.manual_seed(0)
    low = shared(unets)
    params, path = list(low.parameters()), shop.folder / f"{NAME}.pt"
    optimizer = torch.optim.Adam(params, lr=RATE, betas=(0.9, 0.99), fused=True)
    log = Log(path.with_suffix(".jsonl"), iterations, load(path, low=low, optimizer=optimizer))
    for step in log.steps():
        steps = ORDER[step % len(ORDER)]
        loss = loss_of(shop, unets[steps], steps, step)
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = cosine(step, iterations, RATE, warmup=20)
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        log.note(step, **{f"mse_{steps}": loss})
        if step % 100 == 0 or step == iterations:
            save(path, step, low=low, optimizer=optimizer)


def main(
    base: Path = SHIPPED, runs: Path = Path("runs"), iterations: int = ITERATIONS, batch: int = 32, every: int = 1
) -> None:
    """Train on the model in `base`, and write base/loras/line.safetensors and a sheet of held-out pairs per step file:
    what is drawn, and below it the plain renders."""
    begin()
    made = model.load_base(base)
    unets = {steps: model.load_unet(made.unet, model.unet_file(base, steps)) for steps in model.STEPS}
    for part in (made.unet, made.encoders, made.vae, *unets.values()):
        part.to(device()).eval().requires_grad_(False)
    (runs / "style").mkdir(parents=True, exist_ok=True)
    cache = latents.cached(made.vae, runs / f"latents-{NAME}.pt", 1, every, draw_batch)
    shop = Workshop(made, cache, runs / "style", batch)
    train(shop, unets, iterations)
    file = base / "loras" / f"{NAME}.safetensors"
    file.parent.mkdir(exist_ok=True)
    lora.save(unets[4], file)
    for steps, unet in unets.items():
        pairs, path = data.pairs(held_out=True)[::20][:12], shop.folder / f"{NAME}-{steps}.png"
        sheets.write_grid(made, pairs, path, steps=steps, unet=unet, predicts=model.predicts(steps))


if __name__ == "__main__":
    main(iterations=int(sys.argv[1]) if len(sys.argv) > 1 else ITERATIONS)
