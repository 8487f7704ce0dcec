"""What HTTP, queue and messages add to the bare engine, for one client at four steps."""

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from app.engine.process import allocator
from bench.client import Client
from bench.contenders import ROOT, Contender
from bench.load import percentile
from bench.progress import progress
from bench.work import FOUR, Work, stream

BLOCK = 10  # requests in a row to one side, then to the other; the first of each block is not counted
AIM_MS = 2.0


@dataclass(frozen=True)
class Overhead:
    """p50 in ms. added: over the bare engine."""

    requests: int
    http: float
    bare: float
    added: float


async def measure(contender: Contender, blocks: int, threads: int) -> Overhead:
    """The same requests through HTTP and to the bare engine in alternating blocks; no prompt is known to either."""
    work = _fresh(stream("overhead", FOUR))
    http: list[float] = []
    bare: list[float] = []
    async with _bare_engine(threads) as engine, contender.turn() as client:
        for _ in progress(range(blocks), "overhead of HTTP and queue"):
            block = [next(work) for _ in range(BLOCK)]
            http += [await timed(client, ask) for ask in block][1:]
            bare += [await _bare(engine, ask) for ask in block][1:]
    p50, bare_p50 = percentile(http, 50), percentile(bare, 50)
    return Overhead(len(http), p50, bare_p50, p50 - bare_p50)


def _fresh(work: Iterator[Work]) -> Iterator[Work]:
    """Prompts that no other load has sent, so that the server's cache of prompt embeddings helps nobody."""
    for number, ask in enumerate(work):
        yield replace(ask, prompt=f"{ask.prompt} {number}")


async def timed(client: Client, ask: Work) -> float:
    """Milliseconds until a request is answered. Raises RuntimeError where that is no picture."""
    start = time.perf_counter()
    reply = await client.post(ask.body())
    if reply.status != 200:
        raise RuntimeError(f"ours answered {reply.status}: {reply.body[:500]!r}")
    return 1e3 * (time.perf_counter() - start)


async def _bare(engine: asyncio.subprocess.Process, ask: Work) -> float:
    assert engine.stdin is not None
    assert engine.stdout is not None
    engine.stdin.write(ask.body() + b"\n")
    return float(await engine.stdout.readline())


@asynccontextmanager
async def _bare_engine(threads: int) -> AsyncIterator[asyncio.subprocess.Process]:
    engine = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "bench.bare", cwd=ROOT,
        env={**allocator(), **os.environ, "MODEL": "embedded", "THREADS": str(threads)},
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    assert engine.stdin is not None
    assert engine.stdout is not None
    try:
        await engine.stdout.readline()  # it is ready
        yield engine
    finally:
        engine.stdin.close()
        await engine.wait()
