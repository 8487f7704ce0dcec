"""A server under observation: its processes, its log, its health every tenth of a second, its memory every second."""

import asyncio
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from bench.chaos.clients import HOST
from bench.chaos.inside import environment

ROOT = Path(__file__).parents[2]
START_S = 180.0
WATCH_S = 0.1


@dataclass(frozen=True)
class Look:
    """Both health checks at one moment. live: its status, 0 without an answer. engines: that serve, by /ready."""

    at: float
    live: int
    engines: int


@dataclass(frozen=True)
class Size:
    """One process at one moment. rss: bytes."""

    at: float
    process: str
    pid: int
    rss: int
    descriptors: int
    threads: int


class Rig:
    """One server. is_file: its log is a file whose disk can become full; else a pipe whose reader can stop or leave.
    plant: see bench.chaos.inside."""

    def __init__(self, folder: Path, engines: int, is_file: bool, plant: str) -> None:
        with socket.socket() as probe:
            probe.bind((HOST, 0))
            self.port: int = probe.getsockname()[1]
        self.folder, self.engines, self.is_file = folder, engines, is_file
        self.looks: list[Look] = []
        self.sizes: list[Size] = []
        self.rests: list[tuple[float, float]] = []  # moments without anything in flight
        self.reads = threading.Event()  # whether somebody reads the pipe
        self.reads.set()
        inside = environment(folder, plant)
        path = os.pathsep.join((inside.pop("PYTHONPATH"), str(ROOT), os.environ.get("PYTHONPATH", "")))
        ours = {"HOST": HOST, "PORT": str(self.port), "MODEL": "embedded", "PYTHONPATH": path, **inside}
        if engines > 1:
            ours["ENGINES"] = str(engines)
        self.log = (folder / "log").open("wb")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "app.cli", "serve"],
            env={**os.environ, **ours},
            stderr=self.log if is_file else subprocess.PIPE,
            cwd=ROOT,
            start_new_session=True,
        )
        if not is_file:
            threading.Thread(target=self._read_log, daemon=True).start()

    async def wait_ready(self) -> float:
        """Until it serves at its full speed; after how many seconds it was live. Raises RuntimeError."""
        begin, live = time.monotonic(), 0.0
        async with httpx.AsyncClient(base_url=self.url, timeout=5) as client:
            while time.monotonic() < begin + START_S and self.process.poll() is None:
                if not live and (await _get(client, "/live"))[0] == 200:
                    live = round(time.monotonic() - begin, 1)
                _, told = await _get(client, "/ready")
                if told.get("compiled") and told["engines"] == self.engines:
                    return live
                await asyncio.sleep(WATCH_S)
        raise RuntimeError(f"the server is not ready; its log is in {self.folder}")

    @property
    def url(self) -> str:
        """Where it is."""
        return f"http://{HOST}:{self.port}"

    def engine(self) -> psutil.Process | None:
        """The engine process, where there is one."""
        try:
            for child in psutil.Process(self.process.pid).children():
                if "app.engine.worker" in child.cmdline():
                    return child
        except psutil.NoSuchProcess:
            pass
        return None

    def family(self) -> list[psutil.Process]:
        """Every process that was started by it, whoever its parent is now."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("CHAOS_DIR") == str(self.folder) and process.status() != "zombie":
                    found.append(process)
            except psutil.Error:
                continue
        return found

    async def watch(self) -> None:
        """Ask for its health and measure its processes, until cancelled."""
        measured = 0.0
        async with httpx.AsyncClient(base_url=self.url, timeout=2) as client:
            while True:
                begin = time.monotonic()
                (live, _), (_, told) = [await _get(client, path) for path in ("/live", "/ready")]
                self.looks.append(Look(begin, live, told.get("engines", 0)))
                if begin - measured >= 1:
                    measured = begin
                    self._measure(begin)
                await asyncio.sleep(max(0.0, begin + WATCH_S - time.monotonic()))

    async def metrics(self) -> dict[str, float]:
        """Every sample of /metrics."""
        async with httpx.AsyncClient(timeout=30) as client:
            lines = (await client.get(f"{self.url}/metrics")).text.splitlines()
        samples = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
        return {name: float(value) for name, value in samples}

    async def rest(self, seconds: float = 60.0) -> float:
        """Wait until nothing is in flight; how long that took."""
        begin = time.monotonic()
        while time.monotonic() < begin + seconds:
            now = await self.metrics()
            done = sum(value for name, value in now.items() if name.startswith("sdxl_requests_total"))
            if not now["sdxl_images_running"] + now["sdxl_queue_depth"] and done == now["sdxl_requests_received_total"]:
                break
            await asyncio.sleep(WATCH_S)
        return time.monotonic() - begin

    def limit_log(self, is_full: bool) -> None:
        """The disk of the log has no more room, or has again: a write beyond a file's limit fails as one to a full disk
        does."""
        size = os.fstat(self.log.fileno()).st_size if is_full else resource.RLIM_INFINITY
        for process in self.family():
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    def live_bytes(self, process: str) -> dict[int, list[tuple[float, float]]]:
        """What the probe saw: by process id, moments and bytes that are in use (of the HTTP process: by Python)."""
        column = 2 if process == "http" else 1
        found = {}
        for path in self.folder.glob(f"{process}-*"):
            lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("]")]
            found[int(path.name.split("-")[1])] = [(line[0], float(line[column])) for line in lines]
        return found

    def end(self) -> None:
        """Whatever is left of it."""
        for process in self.family():
            process.send_signal(signal.SIGKILL)
        self.process.wait()

    def _measure(self, now: float) -> None:
        named = {"http": psutil.Process(self.process.pid), "engine": self.engine()}
        for name, process in named.items():
            if process is None:
                continue
            try:
                with process.oneshot():
                    more = process.num_fds(), process.num_threads()
                    self.sizes.append(Size(now, name, process.pid, process.memory_info().rss, *more))
            except psutil.Error:
                continue

    def _read_log(self) -> None:
        assert self.process.stderr is not None
        descriptor = self.process.stderr.fileno()
        while self.reads.wait() and (part := os.read(descriptor, 4096)):
            self.log.write(part)
        self.log.flush()


async def until(condition: Callable[[], bool], seconds: float) -> bool:
    """Wait for what no event tells; whether it came true."""
    end = time.monotonic() + seconds
    while not (holds := condition()) and time.monotonic() < end:  # noqa: ASYNC110
        await asyncio.sleep(0.05)
    return holds


async def _get(client: httpx.AsyncClient, path: str) -> tuple[int, dict[str, Any]]:
    try:
        response = await client.get(path)
        return response.status_code, response.json()
    except httpx.TransportError:
        return 0, {}
