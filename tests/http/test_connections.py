"""Connections that are slow, large or odd: each ends with a problem and a closed connection, and harms nobody."""

import socket
import time
from contextlib import ExitStack, suppress

import httpx
import pytest

from app.http.protocol import HEAD_LIMIT, RECEIVE_S
from tests.conftest import APPLE, PLAIN

HEAD = b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
OPEN_HEAD = b"GET /live HTTP/1.1\r\nhost: x\r\nx-a: "


def answer(sock: socket.socket) -> bytes:
    """All that comes until the other side hangs up; what still lies unread there may turn the end into a reset."""
    received = b""
    try:
        while part := sock.recv(65536):
            received += part
    except ConnectionResetError:
        pass
    return received


def ask(server, request: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as sock:
        sock.sendall(request)
        return answer(sock)


def test_requests_that_do_not_arrive_in_time_are_ended(server):
    """Nothing at all, half a head, half a body, a body behind its answer, and drops of a head: each for RECEIVE_S."""
    begun = (
        b"",
        OPEN_HEAD,
        HEAD + b'content-length: 9\r\n\r\n{"p',
        b"POST /x HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n",
    )
    with ExitStack() as stack:
        connected = (socket.create_connection(("127.0.0.1", server.port), timeout=60) for _ in begun)
        socks = [stack.enter_context(sock) for sock in connected]
        start = time.monotonic()
        for sock, request in zip(socks, begun, strict=True):
            sock.sendall(request)
        while time.monotonic() - start < RECEIVE_S - 2:
            time.sleep(0.5)
            with suppress(OSError):
                socks[1].sendall(b"a")
        nothing, head, body, after = (answer(sock) for sock in socks)
    assert time.monotonic() - start >= RECEIVE_S - 0.5
    assert nothing == b""
    for slow in (head, body):
        assert slow.startswith(b"HTTP/1.1 408")
        assert b"application/problem+json" in slow
        assert b"connection: close" in slow
    assert after.count(b"HTTP/1.1") == 1
    assert after.startswith(b"HTTP/1.1 404")
    assert server.generate(steps=1).status_code == 200


@pytest.mark.parametrize(
    "request_",
    [
        OPEN_HEAD + b"a" * HEAD_LIMIT + b"\r\n\r\n",
        OPEN_HEAD + b"a" * (400 << 10),  # and no end
        b"GET /live HTTP/1.1\r\n" + b"a: b\r\n" * 10_000 + b"\r\n",
        b"GET /" + b"a" * HEAD_LIMIT + b" HTTP/1.1\r\n\r\n",
    ],
)
def test_a_head_that_is_too_large_is_a_431(server, request_):
    refused = ask(server, request_)
    assert refused.startswith(b"HTTP/1.1 431")
    assert b'"detail": "the headers are over the limit' in refused


def test_a_body_of_many_tiny_chunks_is_cut_off(server):
    chunked = HEAD + b"transfer-encoding: chunked\r\n\r\n" + b"1\r\n \r\n" * 20_000
    assert b" 200 " not in ask(server, chunked)
    assert server.generate(steps=1).status_code == 200


def test_a_head_just_below_the_limit_and_requests_in_a_pipeline_are_served(server):
    get = b"GET /live HTTP/1.1\r\nhost: x\r\n"
    large = get + b"x-a: " + b"a" * (HEAD_LIMIT - 1000) + b"\r\n\r\n"
    last = get + b"connection: close\r\n\r\n"
    assert ask(server, large + (get + b"\r\n") * 20 + last).count(b"HTTP/1.1 200 OK") == 22


@pytest.mark.parametrize("path", ["/live", "/ready", "/metrics", "/v1/models"])
def test_head_is_get_without_its_body(server, path):
    got, head = (httpx.request(method, server.url + path, timeout=60, verify=PLAIN) for method in ("GET", "HEAD"))
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == got.headers["content-type"]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"content-type": "application/json"}, 200),
        ({"content-type": "Application/JSON; charset=utf-8"}, 200),
        ({"content-type": "application/vnd.api+json"}, 200),
        ({"content-type": "application/json", "content-encoding": "identity"}, 200),
        ({"content-type": "application/json", "content-encoding": "gzip"}, 415),
        ({"content-type": "application/jsonx"}, 415),
        ({"content-type": "text/json"}, 415),
        ({}, 415),
    ],
)
def test_json_is_what_rfc_8259_and_6839_call_so_and_comes_uncompressed(server, headers, status):
    body = f'{{"prompt": "{APPLE["prompt"]}", "steps": 1}}'.encode()
    response = httpx.post(f"{server.url}/generate", content=body, headers=headers, timeout=60, verify=PLAIN)
    assert response.status_code == status
    assert status == 200 or response.json()["code"] == "unsupported_media_type"
