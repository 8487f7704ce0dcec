"""/metrics in the eyes of Prometheus' own tool."""

import subprocess

import httpx

from tests.conftest import eventually, needed


def test_promtool_finds_nothing_to_complain_about(server):
    server.generate()
    promtool = needed("promtool", "prometheus")
    text = httpx.get(f"{server.url}/metrics").content
    checked = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")


def test_every_stage_is_timed_and_every_batch_counted(server):
    before = server.metrics()
    server.generate(steps=8, prompt="never asked before: metrics")

    def grew(name: str) -> float:
        return server.metrics()[name] - before.get(name, 0)

    # The last of it may reach the HTTP process behind the picture.
    stages = ("queue", "encode", "decode", "request")
    assert eventually(lambda: [grew(f"sdxl_{stage}_seconds_count") for stage in stages] == [1] * 4)
    assert grew("sdxl_denoise_step_seconds_count") == 8
    assert grew('sdxl_batch_rows_sum{variant="8step-unet"}') == 8
    assert server.metrics()['sdxl_variant_resident_bytes{device="0",variant="8step-unet"}'] > 1e6
    assert eventually(lambda: server.metrics()["sdxl_ready"] == 1)
