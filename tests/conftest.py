"""Real components for the tests: a real server process on a real port, with the weights that ship."""

import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import httpx
import psutil
import pytest

if TYPE_CHECKING:
    from playwright.async_api import Page

ROOT = Path(__file__).parent.parent
TOOLS = Path(os.environ.get("TOOLS", ROOT / ".venv" / "tools"))  # of make .venv/tooled
EMBEDDED = ROOT / "models" / "embedded"
APPLE = {"prompt": "a red apple on a blue background", "steps": 4, "seed": 7}
START_S = 120  # to wait for a server: a shared machine of 2 cores
PLAIN = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # httpx would load every certificate at every call: 40 ms of a core


class ServerProcess:
    """`sdxl-lightning serve` in a process of its own, in float32 so that oracles agree to rounding.

    first: Python to run in that process before the server, where a limit takes too long to wait for."""

    def __init__(self, log: Path, first: str = "", cwd: Path = ROOT, **settings: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        # As plain modules, which start faster than what the CPU would compile.
        # "x" is the host that raw requests name.
        defaults = {
            "DTYPE": "float32",
            "COMPILE": "0",
            "MODEL": "embedded",
            "THREADS": "1",
            "PORT": str(self.port),
            "ALLOWED_HOSTS": "x",
        }
        path = os.pathsep.join(filter(None, (settings.pop("PYTHONPATH", ""), str(ROOT))))
        with log.open("w") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", f"{first}\nfrom app.cli import main; main()", "serve"],
                env={**os.environ, **defaults, **settings, "PYTHONPATH": path},
                stderr=stderr,
                cwd=cwd,
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        return self.wait_until_ready()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def wait_until_ready(self) -> Self:
        """Block until /ready says 200."""
        end = time.monotonic() + START_S
        while time.monotonic() < end and self.process.poll() is None:
            if self.status("/ready") == 200:
                return self
            time.sleep(0.1)
        self.process.kill()
        self.process.wait()
        raise AssertionError(f"the server is not ready:\n{self.log.read_text()[-3000:]}")

    def status(self, path: str) -> int:
        """The status of a GET, or 0 if nobody answers."""
        try:
            return httpx.get(self.url + path, timeout=5, verify=PLAIN).status_code
        except httpx.TransportError:
            return 0

    def generate(self, **fields: object) -> httpx.Response:
        """POST /generate with the apple's fields unless others are given."""
        return httpx.post(f"{self.url}/generate", json={**APPLE, **fields}, timeout=120, verify=PLAIN)

    @contextmanager
    def stopped_engine(self) -> Iterator[psutil.Process]:
        """Keep every engine from working, so that what arrives meanwhile is in them together, however slow the machine.
        Not for longer than the server waits for an engine that hangs: 20 s. Yields the first."""
        engines = self.engines()
        for engine in engines:
            engine.suspend()
        try:
            yield engines[0]
        finally:
            for engine in engines:
                with suppress(psutil.NoSuchProcess):
                    engine.resume()

    def in_engine(self) -> float:
        """Pictures that the engine has and that somebody waits for."""
        metrics = self.metrics()
        return metrics["sdxl_images_running"] + metrics["sdxl_queue_depth"]

    def engine(self) -> psutil.Process:
        """The engine process."""
        return self.engines()[0]

    def has_engine(self) -> bool:
        """Whether there is one, at whatever stage."""
        return bool(self.engines())

    def engines(self) -> list[psutil.Process]:
        """All of them, in the order they were started."""
        found = []
        for child in psutil.Process(self.process.pid).children():
            with suppress(psutil.NoSuchProcess):  # it may end while we look
                if "app.engine.worker" in child.cmdline():
                    found.append(child)
        return found

    def metrics(self) -> dict[str, float]:
        """Every sample of /metrics by its name and labels."""
        lines = httpx.get(f"{self.url}/metrics", timeout=60, verify=PLAIN).text.splitlines()
        samples = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
        return {name: float(value) for name, value in samples}

    def log_lines(self) -> list[dict[str, Any]]:
        """The server's log, line by line; what libraries print is left out."""
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]

    def wait_for_batches(self) -> None:
        """On a CPU calls of several rows come beside the service."""
        assert eventually(lambda: 'sdxl_step_cost_seconds{batch="4",device="0"}' in self.metrics(), 120)

    def stop(self) -> int:
        """Ask it to leave, and return its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(90)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """One server for all tests that leave it as they found it; on the code that users are served by."""
    with ServerProcess(tmp_path_factory.mktemp("server") / "log", COMPILE="1", THREADS="2") as running:
        yield running


@pytest.fixture
def start_server(tmp_path: Path) -> Iterator[Callable[..., ServerProcess]]:
    """Starts servers of the test's own, and stops them."""
    started: list[ServerProcess] = []

    def start(**settings: Any) -> ServerProcess:
        started.append(ServerProcess(tmp_path / f"log-{len(started)}", **settings))
        return started[-1]

    yield start
    for running in started:
        running.stop()


@pytest.fixture
def embedded_copy(tmp_path: Path) -> Path:
    """A copy of the embedded weights that a test may damage."""
    return Path(shutil.copytree(EMBEDDED, tmp_path / "embedded"))


def needed(what: str, package: str) -> str:
    """The path of a program or file that a test needs. Where it is missing the test is skipped; in CI it fails."""
    found = shutil.which(what) or (what if Path(what).exists() else None)
    if found is None:
        reason = f"{what} is not installed (Debian: apt-get install {package})"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return found


@asynccontextmanager
async def browser_page(**options: Any) -> AsyncIterator["Page"]:
    """A page in a browser of its own. options: of Playwright's new_context()."""
    from playwright.async_api import async_playwright  # half a second, which few tests need

    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path=needed("chromium", "chromium"),
            args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"],
        )
        page = await (await browser.new_context(**options)).new_page()
        page.set_default_timeout(120_000)  # milliseconds: a browser needs both cores of a shared machine
        yield page
        await browser.close()


def eventually(condition: Callable[[], bool], seconds: float = 60) -> bool:
    """Whether the condition comes true in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return condition()
