"""A model of random weights in the final layout: `python -m distill.toy FOLDER`, to build a server or a test against."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import torch

from distill import lora, model

SMALL = {"unet_channels": (16, 32, 32), "vae_channels": (8, 8, 8, 8), "heads": (1, 2, 2)}


def write(folder: Path, **sizes) -> None:
    """Every file that models/embedded/ has, of the shipped sizes unless told otherwise."""
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    toy = model.fresh(folder, **sizes)
    model.save_base(toy, folder)
    for steps in model.STEPS:
        unet = copy.deepcopy(toy.unet)
        lora.attach(unet)
        for layer in lora.layers(unet).values():
            torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.01)
        model.save_unet(lora.merged(unet), model.unet_file(folder, steps))
        if steps > 1:
            lora.save(unet, model.lora_file(folder, steps))
    (folder / "README.md").write_text("# Random weights\n\nWritten by distill/toy.py; nothing was trained.\n")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
