"""The pictures as fp32 diffusers draws them, one at a time: the yardstick of fidelity."""

import json
import sys

import numpy as np
import torch

from bench.painter import VARIANTS, draw, load


def main() -> None:
    """Read [[variant, prompt, seed], ...] from the standard input; write the pictures to the file named first."""
    asked = json.load(sys.stdin)
    torch.set_num_threads(int(sys.argv[2]))
    pipelines = load({variant for variant, _, _ in asked}, torch.float32)
    pictures = [draw(pipelines[variant], [prompt], VARIANTS[variant].steps, [seed]) for variant, prompt, seed in asked]
    np.savez(sys.argv[1], pictures=torch.cat(pictures).numpy())


if __name__ == "__main__":
    main()
