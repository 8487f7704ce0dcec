"""The server as on a GPU, over HTTP, with CUDA's runtime stood in for (tests/stand_in): graphs, static weights, memory
tiers, recordings beside the service."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from bench.fidelity import psnr
from tests.conftest import APPLE, PLAIN, ROOT, START_S, ServerProcess, eventually
from tests.http.test_generate import VARIANTS, images, theirs
from tests.models import loras, oracle

AS_ON_A_GPU = {"PYTHONPATH": str(ROOT / "tests" / "stand_in"), "DEVICE": "cuda"}
PROMPTS = tuple(f"a red apple on a {colour} background" for colour in ("blue", "green", "white"))
BUDGET_GIB = "0.03"  # for two of the seven weight sets of 13 MB; the host has the rest


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two styles, of all that a LoRA may change."""
    made = tmp_path_factory.mktemp("loras")
    for seed, name in enumerate(("one", "two")):
        parts = {part: loras.layers(part)[::-4] for part in loras.PARTS}
        loras.write(made, name, loras.folded(loras.factors(parts, seed)))
    return made


@pytest.fixture(scope="module")
def gpu_server(folder, tmp_path_factory) -> Iterator[ServerProcess]:
    log = tmp_path_factory.mktemp("gpu") / "log"
    settings = {**AS_ON_A_GPU, "DEVICE_BUDGET_GIB": BUDGET_GIB, "LORA_DIR": str(folder)}
    with ServerProcess(log, COMPILE="1", **settings) as running:
        yield running


def test_pictures_drawn_while_graphs_are_recorded_and_after_are_diffusers_pictures(gpu_server):
    asked = [(VARIANTS[k % 7], PROMPTS[k % 3], k % 4) for k in range(28)]

    def ask(request):
        variant, prompt, seed = request
        body = {"prompt": prompt, "seed": seed, "variant": variant, "timeout": 120}
        return httpx.post(f"{gpu_server.url}/generate", json=body, timeout=120, verify=PLAIN)

    def batches() -> set[str]:
        return {name for name in gpu_server.metrics() if name.startswith("sdxl_step_cost_seconds")}

    with ThreadPoolExecutor(28) as pool:
        first = list(pool.map(ask, asked))
        assert eventually(lambda: len(batches()) == 4, START_S), batches()
        with gpu_server.stopped_engine():
            second = [pool.submit(ask, request) for request in asked]
            assert eventually(lambda: gpu_server.in_engine() == 28, 15)
        second = [answer.result() for answer in second]
    for responses in (first, second):
        for response, (variant, prompt, seed) in zip(responses, asked, strict=True):
            assert abs(images(response)[0] - theirs(variant, prompt, seed)).max() <= 1
    assert max(max(response.json()["batch_sizes"]) for response in second) > 1


def test_styled_pictures_are_diffusers_pictures_while_sets_move_between_memories(gpu_server, folder):
    asked = [("4step-unet", "one"), ("2step-lora", "two"), ("4step-unet", ""), ("4step-unet", "two")]

    def ask(request):
        variant, style = request
        return gpu_server.generate(variant=variant, steps=None, loras=[{"name": style}] if style else None)

    with ThreadPoolExecutor(4) as pool:
        drawn = list(pool.map(ask, asked * 2))
    for response, (variant, style) in zip(drawn, asked * 2, strict=True):
        much = {style: 1.0} if style else {}
        truth = oracle.draw_styled(variant, folder, much, [APPLE["prompt"]], [APPLE["seed"]], "np")[0]
        assert abs(images(response)[0] - (truth * 255).round().int().numpy()).max() <= 1


def test_it_says_what_it_is_and_in_which_order_it_became_so(gpu_server):
    def ready() -> dict:
        return httpx.get(f"{gpu_server.url}/ready").json()

    assert eventually(lambda: ready()["compiled"], START_S)
    assert (ready()["device"], ready()["dtype"]) == ("cuda", "float32")
    events = [line["event"] for line in gpu_server.log_lines()]
    order = ("engine started", "weights loaded", "attention measured", "ready: embedded on cuda in float32")
    order = (*order, "graphs recorded", "compiled code in place")
    assert [event for event in events if event in order] == list(order)


def test_in_fp8_the_pictures_are_nearly_the_same(start_server):
    server = start_server(**AS_ON_A_GPU, FP8="1").wait_until_ready()
    for variant in ("4step-unet", "2step-lora"):
        ours = images(server.generate(variant=variant, steps=int(variant[0])))[0]
        assert 30 < psnr(ours, theirs(variant, APPLE["prompt"], 7)) < 60
