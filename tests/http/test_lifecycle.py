"""Deadlines, clients that leave, overload, engine death, and shutdown, with real processes and real signals."""

import json
import os
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import APPLE, eventually

POST = "POST /generate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{}"


ROWS = 'sdxl_batch_rows_sum{variant="8step-unet"}'


def burst(server, count: int, **fields) -> list[httpx.Response]:
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda seed: server.generate(timeout=120, seed=seed, **fields), range(count)))


def total(metrics: dict[str, float], outcome: str) -> float:
    return sum(value for name, value in metrics.items() if "sdxl_requests_total" in name and f'"{outcome}"' in name)


def in_engine(server) -> float:
    metrics = server.metrics()
    return metrics["sdxl_images_running"] + metrics["sdxl_queue_depth"]


def ask_and_leave(server, **fields) -> None:
    body = json.dumps({**APPLE, **fields})
    with socket.create_connection(("127.0.0.1", server.port)) as sock:
        sock.sendall(POST.format(len(body), body).encode())
        time.sleep(0.05)


def test_an_answer_that_would_come_too_late_is_a_504_or_a_429(server):
    os.kill(server.engine().pid, signal.SIGSTOP)  # an engine that hangs
    try:
        start = time.monotonic()
        response = server.generate(timeout=1.0)
    finally:
        os.kill(server.engine().pid, signal.SIGCONT)
    assert response.status_code == 504, response.text
    assert response.json()["field"] == "timeout"
    assert 0.9 < time.monotonic() - start < 1.6


def test_a_timeout_no_machine_could_meet_is_refused_at_the_door(server):
    response = httpx.post(f"{server.url}/generate", json={**APPLE, "timeout": 0.001}, timeout=10)
    assert (response.status_code, response.json()["field"]) == (422, "timeout")


def test_a_client_that_leaves_takes_its_work_with_it(server):
    before = server.metrics()
    for _ in range(5):
        ask_and_leave(server, steps=8, n=8)
    assert eventually(lambda: total(server.metrics(), "dropped") == total(before, "dropped") + 5)
    assert eventually(lambda: in_engine(server) == 0)
    time.sleep(1.0)  # for steps that should not come
    assert server.metrics()[ROWS] - before.get(ROWS, 0) < 5 * 8 * 8 / 2


def test_a_neighbour_that_leaves_harms_nobody(server):
    with ThreadPoolExecutor(8) as pool:
        staying = [pool.submit(server.generate, steps=8, seed=seed) for seed in range(8)]
        for _ in range(4):
            ask_and_leave(server, steps=8)
        assert all(future.result().status_code == 200 for future in staying)


def test_every_request_is_in_the_ledger_once_idle(server):
    server.generate(steps=1)
    server.generate(steps=3)
    ask_and_leave(server, n=8)

    def balanced() -> bool:
        metrics = server.metrics()
        ended = sum(value for name, value in metrics.items() if name.startswith("sdxl_requests_total"))
        return metrics["sdxl_requests_received_total"] == ended

    assert eventually(balanced)
    metrics = server.metrics()
    assert all(total(metrics, outcome) > 0 for outcome in ("ok", "invalid", "dropped"))


def test_a_burst_of_64_is_served_whole(server):
    responses = burst(server, 64, steps=1, output_format="jpeg")
    assert [response.status_code for response in responses] == [200] * 64


def test_a_full_queue_answers_429_at_once_and_serves_what_it_took(start_server):
    server = start_server(QUEUE_LIMIT="8").wait_until_ready()
    responses = burst(server, 40, steps=8)
    codes = {response.status_code for response in responses}
    assert codes == {200, 429}
    metrics = server.metrics()
    assert (total(metrics, "ok"), total(metrics, "refused")) == tuple(
        sum(response.status_code == status for response in responses) for status in (200, 429)
    )
    assert all(int(r.headers["retry-after"]) >= 1 for r in responses if r.status_code == 429)
    assert sum(response.status_code == 200 for response in responses) >= 6  # a quarter is kept for those who return


def test_a_killed_engine_fails_its_requests_at_once_and_comes_back(start_server):
    server = start_server().wait_until_ready()
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(server.generate, steps=8, n=8, seed=seed) for seed in range(4)]
        assert eventually(lambda: server.metrics()["sdxl_images_running"] > 0)
        server.engine().kill()
        killed = time.monotonic()
        responses = [future.result() for future in waiting]
    assert time.monotonic() - killed < 1.5
    assert {response.status_code for response in responses} == {503}
    assert {response.json()["code"] for response in responses} == {"engine_died"}
    assert (server.status("/ready"), server.status("/live")) == (503, 200)
    assert eventually(lambda: server.status("/ready") == 200, seconds=60)
    assert server.generate().status_code == 200
    assert server.metrics()["sdxl_engine_restarts_total"] == 1
    assert total(server.metrics(), "failed") == 4


def test_sigterm_finishes_what_was_accepted_and_refuses_the_rest(start_server):
    server = start_server().wait_until_ready()
    with ThreadPoolExecutor(9) as pool:
        accepted = [pool.submit(server.generate, steps=8, n=4, seed=seed) for seed in range(8)]
        assert eventually(lambda: in_engine(server) == 32)
        server.process.send_signal(signal.SIGTERM)
        assert eventually(lambda: server.status("/ready") in (503, 0), 1)
        late = pool.submit(server.generate)
        assert {future.result().status_code for future in accepted} == {200}
        assert late.result().status_code == 503
    assert server.process.wait(15) == 0


def test_signals_to_the_whole_group_twice_as_make_sends_them_still_drain(start_server):
    server = start_server().wait_until_ready()
    engine = server.engine()
    with ThreadPoolExecutor(4) as pool:
        accepted = [pool.submit(server.generate, steps=8, n=4, seed=seed) for seed in range(4)]
        assert eventually(lambda: in_engine(server) == 16)
        for _ in range(2):
            os.killpg(server.process.pid, signal.SIGINT)
            engine.send_signal(signal.SIGINT)
            time.sleep(0.1)
        assert {future.result().status_code for future in accepted} == {200}
    assert server.process.wait(15) == 0
    assert eventually(lambda: not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE)


def test_a_later_second_sigint_ends_at_once(start_server):
    server = start_server().wait_until_ready()
    os.kill(server.engine().pid, signal.SIGSTOP)  # so that the drain would not end by itself
    with ThreadPoolExecutor(1) as pool:
        stuck = pool.submit(server.generate)
        time.sleep(0.5)
        server.process.send_signal(signal.SIGINT)
        time.sleep(1.2)
        assert server.process.poll() is None
        server.process.send_signal(signal.SIGINT)
        server.process.wait(8)
        assert stuck.exception() is not None or stuck.result().status_code >= 500


def test_the_engine_leaves_with_a_killed_server(start_server):
    server = start_server().wait_until_ready()
    engine = server.engine()
    server.process.kill()
    assert eventually(lambda: not engine.is_running(), 5)


def test_undefined_weights_give_a_500_and_never_a_picture(start_server, embedded_copy):
    path = embedded_copy / "sdxl_lightning_2step_unet.safetensors"
    save_file({key: torch.full_like(value, torch.nan) for key, value in load_file(path).items()}, path)
    server = start_server(MODEL_DIR=str(embedded_copy)).wait_until_ready()
    poisoned = server.generate(steps=2)
    assert (poisoned.status_code, poisoned.json()["code"]) == (500, "generation_failed")
    assert server.generate(steps=4).status_code == 200


def test_a_missing_file_ends_the_server_with_a_sentence_that_names_it(start_server, embedded_copy):
    (embedded_copy / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    server = start_server(MODEL_DIR=str(embedded_copy))
    assert server.process.wait(120) == 1
    assert any("vae/diffusion_pytorch_model.safetensors" in line["event"] for line in server.log_lines())


def test_sdxl_without_weights_or_network_ends_with_the_way_to_get_them(start_server, tmp_path):
    server = start_server(MODEL="sdxl", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert server.process.wait(120) == 1
    assert any("models fetch" in line["event"] for line in server.log_lines())
