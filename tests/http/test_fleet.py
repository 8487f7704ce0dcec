"""Several engines behind one queue: who draws what, and what becomes of it when one of them dies."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from pydantic import ValidationError

from app.settings import GIB, Settings
from tests.conftest import PLAIN, ROOT, START_S, ServerProcess, eventually

TWO = {"ENGINES": "2", "THREADS": "2", "COMPILE": "1", "DTYPE": "bfloat16"}
WORK, READY = 'sdxl_work_seconds{{device="{}"}}', 'sdxl_engine_ready{{device="{}"}}'


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Iterator[ServerProcess]:
    with ServerProcess(tmp_path_factory.mktemp("two") / "log", **TWO, QUEUE_LIMIT="8") as running:
        assert eventually(lambda: ready(running)["engines"] == 2, START_S)
        yield running


def ready(server) -> dict:
    return httpx.get(f"{server.url}/ready", verify=PLAIN).json()


def files(response: httpx.Response) -> list[str]:
    assert response.status_code == 200, response.text
    return [image["b64_json"] for image in response.json()["images"]]


def test_eight_pictures_of_one_request_are_shared_and_a_seed_means_the_same_bytes_on_either_engine(two):
    with ThreadPoolExecutor(2) as pool:
        with two.stopped_engine():
            same = [pool.submit(two.generate, n=8, seed=5) for _ in range(2)]
            assert eventually(lambda: two.in_engine() == 16, 15)
            work = [two.metrics()[WORK.format(device)] for device in (0, 1)]
        first, second = (files(each.result()) for each in same)
    assert min(work) > max(work) / 2
    assert first == second
    assert len(set(first)) == 8
    # Alone, whichever engine draws it.
    assert [files(two.generate(seed=5 + k))[0] for k in range(8)] == first


def test_an_engine_killed_under_load_costs_nobody_a_picture(two):
    alone = {seed: files(two.generate(seed=seed)) for seed in range(16)}
    with ThreadPoolExecutor(16) as pool:
        with two.stopped_engine() as engine:
            answers = [pool.submit(two.generate, seed=seed) for seed in range(16)]
            assert eventually(lambda: two.in_engine() == 16, 15)
            engine.kill()
            assert eventually(lambda: two.metrics()[READY.format(0)] == 0)
        assert two.status("/ready") == 200
        assert {seed: files(answer.result()) for seed, answer in enumerate(answers)} == alone
    metrics = two.metrics()
    assert [metrics.get(f'sdxl_engine_restarts_total{{device="{device}"}}', 0) for device in (0, 1)] == [1, 0]
    cards = httpx.get(f"{two.url}/v1/models", verify=PLAIN).json()["data"]
    assert {card["state"] for card in cards} == {"resident"}
    assert eventually(lambda: ready(two)["engines"] == 2, START_S)


def test_a_full_fleet_says_when_to_come_back_and_then_has_room(two):
    with ThreadPoolExecutor(24) as pool:
        with two.stopped_engine():
            answers = [pool.submit(two.generate, seed=seed, steps=8, timeout=120) for seed in range(24)]
            assert eventually(lambda: two.in_engine() == 16, 15)  # QUEUE_LIMIT for each of them
            assert eventually(lambda: sum(answer.done() for answer in answers) == 8, 15)
        responses = [answer.result() for answer in answers]
    waits = {seed: int(r.headers["retry-after"]) for seed, r in enumerate(responses) if r.status_code == 429}
    assert [response.status_code for response in responses].count(200) == 16
    last = max(waits, key=lambda seed: waits[seed])
    time.sleep(waits[last])
    assert two.generate(seed=last, steps=8, timeout=120).status_code == 200


FAULTY = """
import os, sys
if "app.engine.worker" in sys.orig_argv:
    if '"name":"2"' in sys.orig_argv[-1]:
        os._exit(3)
    import torch
    randn = torch.randn
    def deadly(*sizes, generator=None, **named):
        if generator is not None and generator.initial_seed() == 666:
            os.kill(os.getpid(), 9)
        return randn(*sizes, generator=generator, **named)
    torch.randn = deadly
"""


def test_a_deadly_picture_fails_alone_and_an_engine_that_never_starts_is_done_without(start_server, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(FAULTY)
    server = start_server(ENGINES="3", PYTHONPATH=str(tmp_path)).wait_until_ready()
    assert eventually(lambda: ready(server)["engines"] == 2, START_S)
    assert eventually(lambda: "serving without this engine: the engine died 3 times" in server.log.read_text(), START_S)
    with ThreadPoolExecutor(8) as pool:
        with server.stopped_engine():
            answers = {seed: pool.submit(server.generate, seed=seed) for seed in (*range(660, 667), 1)}
            assert eventually(lambda: server.in_engine() == 8, 15)
        responses = {seed: answer.result() for seed, answer in answers.items()}
    assert [seed for seed, response in responses.items() if response.status_code != 200] == [666]
    assert (responses[666].status_code, responses[666].json()["code"]) == (500, "generation_failed")
    restarts = [value for name, value in server.metrics().items() if name.startswith("sdxl_engine_restarts_total")]
    assert sorted(restarts)[:2] == [1, 1]


def test_where_no_engine_can_start_the_server_says_why_once_and_ends(start_server, embedded_copy):
    (embedded_copy / "vae" / "config.json").write_text("{}")
    server = start_server(MODEL_DIR=str(embedded_copy), ENGINES="2")
    assert server.process.wait(START_S) == 1
    (error,) = (line["event"] for line in server.log_lines() if line["level"] == "error")
    assert "vae" in error


def test_each_gpu_has_an_engine_that_sees_it_alone(start_server):
    server = start_server(PYTHONPATH=str(ROOT / "tests" / "stand_in"), DEVICES="1,GPU-b", CUDA_VISIBLE_DEVICES="0,1")
    assert eventually(lambda: len(server.engines()) == 2)
    assert [engine.environ()["CUDA_VISIBLE_DEVICES"] for engine in server.engines()] == ["1", "GPU-b"]
    names = {name for name in server.metrics() if name.startswith("sdxl_engine_ready")}
    assert names == {READY.format(device) for device in ("1", "GPU-b")}


def test_threads_and_the_hosts_memory_are_divided():
    configs = Settings(engines=3, threads=8, host_budget_gib=6).engine_configs()
    assert [(each.name, each.device, each.threads) for each in configs] == [
        ("0", "cpu", 3),
        ("1", "cpu", 3),
        ("2", "cpu", 2),
    ]
    assert {each.host_budget for each in configs} == {2 * GIB}


def test_all_is_what_the_container_shows_or_what_nvidia_smi_does(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert [each.gpu for each in Settings(devices="all").engine_configs()] == ["3", "5"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho GPU-a\necho GPU-b\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert [each.gpu for each in Settings(devices="all").engine_configs()] == ["GPU-a", "GPU-b"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"devices": "0", "engines": 2}, "is for a CPU, while DEVICES has one engine per GPU; leave one of them out"),
        ({"devices": "0", "device": "cpu"}, "names GPUs, but DEVICE is cpu; leave one of them out"),
        ({"engines": 2, "device": "cuda"}, "is for a CPU, but DEVICE is cuda; name GPUs by DEVICES"),
        ({"devices": "0,0"}, "must name each GPU once, with commas between"),
        ({"devices": "0,"}, "must name each GPU once, with commas between"),
        ({"devices": "all"}, "asks nvidia-smi, which does not answer here; name the GPUs"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(settings, said, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(ValidationError, match=said) as refused:
        Settings(**settings)
    (error,) = refused.value.errors()
    assert error["loc"][-1] in settings
