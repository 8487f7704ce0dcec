"""The whole server over HTTP, with PNG: a real process, a real port, the same load generator as `make bench`."""

import asyncio
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bench.client import Client
from bench.contenders import Contender, ours
from bench.gpu.rig import Rig
from bench.gpu.timing import Clock, Keep
from bench.load import Phase, closed_loop, open_loop
from bench.work import EVEN_MIX, FOUR, Work, stream

CLIENTS = 16
HEADLINE = "closed, 16 clients, 4 steps"
LOADS = 4
LEAST_S = 150.0  # that must be left to begin with a second server
READY_S = 240.0  # a load, three recordings, and cuDNN's choice for each new convolution; then eight more recordings


def served(
    rig: Rig,
    folder: Path,
    cache: Path,
    compiles: bool,
    seconds: float,
    left: Clock,
    keep: Keep,
    earlier: dict[str, Any],
) -> dict[str, Any]:
    """Start it and load it, unless `earlier` has that and it compiles; then, where it compiles and time is left, load a
    second one once its compiled code is in place."""
    found: dict[str, Any] = {**(earlier if compiles and HEADLINE in earlier else {}), "compiled": {}}

    def kept() -> None:
        rates = [loads[HEADLINE]["images_per_s"] for loads in (found, found["compiled"]) if HEADLINE in loads]
        found["images_per_s_4step_http_1024"] = max(rates, default=None)
        keep(found)

    if HEADLINE not in found:
        with _running(_server(rig, folder, cache, False), folder) as (server, start):
            found["ready_s"] = round(time.time() - start, 2)
            asyncio.run(_one(server))
            found["first_image_s"] = round(time.time() - start, 2)
            if rig.device == "cuda":
                found["all_graphs_ready_s"] = _when_said("graphs recorded", folder, start, READY_S)
            found["events"] = [
                {**event, "at_s": at} for at, event in _said(folder, start) if event["event"] != "request"
            ]
            keep(found)
            asyncio.run(_load(server, seconds, found, kept))
    if compiles and left() > LEAST_S:
        with _running(_server(rig, folder, cache, True), folder) as (server, start):
            if server.wait_ready(lambda body: body["compiled"] is True, limit=left() - LOADS * (seconds + 5)):
                found["compiled_s"] = round(time.time() - start, 1)
                asyncio.run(_load(server, seconds, found["compiled"], kept))
    return found


async def _one(server: Contender) -> None:
    async with server.turn() as client:
        reply = await client.post(next(stream("one", FOUR)).body(timeout=120))
        if reply.status != 200:
            raise RuntimeError(f"no picture: {reply.status} {reply.body[:300]!r}")


@contextmanager
def _running(server: Contender, folder: Path) -> Iterator[tuple[Contender, float]]:
    """A server that is ready, and when it was started, in seconds of the wall clock."""
    start = time.time()
    server.start(folder)
    try:
        if not server.wait_ready(limit=READY_S):
            raise RuntimeError(f"the server did not get ready: {server.last_words()}")
        yield server, start
    finally:
        server.end()
        print((folder / "ours.log").read_text(errors="replace")[-2000:])


def _said(folder: Path, start: float) -> list[tuple[float, dict[str, Any]]]:
    """What the server logged, and how many seconds after its start."""
    lines = (folder / "ours.log").read_text(errors="replace").splitlines()
    events = [json.loads(line) for line in lines if line.startswith('{"time"') and line.endswith("}")]
    return [(round(datetime.fromisoformat(event["time"]).timestamp() - start, 2), event) for event in events]


def _when_said(words: str, folder: Path, start: float, limit: float) -> float | None:
    """Seconds after its start at which the server logged this; None if it did not within `limit` seconds from now."""
    end = time.monotonic() + limit
    while time.monotonic() < end:
        for at, event in _said(folder, start):
            if event["event"] == words:
                return at
        time.sleep(0.2)
    return None


def _server(rig: Rig, folder: Path, cache: Path, compiles: bool) -> Contender:
    return ours(
        **rig.settings,
        CACHE_DIR=str(cache),
        COMPILE=str(int(compiles)),
        THREADS="1" if rig.device == "cpu" else "8",
        PYTHONPATH=os.pathsep.join([_metadata(folder), os.environ.get("PYTHONPATH", "")]),
    )


def _metadata(folder: Path) -> str:
    """A folder that says which version this is, where the project runs from its checkout without being installed."""
    try:
        version("sdxl-lightning-server")
    except PackageNotFoundError:
        info = folder / "sdxl_lightning_server-0.1.0.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sdxl-lightning-server\nVersion: 0.1.0\n")
    return str(folder)


async def _load(server: Contender, seconds: float, found: dict[str, Any], keep: Callable[[], None]) -> None:
    """Load after load, each into `found`, and kept."""

    def note(title: str, phase: Phase) -> None:
        row = {
            "images_per_s": round(phase.images_per_s, 2),
            **{f"p{percent}_ms": round(phase.percentile(percent)) for percent in (50, 95, 99) if phase.latencies_ms},
            **{name: asdict(phase)[name] for name in ("answers", "refused", "failed")},
            "load_generator_cpu": round(phase.generator_cpu, 2),
        }
        print(title, row, flush=True)
        found[title] = row
        keep()

    async with server.turn() as client:
        warm = min(3.0, seconds / 2)

        async def closed(clients: int, mix: tuple[int, ...]) -> Phase:
            return await closed_loop(client, stream(f"gpu {clients} {mix}", mix), clients, seconds, warm)

        note(HEADLINE, await closed(CLIENTS, FOUR))
        note("closed, 1 client, 4 steps", await closed(1, FOUR))
        rate = 0.8 * found[HEADLINE]["images_per_s"]
        phase = await open_loop(client, stream("gpu open", FOUR), rate, seconds, seed=0)
        note(f"open, 4 steps, {rate:.1f} requests/s (80 % of the closed loop)", phase)
        await _touch_all(client)
        note("closed, 16 clients, even mix of 1/2/4/8 steps", await closed(CLIENTS, EVEN_MIX))


async def _touch_all(client: Client) -> None:
    """One picture of each variant, so that none is loaded while the mix is measured."""
    for steps in EVEN_MIX:
        await client.post(Work("a robot", steps, 0).body(timeout=60))
