"""A fleet on paper: N devices under one load, and what each way to share it among them costs.

An event simulation with the server's own policies, as they are: place(), the scheduler and the price of a queue are the
functions that serve. Only the device is replaced, by a table of what its calls take: one that is given, a GPU's assumed
one by default, or that of a running server.
"""

import argparse
import heapq
import itertools
import os
import random
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from app.engine.costs import Costs
from app.engine.jobs import Row
from bench.load import percentile
from bench.report import show_table
from bench.routers import ASSUMED, BURST, BURST_S, PERIOD_S, ROUTERS, SIDE, Device, Fleet, row_of
from bench.work import EVEN_MIX


@dataclass
class Seen:
    """What became of a load. took: seconds of each picture that came in time. switches: per device and call."""

    asked: int = 0
    took: list[float] = field(default_factory=list)
    calls: int = 0
    switches: int = 0

    def add(self, other: "Seen") -> None:
        """That of another seed, too."""
        self.asked += other.asked
        self.took += other.took
        self.calls += other.calls
        self.switches += other.switches

    @property
    def in_time(self) -> float:
        """The share of requests that had their picture before their deadline."""
        return len(self.took) / self.asked


def simulate(fleet: Fleet, router: str, load: float, seed: int) -> Seen:
    """Requests for one picture each, at `load` times the capacity; who would be late is turned away for good. The same
    seed brings the same requests to every router."""
    route = ROUTERS[router](random.Random(seed))
    devices, seen = [Device(fleet) for _ in range(fleet.devices)], Seen()
    began: dict[int, float] = {}
    number = itertools.count()
    # When, in which order of equals, at which device, and what ends there: nothing where a row arrives.
    events: list[tuple[float, int, int, str, tuple[Row, ...]]] = [
        (at, next(number), 0, "arrive", (row,)) for at, row in arrivals(fleet, load, seed)
    ]
    heapq.heapify(events)
    while events:
        now, _, place_of, what, rows = heapq.heappop(events)
        if what == "arrive":
            seen.asked += 1
            place_of = route(rows[0], devices, now)
            if not devices[place_of].admits(rows[0], now):
                continue
            began[rows[0].id] = now
            devices[place_of].put(rows[0])
        else:
            done = devices[place_of].end(what, rows)
            seen.took += [now - began[row.id] for row in done if now <= row.deadline]
            seen.calls += what == "denoise"
        for end, stage, taken in devices[place_of].start(now):
            heapq.heappush(events, (end, next(number), place_of, stage, taken))
    seen.switches = sum(device.switches for device in devices)
    return seen


def arrivals(fleet: Fleet, load: float, seed: int) -> Iterator[tuple[float, Row]]:
    """A Poisson process with bursts, of the even mix."""
    rng, now, mean = random.Random(seed), 0.0, load * fleet.capacity
    quiet = (PERIOD_S - BURST * BURST_S) / (PERIOD_S - BURST_S)
    for id in itertools.count():
        now += rng.expovariate(mean * BURST)
        while rng.random() > (1.0 if now % PERIOD_S >= PERIOD_S - BURST_S else quiet / BURST):  # thinned
            now += rng.expovariate(mean * BURST)
        if now > fleet.seconds:
            return
        yield now, row_of(id, rng.choice(EVEN_MIX), now + fleet.deadline)


def costs_of(text: str) -> Costs:
    """The table of a running server's first engine, by its /metrics: steps and decodes as measured at its start, and
    what a prompt took since."""
    samples = [sample for metric in text_string_to_metric_families(text) for sample in metric.samples]
    device = min(sample.labels["device"] for sample in samples if sample.name == "sdxl_step_cost_seconds")
    step, decode = (
        {
            int(each.labels["batch"]): each.value
            for each in samples
            if each.name == name and each.labels["device"] == device
        }
        for name in ("sdxl_step_cost_seconds", "sdxl_decode_cost_seconds")
    )
    total, count = (
        sum(each.value for each in samples if each.name == f"sdxl_encode_seconds_{part}") for part in ("sum", "count")
    )
    return Costs(step, decode, encode=total / count if count else 0.0, pixels=SIDE * SIDE)


def read_costs(where: str) -> Costs:
    """A table from a JSON file, in seconds: {"step": {"1": 0.026}, "decode": {"1": 0.023}, "encode": 0}, or from the
    server at a URL, at the size that it measured."""
    if where.startswith(("http://", "https://")):
        with urllib.request.urlopen(where.rstrip("/") + "/metrics", timeout=30) as reply:
            return costs_of(reply.read().decode())
    return msgspec.convert(
        {**msgspec.json.decode(Path(where).read_bytes()), "pixels": SIDE * SIDE}, Costs, strict=False
    )


def table(fleet: Fleet, routers: Sequence[str], loads: Sequence[float], seeds: int) -> dict[tuple[str, float], Seen]:
    """Each router under each load; as many at a time as there are cores."""
    turns = [(router, load, seed) for router in routers for load in loads for seed in range(seeds)]
    found: dict[tuple[str, float], Seen] = {}
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        simulated = pool.map(simulate, *zip(*((fleet, *turn) for turn in turns), strict=True))
        for (router, load, _), seen in zip(turns, simulated, strict=True):
            found.setdefault((router, load), Seen()).add(seen)
    return found


def show(fleet: Fleet, found: dict[tuple[str, float], Seen], seeds: int) -> None:
    """p50 / p99 in seconds, and the share in time where that is not all."""
    loads = list(dict.fromkeys(load for _, load in found))
    lines = [
        (router, *(_cell(found[router, load]) for load in loads), _switches([found[router, load] for load in loads]))
        for router in dict.fromkeys(router for router, _ in found)
    ]
    title = (
        f"{fleet.devices} devices of {fleet.capacity / fleet.devices:.1f} pictures/s, a switch of {fleet.switch:g} s, "
        f"deadline {fleet.deadline:g} s, {seeds} x {fleet.seconds:g} s; p50 / p99 in s, and how many came in time"
    )
    show_table(title, [("router", *(f"load {load:g}" for load in loads), "switches per call"), *lines])


def _cell(seen: Seen) -> str:
    return f"{percentile(seen.took, 50):.2f} / {percentile(seen.took, 99):.2f} {100 * seen.in_time:4.0f} %"


def _switches(seen: Sequence[Seen]) -> str:
    return f"{100 * sum(each.switches for each in seen) / sum(each.calls for each in seen):.0f} %"


def main(arguments: Sequence[str] | None = None) -> None:
    """Simulate, and print the table."""
    parser = argparse.ArgumentParser(prog="bench.fleet", description=__doc__)
    parser.add_argument("--devices", type=int, nargs="+", default=[8], metavar="N", help="8 by default")
    parser.add_argument("--costs", help="a running server's URL, or a JSON file; an H100's as assumed by default")
    parser.add_argument("--switch", type=float, default=0.0, metavar="S", help="seconds to change a device's weights")
    parser.add_argument("--calls", type=int, default=1, help="that a device makes at a time: 1 on a GPU")
    parser.add_argument("--loads", type=float, nargs="+", default=[0.5, 0.8, 1.0, 1.5], metavar="X", help="of capacity")
    parser.add_argument("--deadline", type=float, default=8.0, metavar="S", help="of every request, seconds")
    parser.add_argument("--seconds", type=float, default=64.0, help="of load, simulated")
    parser.add_argument("--seeds", type=int, default=4, help="of loads that are put together")
    parser.add_argument("--routers", nargs="+", choices=ROUTERS, default=list(ROUTERS), metavar="NAME")
    options = parser.parse_args(arguments)
    costs, began = read_costs(options.costs) if options.costs else ASSUMED, time.monotonic()
    for devices in options.devices:
        fleet = Fleet(devices, costs, options.switch, options.calls, options.deadline, options.seconds)
        show(fleet, table(fleet, options.routers, options.loads, options.seeds), options.seeds)
    print(f"\ntook {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
