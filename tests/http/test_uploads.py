"""Large bodies: one, and all together, take a limited memory, and each arrives in time."""

import asyncio
import base64
import json
import socket
from contextlib import ExitStack

import httpx
import pytest

from app.http.limits import Body, Refused, Room
from app.http.protocol import RECEIVE_S
from tests.conftest import APPLE, PLAIN, ServerProcess, eventually

QUICK = "import app.http.limits as limits; limits.RECEIVE_S = 1.0"
LIMITS = {"MAX_BODY_MIB": "1", "MAX_BODIES_MIB": "2", "MIN_UPLOAD_KB_S": "500", "PRELOAD": "1step-unet"}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A server of little room, where a body has a second and what its bytes are worth."""
    with ServerProcess(tmp_path_factory.mktemp("small") / "log", first=QUICK, **LIMITS) as running:
        yield running


def begun(server: ServerProcess, length: int, sent: int) -> socket.socket:
    """A request whose body has arrived in part."""
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    head = f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    connection.sendall(head.encode() + b" " * sent)
    return connection


def status(connection: socket.socket) -> int:
    return int(connection.makefile("rb").readline().split()[1])


def test_a_body_over_the_limit_is_a_413_however_it_comes(small):
    body = b" " * (1 << 20) + json.dumps(APPLE).encode()
    headers = {"content-type": "application/json"}
    for content in (body, iter([body[: 1 << 19], body[1 << 19 :]])):
        response = httpx.post(f"{small.url}/generate", content=content, headers=headers, timeout=30, verify=PLAIN)
        assert response.status_code == 413


def test_more_than_all_may_take_is_a_503_with_retry_after_while_small_requests_are_served(small):
    with ExitStack() as stack:
        held = [stack.enter_context(begun(small, 1 << 20, (1 << 20) - 100_000)) for _ in range(2)]
        large = {**APPLE, "steps": 1, "image": base64.b64encode(bytes(400_000)).decode()}
        assert eventually(lambda: _refused(small, large), 5)
        assert small.generate(steps=1).status_code == 200
    del held
    assert eventually(lambda: small.generate(**large).status_code == 422, 10)  # no picture, but there is room for it


def _refused(server: ServerProcess, fields: dict[str, object]) -> bool:
    response = server.generate(**fields)
    if response.status_code != 503:
        return False
    assert response.json()["code"] == "too_many_bodies"
    return int(response.headers["retry-after"]) > 0


def test_a_body_that_stalls_is_a_408(small):
    with begun(small, 1 << 20, 100_000) as connection:
        assert status(connection) == 408


async def test_a_body_has_the_time_that_its_bytes_are_worth(monkeypatch):
    """1 MB of it gives it 10 s more, at 100 kB/s."""
    clock, nothing = [0.0], asyncio.Event()
    monkeypatch.setattr("app.http.limits.time.monotonic", lambda: clock[0])
    messages = [{"type": "http.request", "body": bytes(10**6), "more_body": True}]

    async def receive():
        if not messages:
            await nothing.wait()
        return messages.pop()

    body = Body(receive, Room(10**7, 10**7, 10**5), 10**7, {})
    clock[0] = RECEIVE_S - 0.1
    await body.receive()
    clock[0] = RECEIVE_S + 9.9
    messages.append({"type": "http.request", "body": b"", "more_body": True})
    await body.receive()
    clock[0] = RECEIVE_S + 10.1
    with pytest.raises(Refused, match="did not arrive within 20 s"):
        await body.receive()
