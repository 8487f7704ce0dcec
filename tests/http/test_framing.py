"""Where a request ends, and how a connection does: one reading of every head, and a refusal that can be read."""

import json
import signal
import socket
import time
import urllib.error
import urllib.request
from contextlib import suppress

import pytest

from tests.conftest import APPLE
from tests.http.test_connections import answer, ask

BODY = json.dumps({**APPLE, "steps": 1}).encode()
POST = b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
H2C = b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABk\r\n"
GET = b"GET /live HTTP/1.1\r\nhost: x\r\n"


def post(server, body: bytes) -> tuple[int, bytes]:
    """Status and body of what urllib gets: it sends everything, with Connection: close, before it reads."""
    request = urllib.request.Request(f"{server.url}/generate", body, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, reply.read()
    except urllib.error.HTTPError as refused:
        with refused:
            return refused.code, refused.read()


def chunked(body: bytes) -> bytes:
    return b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)


@pytest.mark.parametrize("offer", [H2C, b"connection: upgrade\r\nupgrade: websocket\r\n", b"upgrade: TLS/1.0\r\n"])
@pytest.mark.parametrize("framing", ["length", "chunks", "later"])
def test_an_upgrade_that_is_not_taken_changes_nothing(server, offer, framing):
    """The body is the body, also when it comes in a later segment, and the connection serves the next request."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as sock:
        if framing == "chunks":
            sock.sendall(POST + offer + b"transfer-encoding: chunked\r\n\r\n" + chunked(BODY))
        else:
            head = POST + offer + b"content-length: %d\r\n\r\n" % len(BODY)
            parts = [head, BODY] if framing == "later" else [head + BODY]
            for part in parts:
                sock.sendall(part)
        sock.sendall(GET + b"connection: close\r\n\r\n")
        received = answer(sock)
    assert received.count(b"HTTP/1.1 200 OK") == 2
    assert received.count(b"HTTP/1.1") == 2


def test_a_request_hidden_in_a_body_is_not_served(server):
    hidden = b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n"
    head = POST + H2C + b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(hidden)
    received = ask(server, head + hidden)
    assert received.count(b"HTTP/1.1") == 1
    assert received.startswith(b"HTTP/1.1 422")


@pytest.mark.parametrize(
    "head",
    [
        b"GET /live HTTP/1.1\r\n",
        b"GET /live HTTP/1.1\r\nhost: a\r\nhost: b\r\n",
        b"GET /live HTTP/2.0\r\nhost: x\r\n",
        b"GET /live HTTP/0.9\r\nhost: x\r\n",
        b"POST /generate HTTP/1.1\r\nhost: x\r\ntransfer-encoding: gzip, chunked\r\n",
        b"CONNECT x:80 HTTP/1.1\r\nhost: x\r\n",
    ],
)
def test_a_head_with_two_meanings_is_a_400(server, head):
    refused = ask(server, head + b"\r\n")
    assert refused.startswith(b"HTTP/1.1 400")
    assert b"application/problem+json" in refused


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b'{"prompt": "x", "steps": 1, "steps": 8}', "a key twice"),
        ('{"prompt": "café"}'.encode("latin-1"), "not UTF-8"),
        ('{"prompt": "x"}'.encode("utf-16"), "not UTF-8"),
        (b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", "digits"),
        (b"[" * 60_000, "nested too deeply"),
        (b'{"prompt": "x"', "delimiter"),
    ],
)
def test_json_with_no_or_two_meanings_is_a_422_that_says_why(server, body, why):
    status, said = post(server, body)
    problem = json.loads(said)
    assert (status, problem["status"], problem["code"]) == (422, 422, "invalid_request")
    assert problem["detail"].startswith("the body is not valid JSON: ")
    assert why in problem["detail"]


def test_a_byte_order_mark_is_skipped_and_other_digits_are_none(server):
    assert post(server, b"\xef\xbb\xbf" + BODY)[0] == 200
    odd = json.dumps({"prompt": "x", "size": "1\u0662\u0668x128"}).encode()
    assert post(server, odd)[0] == 422


def test_a_client_that_sends_all_of_a_large_body_first_reads_the_413(server):
    for size in (21 << 20, 40 << 20):
        assert post(server, b" " * size)[0] == 413


@pytest.mark.parametrize(("content_type", "status"), [("application/json", b"413"), ("text/plain", b"415")])
def test_what_the_head_refuses_is_refused_without_100_continue(server, content_type, status):
    head = b"POST /generate HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-type: " + content_type.encode()
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as sock:
        sock.sendall(head + b"\r\ncontent-length: 99999999\r\n\r\n")
        assert sock.recv(12) == b"HTTP/1.1 " + status


def test_a_client_that_never_ends_its_body_is_cut_off(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as sock:
        sock.sendall(POST + b"content-length: 10000000000\r\n\r\n")
        sent = 0
        with suppress(OSError):  # a reset, or a broken pipe
            while sent < 2 << 30:
                sent += sock.send(b" " * (1 << 20))
        assert sent < 256 << 20


def test_while_it_drains_answers_close_their_connection_and_a_second_sigterm_ends_it(start_server):
    server = start_server().wait_until_ready()
    with server.stopped_engine(), socket.create_connection(("127.0.0.1", server.port), timeout=60) as waiting:
        waiting.sendall(POST + b"content-length: %d\r\n\r\n" % len(BODY) + BODY)
        while server.in_engine() < 1:
            pass
        server.process.send_signal(signal.SIGHUP)
        while b"connection: close" not in ask(server, GET + b"\r\n"):
            pass
        assert server.process.poll() is None
        time.sleep(0.6)  # two signals at once are one
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(10)
