"""The server under Ray Serve, and what its clients see when something dies or changes: `make test-ray`.

pytest finds this file only where it is named. Each check prints what it saw; docs/fleet.md has the table.
"""

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from bench.client import Client, Reply
from bench.load import percentile
from bench.work import EVEN_MIX, FOUR, stream
from tests.conftest import APPLE, PLAIN, ROOT, START_S, ServerProcess, eventually

BIN = ROOT / "build" / "ray" / "bin"
CONFIG = yaml.safe_load((ROOT / "deploy" / "ray.yaml").read_text())
ENVIRONMENT = dict(
    line.split("=", 1)
    for line in (ROOT / "deploy" / "ray.env").read_text().splitlines()
    if "=" in line[:60] and line[0] != "#"
)
CLIENTS = 8


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Cluster:
    """Ray on this machine, in a process group of its own. log: what it prints."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port, self.dashboard = folder, free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        command = ["start", "--head", "--block", "--num-cpus=4", f"--port={free_port()}", f"--temp-dir={folder}"]
        self.process = subprocess.Popen(
            [BIN / "ray", *command, f"--dashboard-port={self.dashboard}", "--disable-usage-stats"],
            env={**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT)},
            cwd=ROOT,
            stdout=(folder / "log").open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        assert eventually(lambda: self._ask("/api/version") is not None, START_S), (folder / "log").read_text()

    def deploy(self, **server: Any) -> None:
        """`serve deploy` of the file that ships, with other arguments or options of the deployment."""
        args = server.pop("args", {})
        config = json.loads(json.dumps(CONFIG))
        config["http_options"]["port"] = self.port
        (application,) = config["applications"]
        application["args"] |= args
        (deployment,) = application["deployments"]
        deployment |= server
        if "autoscaling_config" in server:
            del deployment["num_replicas"]
        path = self.folder / "serve.yaml"
        path.write_text(yaml.safe_dump(config))
        command = [BIN / "serve", "deploy", "--address", f"http://127.0.0.1:{self.dashboard}", path]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=ROOT, timeout=120)

    def replicas(self) -> dict[int, str]:
        """The state of each replica by the id of its process."""
        found = self._ask("/api/serve/applications/") or {}
        deployments = found.get("applications", {}).get("pictures", {}).get("deployments", {})
        return {each["pid"]: each["state"] for each in deployments.get("Server", {}).get("replicas", [])}

    def is_whole(self, *pids: int, count: int = 2) -> bool:
        """Whether so many replicas run, and none of these processes."""
        states = self.replicas()
        return [*states.values()].count("RUNNING") == count and not {*pids} & {*states} and len(states) == count

    def engine_of(self, pid: int) -> psutil.Process:
        (engine,) = (each for each in psutil.Process(pid).children() if "app.engine.worker" in each.cmdline())
        return engine

    def stop(self) -> None:
        """End all that it started, and only that."""
        started = psutil.Process(self.process.pid).children(recursive=True)
        self.process.terminate()
        self.process.wait(60)
        _, alive = psutil.wait_procs(started, 10)
        for each in alive:
            each.kill()

    def _ask(self, path: str) -> Any:
        try:
            return httpx.get(f"http://127.0.0.1:{self.dashboard}{path}", timeout=10, verify=PLAIN).json()
        except (httpx.TransportError, ValueError):
            return None


@dataclass
class Seen:
    """What clients saw. lost: every answer that is no picture; a refusal of admission is none of them."""

    pictures: int = 0
    refused: int = 0
    lost: list[Reply] = field(default_factory=list)
    took: list[float] = field(default_factory=list)

    @property
    def losses(self) -> dict[str, int]:
        """How often each kind of loss was seen."""
        return dict(
            Counter(
                f"{reply.status} {reply.header('content-type')}" if reply.status else "closed" for reply in self.lost
            )
        )


@asynccontextmanager
async def load(port: int, clients: int = CLIENTS) -> AsyncIterator[Seen]:
    """So many clients, each asking again as soon as its answer is there, until the block ends and all have come."""
    seen, work, is_over = Seen(), stream("ray", EVEN_MIX), False

    async def ask(client: Client) -> None:
        while not is_over:
            start = time.monotonic()
            reply = await client.post(next(work).body())
            seen.pictures += reply.status == 200
            seen.refused += reply.status == 429
            if reply.status not in (200, 429):
                seen.lost.append(reply)
            seen.took.append(time.monotonic() - start)
            if reply.status != 200:
                await asyncio.sleep(0.1)

    async with Client("127.0.0.1", port) as client, asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(ask(client))
        yield seen
        is_over = True


async def seconds_until(condition: Callable[[], bool], limit: float = START_S) -> float:
    """How long it takes until it holds."""
    start = time.monotonic()
    assert await asyncio.to_thread(eventually, condition, limit)
    return time.monotonic() - start


def say(what: str, seen: Seen, **figures: float) -> None:
    """One row of the table."""
    told = ", ".join(f"{name.replace('_', ' ')} {value:.1f} s" for name, value in figures.items())
    print(f"\n{what}: {seen.pictures} pictures, lost {seen.losses or 0}, refused {seen.refused}, "
          f"slowest {max(seen.took):.1f} s{', ' * bool(told)}{told}")  # fmt: skip


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    # A socket's path has 107 characters at most, so not in pytest's folder.
    folder = Path(tempfile.mkdtemp(prefix="ray-"))
    running = Cluster(folder)
    try:
        running.deploy()
        assert eventually(running.is_whole, START_S), running.replicas()
        assert eventually(lambda: httpx.get(f"{running.url}/ready", verify=PLAIN).status_code == 200)
        yield running
    finally:
        running.stop()
        shutil.rmtree(folder, ignore_errors=True)


def generate(cluster: Cluster, **fields: object) -> httpx.Response:
    return httpx.post(f"{cluster.url}/generate", json={**APPLE, **fields}, timeout=60, verify=PLAIN)


def test_answers_pass_as_they_are(cluster):
    drawn = generate(cluster)
    assert drawn.status_code == 200
    assert {"server-timing", "x-request-id"} <= drawn.headers.keys()
    assert len(drawn.headers.get_list("x-request-id")) == 1
    assert all(generate(cluster).json()["images"] == drawn.json()["images"] for _ in range(4))  # whichever draws
    refused = generate(cluster, steps=0)
    assert (refused.status_code, refused.headers["content-type"]) == (422, "application/problem+json")


def test_a_client_that_leaves_takes_its_pictures_along(cluster):
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{cluster.url}/generate", json={**APPLE, "n": 8, "steps": 8}, timeout=0.02, verify=PLAIN)
    dropped = 'sdxl_requests_total{outcome="dropped",variant="8step-unet"} 1.0'
    assert eventually(
        lambda: dropped in httpx.get(f"{cluster.url}/metrics", verify=PLAIN).text
    )  # now this, now that one


async def test_a_replica_that_dies_costs_what_it_was_drawing(cluster):
    victim = next(iter(cluster.replicas()))
    async with load(cluster.port) as seen:
        await asyncio.sleep(3)
        os.kill(victim, signal.SIGKILL)
        whole = await seconds_until(lambda: cluster.is_whole(victim))
        await asyncio.sleep(3)
    say("replica killed", seen, whole_again_after=whole)
    assert len(seen.lost) <= CLIENTS
    assert {reply.status for reply in seen.lost} <= {0, 500}


async def test_an_engine_that_dies_costs_what_it_was_drawing_and_its_replica_is_replaced(cluster):
    victim = next(iter(cluster.replicas()))
    async with load(cluster.port) as seen:
        await asyncio.sleep(3)
        cluster.engine_of(victim).kill()
        whole = await seconds_until(lambda: cluster.is_whole(victim))
        await asyncio.sleep(3)
    say("engine killed", seen, whole_again_after=whole)
    assert len(seen.lost) <= 3 * CLIENTS
    told = [reply for reply in seen.lost if reply.status == 503]
    assert all(reply.header("retry-after") for reply in told)
    assert len(told) >= len(seen.lost) - 1


async def test_a_rolling_redeploy_loses_nothing(cluster):
    before = [*cluster.replicas()]
    async with load(cluster.port) as seen:
        await asyncio.sleep(3)
        await asyncio.to_thread(cluster.deploy, args={"TIMEOUT_S": 29})
        whole = await seconds_until(lambda: cluster.is_whole(*before), 240)
        await asyncio.sleep(3)
    say("rolling redeploy", seen, done_after=whole)
    assert not seen.lost


async def test_replicas_come_and_go_with_the_work_that_is_queued(cluster):
    scaling = {
        "min_replicas": 1,
        "max_replicas": 2,
        "look_back_period_s": 3,
        "upscale_delay_s": 2,
        "downscale_delay_s": 5,
        "policy": {"policy_function": "deploy.ray_serve:replicas_for"},
    }
    # 0.2 s of work is as much as a replica should have.
    await asyncio.to_thread(cluster.deploy, args={"TIMEOUT_S": 0.6}, autoscaling_config=scaling)
    await seconds_until(lambda: cluster.is_whole(count=1), 240)
    async with load(cluster.port, 1) as quiet:
        async with load(cluster.port, 24) as seen:
            up = await seconds_until(lambda: cluster.is_whole(count=2))
            await asyncio.sleep(3)
        down = await seconds_until(lambda: cluster.is_whole(count=1), 240)
        await asyncio.sleep(3)
    say("scaled up under load", seen, up_after=up)
    say("scaled down under load", quiet, down_after=down)
    assert not [reply for reply in (*seen.lost, *quiet.lost) if reply.status != 504]  # a deadline of 0.6 s


async def test_what_ray_adds_to_a_picture(cluster, tmp_path):
    await asyncio.to_thread(cluster.deploy)
    await seconds_until(cluster.is_whole, 240)
    plain = ServerProcess(tmp_path / "log", COMPILE="1", DTYPE="bfloat16", THREADS="1").wait_until_ready()
    plain.wait_for_batches()
    work = stream("overhead", FOUR)
    took: dict[int, list[float]] = {plain.port: [], cluster.port: []}
    try:
        for _ in range(20):
            for port, times in took.items():
                async with Client("127.0.0.1", port) as client:
                    for number in range(10):
                        body = next(work).body()
                        start = time.perf_counter()
                        assert (await client.post(body)).status == 200
                        if number:
                            times.append(1e3 * (time.perf_counter() - start))
    finally:
        plain.stop()
    alone, ray = (percentile(times, 50) for times in took.values())
    print(f"\none client, 4 steps, p50 of {len(took[plain.port])}: {alone:.1f} ms plain, {ray:.1f} ms through HAProxy")
    assert ray - alone < 20
