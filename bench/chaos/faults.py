"""What happens to a server meanwhile. Each fault says when it began and when it was over."""

import asyncio
import os
import random
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

import psutil

from bench.chaos.clients import HOST, Crowd
from bench.chaos.rig import Rig, until

HUNG_S = 45.0  # an engine that does not run is killed by then: HUNG_S of app.engine.process, and some
AGAIN_S = 90.0  # until an engine serves again: its start, and the pause before it
STATIC = b"GET /static-offline-docs/swagger-ui-bundle.js HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n"


@dataclass(frozen=True)
class Window:
    """One fault. is_down: a request in it may fail."""

    fault: str
    begin: float
    end: float
    is_down: bool


Fault = Callable[[Rig, Crowd, float], Awaitable[bool]]


async def kill(rig: Rig, crowd: Crowd, rate: float) -> bool:
    """The engine is killed."""
    if (engine := rig.engine()) is not None:
        engine.kill()
    return await _again(rig)


async def pause(rig: Rig, crowd: Crowd, rate: float) -> bool:
    """The engine stands still for a while, and goes on."""
    if (engine := rig.engine()) is not None:
        engine.suspend()
        await asyncio.sleep(3)
        with suppress(psutil.NoSuchProcess):
            engine.resume()
    return await _again(rig)


async def hang(rig: Rig, crowd: Crowd, rate: float) -> bool:
    """The engine stands still for good."""
    if (engine := rig.engine()) is not None:
        engine.suspend()
        pid = engine.pid
        await until(lambda: getattr(rig.engine(), "pid", None) != pid, HUNG_S)
    return await _again(rig)


async def pause_http(rig: Rig, crowd: Crowd, rate: float) -> bool:
    """The HTTP process stands still for a while."""
    rig.process.send_signal(signal.SIGSTOP)
    await asyncio.sleep(1.5)
    rig.process.send_signal(signal.SIGCONT)
    return await _again(rig)


async def burst(rig: Rig, crowd: Crowd, rate: float) -> bool:
    """Ten times as many come at once, and what they left in the queue."""
    await crowd.run(10 * rate, 3)
    await asyncio.sleep(10)
    return True


async def full_disk(rig: Rig, crowd: Crowd, rate: float) -> bool:
    """The log's disk is full for a while; where the log is a pipe, nobody reads it."""
    if rig.is_file:
        rig.limit_log(True)
    else:
        rig.reads.clear()
    await asyncio.sleep(8)
    if rig.is_file:
        rig.limit_log(False)
    else:
        rig.reads.set()
    return False


async def lose_log(rig: Rig, crowd: Crowd, rate: float) -> bool:
    """Whoever reads the log leaves for good."""
    if rig.process.stderr is not None:
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, rig.process.stderr.fileno())  # the pipe's last reader
        os.close(null)
    return False


async def idle(rig: Rig, crowd: Crowd, rate: float) -> bool:
    """Three hundred connect, ask once, and stay."""
    async with _connections(rig, 300, b"GET /live HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n"):
        await asyncio.sleep(5)
    return False


async def slow_readers(rig: Rig, crowd: Crowd, rate: float) -> bool:
    """Fifty ask for megabytes, and read nothing."""
    async with _connections(rig, 50, STATIC * 8):
        await asyncio.sleep(5)
    return False


MILD: tuple[Fault, ...] = (full_disk, idle, slow_readers)
HARD: tuple[Fault, ...] = (kill, pause, hang, pause_http, burst, *MILD)
OF_ONE: tuple[Fault, ...] = (kill, pause, hang)


async def inject(
    rig: Rig, crowd: Crowd, rate: float, faults: Sequence[Fault], every: float, until: float, windows: list[Window]
) -> None:
    """One fault after another, each kind in turn, `every` so many seconds or when the last one is over."""
    rng, turn = random.Random(0), faults
    while True:
        for fault in turn:
            await asyncio.sleep(rng.uniform(0.5, 1.5) * every)
            begin = time.monotonic()
            if begin + AGAIN_S / 3 > until:
                return
            is_down = await fault(rig, crowd, rate)
            windows.append(Window(fault.__name__, begin, time.monotonic(), is_down))
        turn = rng.sample(faults, len(faults))


async def _again(rig: Rig) -> bool:
    """Wait until all of it serves, for three looks in a row: what comes first may be the look before the fault."""
    await asyncio.sleep(1.5)
    await until(lambda: {look.engines for look in rig.looks[-3:]} == {rig.engines}, AGAIN_S)
    return True


@asynccontextmanager
async def _connections(rig: Rig, count: int, request: bytes) -> AsyncIterator[None]:
    opened = [await asyncio.open_connection(HOST, rig.port, limit=1) for _ in range(count)]
    try:
        for _, writer in opened:
            writer.write(request)
        yield
    finally:
        for _, writer in opened:
            writer.close()
