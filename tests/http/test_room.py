"""Slow readers, many connections, and no descriptors left: others are served, and an engine can always be started."""

import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import httpx
import psutil
import pytest

from tests.conftest import PLAIN, START_S, ServerProcess, eventually

GET = b"GET %b HTTP/1.1\r\nhost: x\r\n\r\n"
LARGE = b"/static-offline-docs/swagger-ui-bundle.js"  # 1.4 MB, of which the kernel takes some
FEW_DESCRIPTORS = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))"
TAKE_THE_REST = """
import os, signal
def take(*_):
    try:
        while True:
            os.open(os.devnull, os.O_RDONLY)
    except OSError:
        pass
signal.signal(signal.SIGUSR1, take)"""


@contextmanager
def clients(server: ServerProcess, count: int, request: bytes, wait: bool = True) -> Iterator[list[socket.socket]]:
    """So many connections that send one request each. wait: for the first bytes of each answer."""
    with ExitStack() as stack:
        opened = []
        for _ in range(count):
            sock = stack.enter_context(socket.socket())
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.settimeout(10)
            sock.connect(("127.0.0.1", server.port))
            opened.append(sock)
            sock.sendall(request)
            if wait:
                assert sock.recv(12) == b"HTTP/1.1 200"
        yield opened


def is_open(sock: socket.socket) -> bool:
    sock.settimeout(0.2)
    try:
        while sock.recv(65536):
            pass
    except TimeoutError:
        return True
    except ConnectionResetError:
        pass
    return False


def descriptors(server: ServerProcess) -> int:
    return psutil.Process(server.process.pid).num_fds()


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Iterator[ServerProcess]:
    settings = {"MAX_CONNECTIONS": "12", "SEND_TIMEOUT_S": "1"}
    with ServerProcess(tmp_path_factory.mktemp("small") / "log", **settings) as running:
        yield running


def test_an_answer_that_nobody_reads_is_given_up(small):
    before = descriptors(small)
    with clients(small, 8, GET % LARGE * 8):
        assert descriptors(small) >= before + 8
        assert small.status("/live") == 200
        assert eventually(lambda: descriptors(small) <= before)


def test_the_connection_that_has_been_idle_longest_makes_way(small):
    with clients(small, 12, GET % b"/live") as idle:
        while idle[0].recv(65536)[-1:] != b"}":
            pass
        idle[0].sendall(GET % b"/live")  # so that the second is the longest idle
        assert idle[0].recv(12)
        with clients(small, 2, GET % b"/live"):
            assert [is_open(sock) for sock in idle[:4]] == [True, False, False, True]


def test_where_every_connection_is_at_work_one_more_is_told_so(small):
    post = b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 25\r\n\r\n"
    before = descriptors(small)
    with small.stopped_engine(), clients(small, 12, post + b'{"prompt": "a red apple"}', wait=False):
        assert eventually(lambda: descriptors(small) >= before + 12)
        response = httpx.get(f"{small.url}/live", verify=PLAIN)
        assert (response.status_code, response.json()["code"]) == (503, "too_many_connections")
        assert int(response.headers["retry-after"]) >= 1
    assert eventually(lambda: small.status("/live") == 200)


def test_an_engine_is_started_whatever_takes_the_descriptors(start_server):
    """Connections, which others are served beside; then something that leaves none."""
    server = start_server(first=FEW_DESCRIPTORS + TAKE_THE_REST).wait_until_ready()

    def engines() -> int:
        return sum("ready: " in line["event"] for line in server.log_lines())

    with clients(server, 200, GET % b"/live" * 8, wait=False), clients(server, 12, GET % LARGE * 8, wait=False):
        server.engine().kill()
        assert eventually(lambda: engines() == 2, START_S)
        assert server.generate(steps=1).status_code == 200
    assert any("ulimit -n" in line["event"] for line in server.log_lines())
    assert eventually(lambda: server.process.send_signal(signal.SIGUSR1) or descriptors(server) == 64)
    server.engine().kill()
    assert eventually(lambda: engines() == 3, START_S)
