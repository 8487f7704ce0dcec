"""A style is trained by its command, resumes, and is read by diffusers."""

import copy

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file

from distill import model, style


def test_an_outline_is_ink_where_colours_change_and_paper_elsewhere():
    picture = np.zeros((64, 64, 3), dtype=np.uint8)
    picture[:, 32:] = (255, 0, 0)
    drawn = style.outline(picture)
    assert (drawn[..., 0] == drawn[..., 1]).all()
    assert drawn[32, 31:33].max() <= 60
    assert drawn[:, :24].min() == drawn[:, 40:].min() == style.PAPER


def test_a_style_is_trained_under_every_step_file_and_goes_on_where_it_ended(runs, tmp_path):
    base = runs / "embedded"
    style.main(base, tmp_path, iterations=2, batch=4, every=200)
    first = load_file(base / "loras" / "line.safetensors")
    style.main(base, tmp_path, iterations=2, batch=4, every=200)  # nothing is left to do
    assert all(torch.equal(first[key], value) for key, value in load_file(base / "loras" / "line.safetensors").items())
    ranks = {len(value) for key, value in first.items() if key.endswith("lora_down.weight")}
    assert ranks == set(style.RANKS.values())
    assert {path.name for path in (tmp_path / "style").glob("*.png")} == {f"line-{steps}.png" for steps in model.STEPS}
    pipe = StableDiffusionXLPipeline.from_pretrained(base)
    before = copy.deepcopy(pipe.unet.state_dict())
    pipe.load_lora_weights(base / "loras", weight_name="line.safetensors")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    assert any(not torch.equal(before[key], value) for key, value in pipe.unet.state_dict().items())
