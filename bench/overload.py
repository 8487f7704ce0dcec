"""Ours under more load than it can take, from clients that do as Retry-After says: `python -m bench.overload`.

A closed loop of 64 clients is the measure: then the same beside a crowd of 300 and of 1,000 that ask again as soon as
they are answered, and new clients in an open loop at 2 and at 10 times the capacity. Prints what was drawn in time, and
whether who came back when told to was admitted.
"""

import argparse
import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import asdict, dataclass
from operator import methodcaller

import psutil

from bench.client import Client
from bench.contenders import Contender, ours
from bench.load import REFUSED, arrivals, percentile, status
from bench.start import start
from bench.work import EVEN_MIX, Work, stream

DRAWING = 64  # clients whose load is the measure
CROWDS = (300, 1000)
TIMES = (2.0, 10.0)  # the measured capacity
TIMEOUT_S = 5.0  # the deadline that each request names
GRACE_S = 0.1  # for the answer's way to the client, which shares the cores with the server
WARM_S = 3.0
PAUSE_S = 0.2  # of a client that was told nothing


@dataclass(frozen=True)
class Visit:
    """One attempt of one client. begin, end: seconds from the start; number: 0 for the first; retry_after: seconds."""

    begin: float
    end: float
    number: int
    status: int
    retry_after: float | None

    @property
    def is_refused(self) -> bool:
        """By admission, or because the server was not ready."""
        return self.status in REFUSED


@dataclass(frozen=True)
class Figures:
    """What became of one load. goodput: pictures in time, a second. admitted: % of those who came back as told.
    generator_cpu, http_cpu: cores of the load generator and of the server's HTTP process."""

    load: str
    goodput: float
    share: float
    served_p50_s: float
    served_p99_s: float
    late: int
    expired: int
    refused: int
    refusal_p99_ms: float
    untold: int
    longest_wait_s: float
    returned: int
    admitted: float
    other_statuses: str
    generator_cpu: float
    http_cpu: float


class Load:
    """Clients of one server, for `seconds` after a warm-up."""

    def __init__(self, client: Client, name: str, seconds: float) -> None:
        self.client, self.seconds = client, seconds
        self.work: Iterator[Work] = stream(name, EVEN_MIX)
        self.visits: list[Visit] = []
        self._zero = time.monotonic() + WARM_S

    @property
    def now(self) -> float:
        """Seconds since the warm-up."""
        return time.monotonic() - self._zero

    async def customer(self) -> None:
        """Asks; if refused, waits as told and asks the same again, where that is before the load's end."""
        number, body = 0, next(self.work).body(timeout=TIMEOUT_S)
        while True:
            begin = self.now
            reply = await self.client.post(body)
            told = reply.header("retry-after")
            wait = float(told) if told else None
            self.visits.append(Visit(begin, self.now, number, status(reply), wait))
            if not self.visits[-1].is_refused:
                return
            await asyncio.sleep(min(wait or PAUSE_S, max(0.0, self.seconds - self.now)))
            if self.now >= self.seconds:
                return
            number += 1

    async def closed(self, clients: int) -> None:
        """So many, each with something else as soon as it is served."""

        async def ask_again_and_again() -> None:
            while self.now < self.seconds:
                await self.customer()

        await asyncio.gather(*(ask_again_and_again() for _ in range(clients)))

    async def opened(self, rate: float) -> None:
        """New ones at `rate` a second (Poisson), and all who come back."""
        async with asyncio.TaskGroup() as group:
            for due in arrivals(rate, WARM_S + self.seconds, seed=0):
                await asyncio.sleep(due - WARM_S - self.now)
                group.create_task(self.customer())


async def measure(
    name: str, server: Contender, seconds: float, capacity: float, run: Callable[[Load], Awaitable[None]]
) -> Figures:
    """One load and its figures. capacity: images a second, of which goodput is a share; 0 where this measures it."""
    http = psutil.Process(server.pid)
    async with server.turn() as client:
        load = Load(client, name, seconds)
        before = time.monotonic(), time.process_time(), sum(http.cpu_times()[:2])
        await run(load)
        after = time.monotonic(), time.process_time(), sum(http.cpu_times()[:2])
    took, generator, of_http = (later - earlier for earlier, later in zip(before, after, strict=True))
    visits = [visit for visit in load.visits if visit.end >= 0]
    served = [visit for visit in visits if visit.status == 200]
    lasted = [visit.end - visit.begin for visit in served]
    refused = [visit for visit in visits if visit.is_refused]
    back = [visit for visit in visits if visit.number > 0]
    in_time = [visit for visit in served if visit.end - visit.begin <= TIMEOUT_S + GRACE_S]
    goodput = sum(visit.end <= seconds for visit in in_time) / seconds
    return Figures(
        name,
        round(goodput, 1),
        round(goodput / (capacity or goodput), 3),
        round(percentile(lasted, 50), 2),
        round(percentile(lasted, 99), 2),
        late=len(served) - len(in_time),
        expired=sum(visit.status == 504 for visit in visits),
        refused=len(refused),
        refusal_p99_ms=round(1000 * percentile([visit.end - visit.begin for visit in refused], 99), 1),
        untold=sum(visit.retry_after is None for visit in refused),
        longest_wait_s=max((visit.retry_after or 0 for visit in refused), default=0),
        returned=len(back),
        admitted=round(100 * sum(not visit.is_refused for visit in back) / len(back), 1) if back else 100.0,
        other_statuses=", ".join(map(str, sorted({visit.status for visit in visits} - {200, 504, *REFUSED}))),
        generator_cpu=round(generator / took, 2),
        http_cpu=round(of_http / took, 2),
    )


def run(threads: int, seconds: float) -> Iterator[Figures]:
    """All loads in turn, each on a server of its own: what was promised under one would weigh on the next."""

    def with_server(name: str, load: Callable[[Load], Awaitable[None]], capacity: float = 0.0) -> Figures:
        server = ours(THREADS=str(threads))
        try:
            start([server])
            return asyncio.run(measure(name, server, seconds, capacity, load))
        finally:
            server.end()

    yield (alone := with_server(f"{DRAWING} clients", methodcaller("closed", DRAWING)))
    for crowd in CROWDS:
        clients = DRAWING + crowd
        yield with_server(f"{DRAWING} and {crowd} clients", methodcaller("closed", clients), alone.goodput)
    for times in TIMES:
        rate = times * alone.goodput
        yield with_server(f"{times:g} times, {rate:.0f} new a second", methodcaller("opened", rate), alone.goodput)


HEADS = (
    *("load", "in time/s", "share", "p50 s", "p99 s", "late", "504", "refused", "p99 ms", "untold", "wait s"),
    *("back", "let in %", "other", "generator", "HTTP"),
)
HEAD = f"| {' | '.join(HEADS)} |\n{'|---' * len(HEADS)}|"


def row(figures: Figures) -> str:
    """A row of docs/reliability.md."""
    return f"| {' | '.join(map(str, asdict(figures).values()))} |"


def main() -> None:
    """Start ours and overload it."""
    parser = argparse.ArgumentParser(prog="bench.overload", description=__doc__)
    parser.add_argument("--seconds", type=float, default=30.0, help="of each load")
    parser.add_argument("--threads", type=int, default=2, help="of the server's engine")
    options = parser.parse_args()
    print(HEAD, flush=True)
    for figures in run(options.threads, options.seconds):
        print(row(figures), flush=True)


if __name__ == "__main__":
    main()
