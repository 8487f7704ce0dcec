"""The GPU benchmark at toy size on a CPU: every part runs, and nothing that no GPU measured is kept as a result.
`make test-bench`, a minute and a half."""

import json
import os
from pathlib import Path
from typing import Any

from tests.conftest import ROOT
from tests.test_bench_gpu import bench_gpu

KEYS = {
    "gpu", "torch", "images_per_s_4step_http_1024", "gpu_ms_4step_b1_1024", "vae_decode_ms_1024",
    "speedup_over_diffusers_eager", "variant_switch_ms", "ready_s", "psnr_db_vs_diffusers", "share_of_matmul_rate",
}  # fmt: skip


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
