"""The log: JSON lines, and never a reason to wait or to fail."""

import json

import httpx
import pytest

from tests.conftest import PLAIN

FULL = "import os; os.dup2(os.open('/dev/full', os.O_WRONLY), 2)"
UNREAD = "import os; unread, end = os.pipe(); os.dup2(end, 2)"
BROKEN = "import os; unread, end = os.pipe(); os.dup2(end, 2); os.close(unread)"
CLOSED = "import os; os.close(2)"


@pytest.mark.parametrize("stderr", [FULL, UNREAD, BROKEN, CLOSED])
def test_a_log_that_nobody_can_read_stops_nothing_and_is_counted(start_server, stderr):
    server = start_server(first=stderr).wait_until_ready()
    with httpx.Client(base_url=server.url, timeout=10, verify=PLAIN) as client:
        for _ in range(1600 if stderr is UNREAD else 1):  # a pipe holds 64 KB, our queue 1,000 lines
            assert client.get(f"/{'a' * 300}").status_code == 404
        assert client.get("/live").status_code == 200
    assert server.generate().status_code == 200
    assert server.metrics()["sdxl_log_lines_dropped_total"] > 0
    assert server.stop() == 0


def test_every_line_is_short_ascii_json_whatever_libraries_print(start_server):
    server = start_server(OMP_DISPLAY_ENV="TRUE", TRANSFORMERS_VERBOSITY="info", LOG_LEVEL="Info").wait_until_ready()
    httpx.get(f"{server.url}/%c2%9b%e2%80%a8{'a' * 10_000}", verify=PLAIN)
    assert server.stop() == 0
    text = server.log.read_bytes().decode("ascii")
    lines = [json.loads(line) for line in text.splitlines()]
    assert max(len(line["event"]) for line in lines) <= 300
    assert max(len(line.get("path", "")) for line in lines) == 200
    assert any("OMP" in line["event"] for line in lines)  # which is C
