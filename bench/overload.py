"""Twice what ours can take, from clients that do as Retry-After says: `python -m bench.overload`.

Prints the goodput, the share of returning clients that were admitted, and whether anything came after its deadline.
"""

import argparse
import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from bench.client import Client
from bench.contenders import ours
from bench.load import REFUSED, arrivals, closed_loop, percentile, status
from bench.start import start
from bench.work import EVEN_MIX, Work, stream

TIMES = 2.0  # the measured capacity
TIMEOUT_S = 5.0  # the deadline that each request names
GRACE_S = 0.1  # for the answer's way to the client, which shares the cores with the server
ADMITTED_AIM = 95  # % of those who came back when they were told to


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


async def customer(client: Client, work: Work, until: float, zero: float, visits: list[Visit]) -> None:
    """Asks; if refused, waits as told and asks the same again, as long as the load lasts."""
    clock, number = asyncio.get_running_loop().time, 0
    body = work.body(timeout=TIMEOUT_S)
    while True:
        begin = clock() - zero
        reply = await client.post(body)
        told = reply.header("retry-after")
        visits.append(Visit(begin, clock() - zero, number, status(reply), float(told) if told else None))
        if not visits[-1].is_refused or told is None or clock() - zero + float(told) > until:
            return
        await asyncio.sleep(float(told))
        number += 1


async def overload(client: Client, rate: float, seconds: float) -> list[Visit]:
    """New clients at `rate` a second (Poisson), and all who come back."""
    clock, work = asyncio.get_running_loop().time, stream("overload", EVEN_MIX)
    visits: list[Visit] = []
    zero = clock()
    async with asyncio.TaskGroup() as group:
        for delay in arrivals(rate, seconds, seed=0):
            await asyncio.sleep(zero + delay - clock())
            group.create_task(customer(client, next(work), seconds, zero, visits))
    return visits


def show(visits: Sequence[Visit], capacity: float, seconds: float) -> None:
    """The figures."""
    served = [visit for visit in visits if visit.status == 200]
    took = [visit.end - visit.begin for visit in served]
    fresh, back = ([visit for visit in visits if (visit.number > 0) is returning] for returning in (False, True))
    admitted = [visit for visit in back if not visit.is_refused]
    others = sorted({visit.status for visit in visits} - {200, 504, *REFUSED})
    goodput = sum(visit.end <= seconds for visit in served) / seconds
    share = 100 * len(admitted) / len(back) if back else float("nan")
    print(f"goodput: {goodput:.1f} images/s, {100 * goodput / capacity:.0f} % of the capacity of {capacity:.1f}")
    print(f"first visits: {len(fresh)}, of them refused {sum(visit.is_refused for visit in fresh)}")
    waits = [visit.retry_after for visit in visits if visit.is_refused and visit.retry_after is not None]
    print(f"refused without Retry-After: {sum(visit.is_refused and visit.retry_after is None for visit in visits)}")
    print(f"longest Retry-After: {max(waits, default=0):.0f} s")
    print(f"returning_clients_admitted: {share:.1f} % of {len(back)} (aim: {ADMITTED_AIM} %)")
    print(f"served: {len(served)}, p50 {percentile(took, 50):.2f} s, p99 {percentile(took, 99):.2f} s")
    print(f"expired after admission (504): {sum(visit.status == 504 for visit in visits)}")
    late = sum(each > TIMEOUT_S + GRACE_S for each in took)
    print(f"served_after_deadline: {late} (slowest {max(took, default=0):.2f} s)")
    print(f"other statuses: {', '.join(map(str, others)) or 'none'}")


async def run(client: Client, seconds: float) -> None:
    """Measure the capacity, then offer twice that."""
    first = await closed_loop(client, stream("capacity", EVEN_MIX), 32, max(4.0, seconds / 4), warm_s=3.0)
    rate = TIMES * first.images_per_s
    print(f"capacity: {first.images_per_s:.1f} images/s (closed loop, 32 clients, even mix)")
    print(f"offered: {rate:.1f} new requests/s for {seconds:g} s, each with a deadline of {TIMEOUT_S:g} s")
    show(await overload(client, rate, seconds), first.images_per_s, seconds)


def main() -> None:
    """Start ours and overload it."""
    parser = argparse.ArgumentParser(prog="bench.overload", description=__doc__)
    parser.add_argument("--seconds", type=float, default=30.0, help="of overload")
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    options = parser.parse_args()
    server = ours(THREADS=str(options.threads))
    try:
        start([server])

        async def turn() -> None:
            async with server.turn() as client:
                await run(client, options.seconds)

        asyncio.run(turn())
    finally:
        server.end()


if __name__ == "__main__":
    main()
