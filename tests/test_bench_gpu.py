"""The GPU benchmark at toy size on a CPU: every part runs, and nothing that no GPU measured is kept as a result."""

import json
import os
import subprocess
import sys

import pytest
import torch

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


def test_all_parts_run_at_toy_size_and_leave_no_results_in_the_repository(tmp_path):
    before = sorted((ROOT / "bench" / "results").iterdir())
    done = bench_gpu("--tiny", "--seconds", "0.5", TMPDIR=str(tmp_path), OUT=str(tmp_path / "never"))
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = tmp_path.glob("bench-gpu-*/gpu.json")
    found = json.loads(path.read_text())
    assert found.keys() >= KEYS
    assert (found["check"]["passed"], found["gpu"]) == (True, "none: a toy on the CPU")
    assert found["psnr_db_vs_diffusers"] > 60
    assert found["images_per_s_4step_http_1024"] > 0
    assert "RANDOM" in path.with_suffix(".md").read_text()
    assert sorted((ROOT / "bench" / "results").iterdir()) == before
    assert not (tmp_path / "never").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so_and_fails(tmp_path):
    done = bench_gpu("--part", "stages", OUT=str(tmp_path))
    assert done.returncode != 0
    assert "needs a CUDA GPU" in done.stderr
    assert list(tmp_path.iterdir()) == []
