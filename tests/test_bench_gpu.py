"""The GPU benchmark, where there is no GPU (tests/slow/bench_gpu.py runs all of it)."""

import os
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig

from bench.gpu.rig import CLASSES, CONFIGS
from bench.gpu.stages import TEXT_TFLOP, UNET_TFLOP, VAE_TFLOP
from tests.conftest import ROOT


def bench_gpu(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    settings = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [sys.executable, "-m", "bench.gpu", *options], cwd=ROOT, env=settings, capture_output=True, text=True
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so_and_fails(tmp_path):
    done = bench_gpu("--part", "stages", OUT=str(tmp_path))
    assert done.returncode != 0
    assert "needs a CUDA GPU" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("pixels", UNET_TFLOP)
def test_the_work_that_shares_are_taken_of_is_counted_over_the_rigs_modules(pixels):
    """torch's own counter, over SDXL at full size on the meta device: no memory and no arithmetic."""
    with torch.device("meta"):
        unet, vae = (CLASSES[part].from_config(CONFIGS[part]) for part in ("unet", "vae"))
        texts = [CLASSES[part](CLIPTextConfig.from_dict(CONFIGS[part])) for part in ("text_encoder", "text_encoder_2")]
        latents, ids = torch.empty(1, 4, pixels // 8, pixels // 8), torch.empty(1, 77, dtype=torch.int64)
        added = {"text_embeds": torch.empty(1, 1280), "time_ids": torch.empty(1, 6)}
        embeds, timestep = torch.empty(1, 77, 2048), torch.empty(1)
        calls = {
            UNET_TFLOP[pixels]: lambda: unet(latents, timestep, embeds, added_cond_kwargs=added),
            VAE_TFLOP[pixels]: lambda: vae.decode(latents),
            TEXT_TFLOP: lambda: [text(ids) for text in texts],
        }
        for expected, call in calls.items():
            with FlopCounterMode(display=False) as counter:
                call()
            assert counter.get_total_flops() / 1e12 == pytest.approx(expected, rel=2e-3)
