"""Sheets of pictures and curves of logs, as PNG: to be looked at."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from torch import Tensor

from distill import data, predictors
from distill.diffusion import sample
from distill.latents import decode
from distill.model import Model
from distill.text import token_ids


def montage(rows: Iterable[Iterable[np.ndarray]]) -> Image.Image:
    """Rows of (H, W, 3) uint8 pictures."""
    return Image.fromarray(np.concatenate([np.concatenate(list(row), axis=1) for row in rows], axis=0))


def noise_for(count: int, first_seed: int = 0) -> Tensor:
    """(count, 4, 16, 16): one CPU generator an image, as the server and diffusers draw it."""
    return torch.cat(
        [torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(first_seed + i)) for i in range(count)]
    )


@torch.no_grad()
def clean_latents(
    made: Model,
    prompts: list[str],
    noise: Tensor,
    steps: int,
    guidance: float = 1.0,
    unet: UNet2DConditionModel | None = None,
    exact: bool = False,
    predicts: str = "epsilon",
    times: Tensor | None = None,
) -> Tensor:
    """(B, 4, 16, 16) latents at std 1; in bf16 unless `exact`. times: as distill.diffusion.sample has them."""
    device = next(made.unet.parameters()).device
    text = made.encoders(token_ids(made.tokenizer, prompts).to(device))
    predict = predictors.of(unet or made.unet, exact)
    if guidance > 1:
        predict = predictors.guided(predict, made.encoders(token_ids(made.tokenizer, [""]).to(device)), guidance)
    return sample(predict, noise.to(device), text, steps, predicts, times)


def draw(made: Model, prompts: list[str], noise: Tensor, steps: int, **how: Any) -> np.ndarray:
    """uint8 (B, 128, 128, 3): what a model draws from this noise. how: as clean_latents has it."""
    return decode(made.vae, clean_latents(made, prompts, noise, steps, **how)).permute(0, 2, 3, 1).numpy()


def write_grid(made: Model, pairs: list[tuple[int, str]], path: Path, width: int = 12, **how: Any) -> None:
    """Two rows at a time: what is drawn, and below it the real render."""
    things = data.objects()
    prompts = [data.caption(things[i].name, background) for i, background in pairs]
    drawn = draw(made, prompts, noise_for(len(pairs)), **how)
    real = [data.draw(things[i].codepoint, background) for i, background in pairs]
    rows: list[np.ndarray | list[np.ndarray]] = []
    for start in range(0, len(pairs), width):
        rows += [drawn[start : start + width], real[start : start + width]]
    path.parent.mkdir(parents=True, exist_ok=True)
    montage([row for row in rows if len(row) == min(width, len(pairs))]).save(path)


def plot_log(log: Path, picture: Path) -> None:
    """Every value of a training log against the step, one panel each."""
    import matplotlib.pyplot as plt

    lines = [json.loads(line) for line in log.read_text().splitlines()]
    names = [name for name in dict.fromkeys(key for line in lines for key in line) if name != "step"]
    figure, panels = plt.subplots(1, len(names), figsize=(4 * len(names), 3), squeeze=False)
    for name, panel in zip(names, panels[0], strict=True):
        points = [(line["step"], line[name]) for line in lines if name in line]
        panel.plot(*zip(*points, strict=True))
        panel.set(title=name, xlabel="step", yscale="log" if all(value > 0 for _, value in points) else "linear")
    figure.tight_layout()
    figure.savefig(picture, dpi=80)
    plt.close(figure)


if __name__ == "__main__":  # python -m distill.sheets: every log under runs/ as a picture beside it
    for log in sorted(Path("runs").rglob("*.jsonl")):
        plot_log(log, log.with_suffix(".png"))
