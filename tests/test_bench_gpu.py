"""The GPU benchmark at toy size on a CPU: every part runs, and nothing that no GPU measured is kept as a result."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig

from bench.gpu.rig import CLASSES, CONFIGS
from bench.gpu.stages import TEXT_TFLOP, UNET_TFLOP, VAE_TFLOP
from tests.conftest import ROOT

KEYS = {
    "gpu", "torch", "images_per_s_4step_http_1024", "gpu_ms_4step_b1_1024", "vae_decode_ms_1024",
    "speedup_over_diffusers_eager", "variant_switch_ms", "ready_s", "psnr_db_vs_diffusers", "share_of_matmul_rate",
}  # fmt: skip


def bench_gpu(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    settings = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [sys.executable, "-m", "bench.gpu", *options], cwd=ROOT, env=settings, capture_output=True, text=True
    )


def toy(folder: Path, *options: str, **environment: str) -> dict[str, Any]:
    """What it finds at toy size."""
    before = sorted((ROOT / "bench" / "results").iterdir())
    done = bench_gpu("--tiny", *options, TMPDIR=str(folder), OUT=str(folder / "never"), **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = folder.glob("bench-gpu-*/gpu.json")
    assert "RANDOM" in path.with_suffix(".md").read_text()
    assert sorted((ROOT / "bench" / "results").iterdir()) == before
    assert not (folder / "never").exists()
    found = json.loads(path.read_text())
    assert found.keys() >= KEYS
    assert (found["check"]["passed"], found["gpu"]) == (True, "none that counts: a toy")
    return found


def test_on_a_cpu_it_runs_at_toy_size_and_what_is_to_be_compiled_is_traced(tmp_path):
    found = toy(tmp_path, "--part", "check", "stages")
    assert found["stages"]["skipped"] == []
    assert found["psnr_db_vs_diffusers"] > 60
    assert found["stages"]["ours_compiled"]["psnr_db_vs_uncompiled"] > 60


def test_as_on_a_gpu_it_runs_at_toy_size_through_graphs_in_float16_and_serves(tmp_path):
    """With CUDA's runtime stood in for (tests/stand_in)."""
    stand_in = str(ROOT / "tests" / "stand_in")
    options = ("--part", "check", "server", "--mode", "none", "--seconds", "0.5")
    found = toy(tmp_path, *options, PYTHONPATH=os.pathsep.join((stand_in, str(ROOT))))
    assert found["psnr_db_vs_diffusers"] > 50
    assert found["check"]["recorded"] is found["check"]["a_step_waits_for_nothing"] is True
    assert found["images_per_s_4step_http_1024"] > 0
    assert found["server"]["ready_s"] < found["server"]["all_graphs_ready_s"]


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
