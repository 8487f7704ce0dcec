"""What HTTP, queue and messages add to the bare engine, for one client at four steps."""

import asyncio
import json
import os
import re
import statistics
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from app.engine.process import allocator
from bench.client import Client, Reply
from bench.contenders import ROOT, Contender
from bench.load import percentile
from bench.progress import progress
from bench.work import FOUR, Work, stream

BLOCK = 10  # requests in a row to one side, then to the other; the first of each block is not counted
AIM_MS = 2.0
WORKING = ("encode", "denoise", "decode", "image")  # stages of Server-Timing in which the picture is worked on


@dataclass(frozen=True)
class Overhead:
    """p50 in ms. added: over the bare engine. unaccounted: over the server's own working stages (Server-Timing)."""

    requests: int
    http: float
    bare: float
    added: float
    unaccounted: float
    bare_compiled: bool


async def measure(contender: Contender, blocks: int, threads: int) -> Overhead:
    """The same requests through HTTP and to the bare engine in alternating blocks; no prompt is known to either."""
    work = _fresh(stream("overhead", FOUR))
    http: list[float] = []
    bare: list[float] = []
    unaccounted: list[float] = []
    async with _bare_engine(threads) as (engine, compiled), contender.turn() as client:
        for _ in progress(range(blocks), "overhead of HTTP and queue"):
            block = [next(work) for _ in range(BLOCK)]
            answers = [await _timed(client, ask) for ask in block][1:]
            http += [ms for ms, _ in answers]
            unaccounted += [ms - working_ms(reply) for ms, reply in answers]
            bare += [await _bare(engine, ask) for ask in block][1:]
    p50 = percentile(http, 50)
    return Overhead(
        len(http), p50, percentile(bare, 50), p50 - percentile(bare, 50), statistics.median(unaccounted), compiled
    )


def working_ms(reply: Reply) -> float:
    """The milliseconds that the server says it worked on the picture; NaN if it does not say."""
    said = dict(re.findall(r"(\w+)(?:;desc=\"[^\"]*\")?;dur=([\d.]+)", reply.header("server-timing") or ""))
    return sum(float(said.get(stage, "nan")) for stage in WORKING)


def _fresh(work: Iterator[Work]) -> Iterator[Work]:
    """Prompts that no other load has sent, so that the server's cache of prompt embeddings helps nobody."""
    for number, ask in enumerate(work):
        yield replace(ask, prompt=f"{ask.prompt} {number}")


async def _timed(client: Client, ask: Work) -> tuple[float, Reply]:
    start = time.perf_counter()
    reply = await client.post(ask.body())
    if reply.status != 200:
        raise RuntimeError(f"ours answered {reply.status}: {reply.body[:500]!r}")
    return 1e3 * (time.perf_counter() - start), reply


async def _bare(engine: asyncio.subprocess.Process, ask: Work) -> float:
    assert engine.stdin is not None
    assert engine.stdout is not None
    engine.stdin.write(ask.body() + b"\n")
    return float(await engine.stdout.readline())


@asynccontextmanager
async def _bare_engine(threads: int) -> AsyncIterator[tuple[asyncio.subprocess.Process, bool]]:
    engine = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "bench.bare", cwd=ROOT,
        env={**allocator(), **os.environ, "MODEL": "embedded", "THREADS": str(threads)},
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    assert engine.stdin is not None
    assert engine.stdout is not None
    try:
        yield engine, json.loads(await engine.stdout.readline())["compiled"]
    finally:
        engine.stdin.close()
        await engine.wait()
