"""The servers that are compared: how each is started, made ready, stopped for a while, and ended."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import IO, Any

from app.engine.process import allocator
from bench.client import Client

HOST = "127.0.0.1"
START_S = 180.0  # a server that is not ready by then has failed
ROOT = Path(__file__).parents[1]


class Contender:
    """A server in a process group of its own, on a free port.

    rests: it is stopped (SIGSTOP) while others are measured. LitServe's idle worker polls its queue a thousand times a
    second, which would be charged to whoever is measured; ours sleeps when idle, and watches a clock that goes on.
    """

    def __init__(
        self, name: str, command: list[str], ready_path: str, environment: dict[str, str], rests: bool
    ) -> None:
        self.name, self.ready_path, self.rests = name, ready_path, rests
        self.port = _free_port()
        self.command = [part.format(port=self.port) for part in command]
        self.environment = {key: value.format(port=self.port) for key, value in environment.items()}
        self.settings: dict[str, Any] = {}
        self.readiness: dict[str, Any] = {}  # what it said last
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None

    def start(self, logs: Path) -> None:
        """Launch it; its output goes to a file in `logs`."""
        logs.mkdir(parents=True, exist_ok=True)
        self._log = (logs / f"{self.name}.log").open("w+b")
        self._process = subprocess.Popen(
            self.command, cwd=ROOT, env={**os.environ, **self.environment}, stdout=self._log, stderr=self._log,
            start_new_session=True,
        )  # fmt: skip

    @property
    def pid(self) -> int:
        """Of its first process."""
        assert self._process is not None
        return self._process.pid

    def wait_ready(
        self, is_ready: Callable[[dict[str, Any]], bool] = lambda body: True, limit: float = START_S
    ) -> bool:
        """Wait until it says that it is ready, and until `is_ready` likes the JSON it says it with; False at the limit.
        Raises RuntimeError if the server ends."""
        deadline = time.monotonic() + limit
        while time.monotonic() < deadline:
            if self._process is None or self._process.poll() is not None:
                raise RuntimeError(f"{self.name} ended while starting: {self.last_words()}")
            body = self.ask()
            if body is not None and is_ready(body):
                self.readiness = body
                return True
            time.sleep(0.2)
        return False

    def ask(self) -> dict[str, Any] | None:
        """What it says of its readiness; None while it is not ready."""
        try:
            with urllib.request.urlopen(f"http://{HOST}:{self.port}{self.ready_path}", timeout=5) as reply:
                text = reply.read()
        except (urllib.error.URLError, OSError):
            return None
        try:
            body = json.loads(text)
        except ValueError:
            body = None
        return body if isinstance(body, dict) else {}

    def last_words(self) -> str:
        """The end of its output."""
        if self._log is None:
            return ""
        self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - 2000))
        return self._log.read().decode(errors="replace")

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[Client]:
        """It runs; yields a client for it. Afterwards it rests."""
        self._signal(signal.SIGCONT)
        async with Client(HOST, self.port) as client:
            yield client
        self._signal(signal.SIGSTOP)

    async def apply(self, settings: dict[str, Any]) -> None:
        """Change a peer's settings, within its turn or outside."""
        if settings == self.settings:
            return
        async with self.turn() as client:
            reply = await client.post(json.dumps({"settings": settings}).encode())
        if reply.status != 204:
            raise RuntimeError(f"{self.name} did not take {settings}: {reply.status} {self.last_words()}")
        self.settings = settings

    def rest(self) -> None:
        """Stop it until its next turn."""
        self._signal(signal.SIGSTOP)

    def end(self) -> None:
        """Ask it to leave, then make sure of it."""
        if self._process is None:
            return
        self._signal(signal.SIGCONT)
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(20)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # children that outlived it
        self._process.wait()

    def _signal(self, which: signal.Signals) -> None:
        if self.rests and self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, which)


def ours(name: str = "ours", **settings: str) -> Contender:
    """Our server, with these settings and its defaults."""
    environment = {"HOST": HOST, "PORT": "{port}", "MODEL": "embedded", **settings}
    return Contender(name, [sys.executable, "-m", "app.cli", "serve"], "/ready", environment, rests=False)


def peer(name: str, threads: int) -> Contender:
    """(a) fastapi or (b) litserve; with the allocator that our engine gets, so that none is faster by that."""
    command = [sys.executable, "-m", f"bench.{name}_peer", "{port}", str(threads)]
    ready_path = "/health" if name == "litserve" else "/ready"
    return Contender(name, command, ready_path, {**allocator(), "OMP_NUM_THREADS": str(threads)}, rests=True)


NAMES = ("ours", "fastapi", "litserve")


def contender(name: str, threads: int) -> Contender:
    """One of NAMES."""
    return ours(THREADS=str(threads)) if name == "ours" else peer(name, threads)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port
