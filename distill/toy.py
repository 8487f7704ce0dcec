"""A model of random weights in the final layout, to build or test against: `python -m distill.toy FOLDER`."""

from __future__ import annotations

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
        low = lora.attach(toy.unet)
        for name, parameter in low.named_parameters():
            if name.endswith(".up"):
                torch.nn.init.normal_(parameter, std=0.01)
        model.save_unet(lora.merged(low), model.unet_file(folder, steps))
        if steps > 1:
            lora.save(low, model.lora_file(folder, steps))
    (folder / "README.md").write_text("# Random weights\n\nWritten by distill/toy.py; nothing was trained.\n")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
