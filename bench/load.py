"""The two kinds of load, and what is measured under them."""

import asyncio
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bench.client import Client, Reply
from bench.work import Work

MAGIC = b"\x89PNG\r\n\x1a\n"
REFUSED = (429, 503)
PAUSE_S = 0.1  # of a closed-loop client after a request that brought no picture


@dataclass(frozen=True)
class Sample:
    """One request's life. In an open loop it starts when it was due, not when the client got round to it."""

    start: float
    end: float
    status: int

    @property
    def is_picture(self) -> bool:
        """Whether it brought a picture."""
        return self.status == 200

    def share_within(self, begin: float, end: float) -> float:
        """The share of its life, 0 to 1, that lies between two times."""
        return max(0.0, min(self.end, end) - max(self.start, begin)) / (self.end - self.start)


@dataclass(frozen=True)
class Phase:
    """What one contender did in one window of one load. Latencies in ms, of the pictures that came in the window."""

    images_per_s: float
    latencies_ms: Sequence[float]
    answers: int
    refused: int
    failed: int
    generator_cpu: float  # of one core, by the load generator itself

    def percentile(self, percent: float) -> float:
        """Latency in ms by nearest rank; NaN if no picture came."""
        return percentile(self.latencies_ms, percent)


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that is not below `percent` % of the values (nearest rank); NaN of none."""
    ranked = sorted(values)
    return ranked[max(0, math.ceil(percent / 100 * len(ranked)) - 1)] if ranked else math.nan


async def closed_loop(client: Client, work: Iterator[Work], clients: int, seconds: float, warm_s: float) -> Phase:
    """`clients` of them, each asking again as soon as its answer is there; measured after warm_s, for `seconds`.

    A picture counts for the share of its life that lies in the window, and the load goes on until all that began in the
    window have come: servers that answer in bursts would otherwise gain or lose a batch by chance.
    """
    cpu, clock = time.process_time(), asyncio.get_running_loop().time
    begin = clock() + warm_s
    end = begin + seconds
    samples: list[Sample] = []
    awaited = 0  # requests begun before the window's end

    async def ask_again_and_again() -> None:
        nonlocal awaited
        while (start := clock()) < end or awaited:
            counts = start < end
            awaited += counts
            reply = await client.post(next(work).body())
            awaited -= counts
            samples.append(Sample(start, clock(), status(reply)))
            if not samples[-1].is_picture:
                await asyncio.sleep(PAUSE_S)

    started = clock()
    await asyncio.gather(*(ask_again_and_again() for _ in range(clients)))
    cpu = (time.process_time() - cpu) / (clock() - started)
    rate = sum(sample.share_within(begin, end) for sample in samples if sample.is_picture) / seconds
    return _phase([sample for sample in samples if begin <= sample.end < end], rate, cpu)


async def open_loop(client: Client, work: Iterator[Work], rate: float, seconds: float, seed: int) -> Phase:
    """Requests at random times (Poisson), `rate` a second, whether or not the server keeps up."""
    cpu, clock = time.process_time(), asyncio.get_running_loop().time
    samples: list[Sample] = []

    async def ask(due: float, body: bytes) -> None:
        reply = await client.post(body)
        samples.append(Sample(due, clock(), status(reply)))

    begin = clock()
    async with asyncio.TaskGroup() as group:
        for delay in arrivals(rate, seconds, seed):
            await asyncio.sleep(begin + delay - clock())
            group.create_task(ask(begin + delay, next(work).body()))
    cpu = (time.process_time() - cpu) / (clock() - begin)
    in_time = sum(sample.is_picture and sample.end < begin + seconds for sample in samples)
    return _phase(samples, in_time / seconds, cpu)


def arrivals(rate: float, seconds: float, seed: int) -> Iterator[float]:
    """Seconds from the start at which the requests of a Poisson process are due."""
    rng, due = random.Random(seed), 0.0
    while (due := due + rng.expovariate(rate)) < seconds:
        yield due


def status(reply: Reply) -> int:
    """The reply's status; a 200 that is no PNG counts as a server error."""
    return reply.status if reply.status != 200 or reply.body.startswith(MAGIC) else 500


def _phase(samples: Sequence[Sample], images_per_s: float, cpu: float) -> Phase:
    return Phase(
        images_per_s,
        [1e3 * (sample.end - sample.start) for sample in samples if sample.is_picture],
        answers=len(samples),
        refused=sum(sample.status in REFUSED for sample in samples),
        failed=sum(not sample.is_picture and sample.status not in REFUSED for sample in samples),
        generator_cpu=cpu,
    )
