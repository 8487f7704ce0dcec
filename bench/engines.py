"""Two engines behind one queue against one, on the same cores: speed, bytes, a death under load, and overload."""

import argparse
import asyncio
import statistics
import time
from collections import Counter
from collections.abc import Callable
from operator import methodcaller

import psutil

from bench import overload, report
from bench.client import Client
from bench.contenders import Contender, ours
from bench.load import percentile, status
from bench.rounds import LOADS, closed
from bench.start import start
from bench.work import EVEN_MIX, stream

PARTS = ("speed", "bytes", "death", "overload")
CLIENTS = 16
SEEDS = 8  # pictures whose bytes are compared
PATIENCE_S = 60.0  # for an engine that died to be back


def engines(server: Contender) -> list[psutil.Process]:
    """Its engine processes, in the order they were started."""
    children = psutil.Process(server.pid).children()
    return [each for each in children if "app.engine.worker" in each.cmdline()]


async def until(condition: Callable[[], bool]) -> float:
    """Wait until it holds; the seconds that took. Raises TimeoutError. It is asked in a thread: the load goes on."""

    def wait() -> float:
        began = time.monotonic()
        while not condition():
            if time.monotonic() - began > PATIENCE_S:
                raise TimeoutError("the engines are not as they should be")
            time.sleep(0.05)
        return time.monotonic() - began

    return await asyncio.to_thread(wait)


def serving(server: Contender) -> int:
    """Its engines that take pictures now."""
    return int((server.ask() or {}).get("engines", 0))


async def speed(one: Contender, two: Contender, rounds: int, seconds: float) -> None:
    """Closed loops, in turns."""
    for load in LOADS:
        report.show_rows(load.title, await closed([one, two], {}, load, rounds, seconds))


async def same_bytes(server: Contender) -> None:
    """Kill one engine, draw by the other, and the other way round."""
    work = stream("bytes", EVEN_MIX)
    bodies = [next(work).body() for _ in range(SEEDS)]
    drawn: list[list[bytes]] = []
    async with Client("127.0.0.1", server.port) as client:
        for victim in engines(server):
            victim.kill()
            await until(lambda: serving(server) == 1)
            drawn.append([(await client.post(body)).body for body in bodies])
            await until(lambda: serving(server) == 2)
    same = sum(first == second for first, second in zip(*drawn, strict=True))
    print(f"\nsame_bytes_on_either_engine: {same} of {SEEDS}")


async def death(server: Contender, seconds: float) -> None:
    """`kill -9` of one engine in the middle of a closed loop."""
    answers: Counter[int] = Counter()
    took: list[float] = []
    work, end = stream("death", EVEN_MIX), time.monotonic() + seconds

    async def ask(client: Client) -> None:
        while (began := time.monotonic()) < end:
            answers[status(await client.post(next(work).body()))] += 1
            took.append(time.monotonic() - began)

    async with Client("127.0.0.1", server.port) as client, asyncio.TaskGroup() as group:
        for _ in range(CLIENTS):
            group.create_task(ask(client))
        await asyncio.sleep(seconds / 3)
        engines(server)[0].kill()
        await until(lambda: serving(server) == 1)
        back = await until(lambda: serving(server) == 2)
    failed = sum(count for code, count in answers.items() if code != 200)
    print(f"\nkill -9 of one of two engines, {CLIENTS} clients, {seconds:g} s: {answers[200]} pictures")
    slowest = f"median {statistics.median(took):.2f} s, p99 {percentile(took, 99):.2f} s, slowest {max(took):.2f} s"
    print(f"failed_requests: {failed} (aim: 0); {slowest}; two engines again after {back:.1f} s")


async def run(one: Contender, two: Contender, options: argparse.Namespace) -> None:
    """All parts, in order."""
    if "speed" in options.only:
        await speed(one, two, options.rounds, options.seconds)
    if "bytes" in options.only:
        await same_bytes(two)
    if "death" in options.only:
        await death(two, max(options.seconds, 12.0))
    if "overload" in options.only:
        print("\ntwice the load over two engines, from clients that do as Retry-After says")
        seconds, clients = max(options.seconds, 30.0), overload.DRAWING
        alone = await overload.measure(f"{clients} clients", two, seconds, 0.0, methodcaller("closed", clients))
        rate = 2 * alone.goodput
        twice = await overload.measure("2 x", two, seconds, alone.goodput, methodcaller("opened", rate))
        print(overload.HEAD, overload.row(alone), overload.row(twice), sep="\n")


def main() -> None:
    """Start both, and measure."""
    parser = argparse.ArgumentParser(prog="bench.engines", description=__doc__)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=5, help="of each closed loop")
    parser.add_argument("--threads", type=int, default=2, help="of each server, divided among its engines")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=" ".join(PARTS))
    options = parser.parse_args()
    report.show_machine(report.machine())
    threads = str(options.threads)
    one, two = ours("one engine", THREADS=threads), ours("two engines", THREADS=threads, ENGINES="2")
    try:
        start([one, two])
        asyncio.run(run(one, two, options))
    finally:
        one.end()
        two.end()


if __name__ == "__main__":
    main()
