"""Deadlines, clients that leave, overload, engine death, and shutdown, with real processes and real signals."""

import json
import os
import signal
import socket
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import httpx
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import APPLE, START_S, eventually

POST = "POST /generate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{}"


ROWS = 'sdxl_batch_rows_sum{styled="false",variant="8step-unet"}'


def burst(pool: ThreadPoolExecutor, server, count: int, **fields) -> list[Future[httpx.Response]]:
    return [pool.submit(server.generate, timeout=120, seed=seed, **fields) for seed in range(count)]


def has_ended(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def total(metrics: dict[str, float], outcome: str) -> float:
    return sum(value for name, value in metrics.items() if "sdxl_requests_total" in name and f'"{outcome}"' in name)


def ask_and_leave(server, **fields) -> None:
    body = json.dumps({**APPLE, **fields})
    with socket.create_connection(("127.0.0.1", server.port)) as sock:
        sock.sendall(POST.format(len(body), body).encode())
        time.sleep(0.05)


def test_an_answer_that_would_come_too_late_is_a_504_or_a_429(server):
    with server.stopped_engine():  # an engine that hangs
        response = server.generate(timeout=2.0)
    assert response.status_code == 504, response.text
    assert response.json()["field"] == "timeout"


def test_a_timeout_no_machine_could_meet_is_refused_at_admission(server):
    response = httpx.post(f"{server.url}/generate", json={**APPLE, "timeout": 0.001}, timeout=10)
    assert (response.status_code, response.json()["field"]) == (422, "timeout")


def test_a_client_that_leaves_takes_its_work_with_it(server):
    before = server.metrics()
    with server.stopped_engine():
        for _ in range(5):
            ask_and_leave(server, steps=8, n=8)
        assert eventually(lambda: total(server.metrics(), "dropped") == total(before, "dropped") + 5, 15)
        assert server.in_engine() == 0
    assert server.generate(steps=1).status_code == 200  # drawn behind all that was there before it
    assert server.metrics().get(ROWS, 0) - before.get(ROWS, 0) < 5 * 8 * 8 / 2


def test_a_client_that_leaves_while_its_pictures_are_drawn_is_heard(server):
    before = server.metrics()
    body = json.dumps({**APPLE, "steps": 8, "n": 8})
    with socket.create_connection(("127.0.0.1", server.port)) as sock:
        sock.sendall(POST.format(len(body), body).encode())
        assert eventually(
            lambda: server.metrics()["sdxl_requests_received_total"] > before["sdxl_requests_received_total"]
        )
    assert eventually(lambda: server.in_engine() == 0)


def test_a_client_that_pipelines_and_leaves_is_heard_too(server):
    before = server.metrics()
    body = json.dumps(APPLE)
    with server.stopped_engine():
        with socket.create_connection(("127.0.0.1", server.port)) as sock:
            sock.sendall(POST.format(len(body), body).encode())
            assert eventually(lambda: server.in_engine() == 1, 15)
            sock.sendall(b"GET /live HTTP/1.1\r\nhost: x\r\n\r\n")
        assert eventually(lambda: total(server.metrics(), "dropped") == total(before, "dropped") + 1, 10)


def test_a_neighbour_that_leaves_harms_nobody(server):
    with ThreadPoolExecutor(8) as pool:
        staying = burst(pool, server, 8, steps=8)
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
        all_there = all(total(metrics, outcome) > 0 for outcome in ("ok", "invalid", "dropped"))
        return all_there and metrics["sdxl_requests_received_total"] == ended

    assert eventually(balanced)


def test_a_burst_of_64_is_served_whole(server):
    with ThreadPoolExecutor(64) as pool:
        answers = burst(pool, server, 64, steps=1, output_format="jpeg")
    assert [answer.result().status_code for answer in answers] == [200] * 64


def unread(server, path: str) -> int:
    """The status of what nobody can read."""
    response = httpx.post(server.url + path, content=b"no JSON", headers={"content-type": "application/json"})
    if response.status_code == 429:
        assert int(response.headers["retry-after"]) >= 1
        assert ("error" in response.json()) == path.startswith("/v1/")
    return response.status_code


def unsent(server, content_type: str) -> int:
    """The status of a large request whose body waits to be asked for."""
    head = f"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-type: {content_type}\r\ncontent-length: 9999999\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as sock:
        sock.sendall(f"{head}expect: 100-continue\r\n\r\n".encode())
        return int(sock.recv(65536).split()[1])


def as_form(server) -> httpx.Response:
    """With another boundary at each call."""
    form = {name: (None, str(value)) for name, value in {**APPLE, "steps": 8}.items()}
    return httpx.post(f"{server.url}/generate", files=form, timeout=120)


def test_a_full_queue_answers_429_before_the_body_is_parsed_and_who_waits_as_told_is_served(start_server):
    server = start_server(QUEUE_LIMIT="4").wait_until_ready()

    def is_refused(ask: Callable[..., int], how: str) -> bool:
        """One that was read was refused, and just behind it one that nobody reads."""
        return server.generate().status_code == ask(server, how) == 429

    with ThreadPoolExecutor(12) as pool:
        with server.stopped_engine():
            answers = burst(pool, server, 12, steps=8)
            assert eventually(lambda: total(server.metrics(), "refused") == 8, 15)  # at once: nothing moves
            for path in ("/generate", "/v1/images/generations"):
                assert eventually(partial(is_refused, unread, path))
            for content_type in ("application/json", "multipart/form-data; boundary=x"):
                assert eventually(partial(is_refused, unsent, content_type))
            form = as_form(server)
        responses = [answer.result() for answer in answers]
    assert sorted(response.status_code for response in responses) == [200] * 4 + [429] * 8
    refused = [response for response in responses if response.status_code == 429]
    assert {response.json()["code"] for response in refused} == {"overloaded"}
    waits = {seed: int(r.headers["retry-after"]) for seed, r in enumerate(responses) if r.status_code == 429}
    assert min(waits.values()) >= 1
    last = max(waits, key=lambda seed: waits[seed])
    time.sleep(waits[last])
    assert server.generate(timeout=120, seed=last, steps=8).status_code == 200
    assert form.status_code == 429
    time.sleep(max(0, int(form.headers["retry-after"]) - waits[last]))
    assert as_form(server).status_code == 200


def test_a_killed_engine_fails_its_requests_at_once_and_comes_back(start_server):
    server = start_server().wait_until_ready()
    with ThreadPoolExecutor(4) as pool, server.stopped_engine() as engine:
        waiting = burst(pool, server, 4, steps=8, n=8)
        assert eventually(lambda: server.in_engine() == 32, 15)
        engine.kill()
        responses = [answer.result(timeout=10) for answer in waiting]  # their deadline is far
    assert {response.status_code for response in responses} == {503}
    assert {response.json()["code"] for response in responses} == {"engine_died"}
    assert (server.status("/ready"), server.status("/live")) == (503, 200)
    metrics = server.metrics()
    resident = [value for name, value in metrics.items() if name.startswith("sdxl_variant_resident_bytes")]
    assert (len(resident), sum(resident), metrics["sdxl_queue_depth"], metrics["sdxl_ready"]) == (7, 0, 0, 0)
    assert eventually(lambda: server.status("/ready") == 200, START_S)
    assert server.generate().status_code == 200
    assert server.metrics()['sdxl_engine_restarts_total{device="0"}'] == 1
    assert total(server.metrics(), "failed") == 4


def test_a_hung_engine_is_not_ready_then_killed_and_deaths_in_a_row_wait_longer(start_server):
    server = start_server(first="import app.engine.process; app.engine.process.HUNG_S = 8.0").wait_until_ready()
    with server.stopped_engine() as engine:
        assert eventually(lambda: "lately" in httpx.get(f"{server.url}/ready").text, 30)
        assert engine.is_running()
        assert eventually(lambda: has_ended(engine))

    def pauses() -> list[str]:
        return [line["event"].split()[-2] for line in server.log_lines() if "starting it again" in line["event"]]

    for deaths in range(1, 4):
        assert eventually(lambda: len(pauses()) == deaths)  # noqa: B023
        assert eventually(lambda: server.has_engine())
        server.engine().kill()
    assert eventually(lambda: len(pauses()) == 4)
    assert pauses() == ["0", "1", "2", "4"]
    assert server.metrics()['sdxl_engine_restarts_total{device="0"}'] == 4
    assert eventually(lambda: server.has_engine())
    server.engine().kill()  # the fifth time within a minute
    assert server.process.wait(30) == 1
    assert "died 5 times" in server.log.read_text()


def test_an_engine_that_dies_three_times_before_it_serves_ends_the_server(start_server):
    server = start_server()
    for _ in range(3):
        assert eventually(lambda: server.has_engine())
        engine = server.engine()
        engine.kill()
        assert eventually(lambda: has_ended(engine))  # noqa: B023
    assert server.process.wait(30) == 1
    assert "died 3 times" in server.log.read_text()
    assert "by SIGKILL" in server.log.read_text()


def test_an_engine_that_hangs_while_it_starts_is_killed(start_server):
    server = start_server(first="import app.engine.process; app.engine.process.HUNG_S = 3.0")
    assert eventually(lambda: server.has_engine())
    with server.stopped_engine() as engine:
        assert eventually(lambda: has_ended(engine), 20)


def test_an_engine_whose_start_never_ends_though_it_answers_is_killed(start_server, tmp_path):
    (tmp_path / "torch.py").write_text("import time; time.sleep(3600)")
    once = "import app.engine.process; app.engine.process.STILLBORN = 1"
    server = start_server(first=once, PYTHONPATH=str(tmp_path), START_TIMEOUT_S="4")
    assert server.process.wait(60) == 1
    assert "not ready after 4 s" in server.log.read_text()


def test_where_nothing_is_loaded_on_demand_a_variant_that_is_not_there_is_refused_by_name(start_server):
    server = start_server(LOAD_ON_DEMAND="0", PRELOAD="4step-unet,1step-unet").wait_until_ready()
    refused = server.generate(steps=8)
    assert (refused.status_code, refused.json()["code"], refused.json()["field"]) == (404, "not_loaded", "variant")
    assert "8step-unet is not loaded" in refused.json()["detail"]
    assert "4step-unet" in refused.json()["detail"]
    body = {"prompt": "a red apple", "model": "8step-unet"}
    openai = httpx.post(f"{server.url}/v1/images/generations", json=body)
    assert (openai.status_code, openai.json()["error"]["code"]) == (404, "model_not_found")
    assert server.generate(steps=4).status_code == 200


def test_an_engine_that_starts_leaves_with_a_killed_server(start_server):
    server = start_server()
    assert eventually(lambda: "engine started" in server.log.read_text())
    engine = server.engine()
    server.process.kill()
    assert eventually(lambda: has_ended(engine), 5)


def test_sigterm_finishes_what_was_accepted_and_refuses_the_rest(start_server):
    server = start_server().wait_until_ready()
    with ThreadPoolExecutor(9) as pool:
        with server.stopped_engine():
            accepted = burst(pool, server, 8, steps=8, n=4)
            assert eventually(lambda: server.in_engine() == 32, 15)
            server.process.send_signal(signal.SIGTERM)
            assert eventually(lambda: server.status("/ready") == 503, 10)
            assert server.generate().status_code == 503
        assert {answer.result().status_code for answer in accepted} == {200}
    assert server.process.wait(60) == 0


def test_signals_to_the_whole_group_twice_as_make_sends_them_still_drain(start_server):
    server = start_server().wait_until_ready()
    with ThreadPoolExecutor(4) as pool:
        with server.stopped_engine() as engine:
            accepted = burst(pool, server, 4, steps=8, n=4)
            assert eventually(lambda: server.in_engine() == 16, 15)
            for _ in range(2):
                os.killpg(server.process.pid, signal.SIGINT)
                engine.send_signal(signal.SIGINT)
                time.sleep(0.1)
        assert {answer.result().status_code for answer in accepted} == {200}
    assert server.process.wait(60) == 0
    assert eventually(lambda: has_ended(engine))


def test_a_hangup_under_nohup_is_nothing_and_a_later_second_sigint_ends_at_once(start_server):
    server = start_server(first="import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)").wait_until_ready()
    server.process.send_signal(signal.SIGHUP)
    assert server.generate().status_code == 200
    with ThreadPoolExecutor(1) as pool, server.stopped_engine():  # so that the drain would not end by itself
        stuck = burst(pool, server, 1)[0]
        assert eventually(lambda: server.in_engine() == 1, 10)
        server.process.send_signal(signal.SIGINT)
        time.sleep(1.2)
        assert server.process.poll() is None
        server.process.send_signal(signal.SIGINT)
        server.process.wait(30)  # its own drain would take 60
        assert stuck.exception() is not None or stuck.result().status_code >= 500


def test_the_engine_leaves_with_a_killed_server(start_server):
    server = start_server().wait_until_ready()
    engine = server.engine()
    server.process.kill()
    assert eventually(lambda: has_ended(engine), 30)


def test_undefined_weights_are_refused_and_the_other_variants_are_served(start_server, embedded_copy):
    path = embedded_copy / "sdxl_lightning_2step_unet.safetensors"
    save_file({key: torch.full_like(value, torch.nan) for key, value in load_file(path).items()}, path)
    server = start_server(MODEL_DIR=str(embedded_copy)).wait_until_ready()
    poisoned = server.generate(steps=2)
    assert (poisoned.status_code, poisoned.json()["code"]) == (503, "unavailable")
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


@pytest.mark.parametrize(
    ("file", "content", "named"),
    [
        ("unet/config.json", "[]", "unet/config.json"),
        ("unet/config.json", '"org/name"', "unet/config.json"),
        ("vae/config.json", "{}", "vae"),
        ("text_encoder/config.json", '{"hidden_act": "nonsense"}', "text_encoder"),
        ("tokenizer/vocab.json", "no JSON", "tokenizer"),
    ],
)
def test_a_part_that_cannot_be_opened_ends_the_server_with_one_sentence(
    start_server, embedded_copy, file, content, named
):
    (embedded_copy / file).write_text(content)
    server = start_server(MODEL_DIR=str(embedded_copy))
    assert server.process.wait(START_S) == 1
    (error,) = (line["event"] for line in server.log_lines() if line["level"] == "error")
    assert named in error
    assert len(error) <= 600
    assert "Traceback" not in server.log.read_text()
