"""A fleet on paper: N devices under one load, and what each way to share it among them costs.

An event simulation with the server's own policies, as they are: place(), the scheduler and the price of a queue are the
functions that serve. Only the device is replaced, by a table of what its calls take: one that is given, a GPU's assumed
one by default, or that of a running server.
"""

import argparse
import heapq
import itertools
import math
import os
import random
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from app.engine.costs import Costs
from app.engine.jobs import Row
from app.engine.placement import EngineLoad, place
from app.engine.scheduler import Workers, plan
from bench.load import percentile
from bench.report import show_table
from bench.work import EVEN_MIX
from models.catalog import Weights

# Of SDXL at 1024 x 1024 on an H100, as assumed when the routers were first compared: 12.6 pictures a second.
ASSUMED = Costs({1: 0.026, 2: 0.040, 4: 0.066, 8: 0.120}, {1: 0.023}, encode=0.0, pixels=1024 * 1024)
SIDE = 1024
VARIANTS = {steps: Weights(f"{steps}step") for steps in EVEN_MIX}
PERIOD_S, BURST_S, BURST = 8.0, 2.0, 1.9  # of every period the last seconds have so many times the mean rate
PROXIES = 8  # that do not see each other's requests
REPORT_S = 1.0  # between two reports of work


@dataclass(frozen=True)
class Fleet:
    """What is simulated. switch: seconds to change a device's weights. calls: that a device makes at a time. deadline,
    seconds: of each request, and of the load."""

    devices: int = 8
    costs: Costs = ASSUMED
    switch: float = 0.0
    calls: int = 1
    deadline: float = 8.0
    seconds: float = 64.0

    @property
    def capacity(self) -> float:
        """Pictures a second of the even mix, in full batches."""
        many = [_row(id, EVEN_MIX[id % len(EVEN_MIX)], 0.0) for id in range(4096)]
        return self.devices * self.calls * len(many) / self.costs.work(many)


class Device:
    """One engine: its board, and the calls that the scheduler makes of it."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.board: dict[int, Row] = {}
        self.switches = 0
        self._weights: Weights | None = None
        self._busy: set[int] = set()
        self._flying: list[str] = []
        self._load: EngineLoad | None = None

    @property
    def load(self) -> EngineLoad:
        """As the server sees it: the parts that are made, and what is to be done."""
        if self._load is None:
            switch = {weights: self.fleet.switch * (weights != self._weights) for weights in VARIANTS.values()}
            self._load = EngineLoad(list(self.board.values()), self.fleet.costs, switch)
        return self._load

    def admits(self, row: Row, now: float) -> bool:
        """Whether a row, and all that are here, would meet their deadlines, by the server's own price of a queue."""
        return self.fleet.costs.overrun([row], self.load.rows, now, 1.0) <= 0

    def put(self, row: Row) -> None:
        """Take a row."""
        self.board[row.id], self._load = row, None

    def start(self, now: float) -> Iterator[tuple[float, str, tuple[Row, ...]]]:
        """The calls that begin now: until when, the stage, the rows."""
        calls, costs = self.fleet.calls, self.fleet.costs
        while len(self._flying) < calls:
            free = [row for row in self.board.values() if row.id not in self._busy]
            todo = plan(free, costs, now, Workers(calls, calls, calls), self._flying)
            for row in todo.refuse:
                self._drop(row)
            if todo.encode:
                yield self._call("encode", todo.encode, now + len(todo.encode) * costs.encode)
            elif todo.decode:
                yield self._call("decode", todo.decode, now + costs.decode_seconds(len(todo.decode), SIDE * SIDE))
            elif todo.step:
                seconds = costs.step_seconds(len(todo.step), SIDE * SIDE)
                if todo.step[0].weights != self._weights:
                    self._weights, self._load = todo.step[0].weights, None
                    self.switches += 1
                    seconds += self.fleet.switch
                yield self._call("denoise", todo.step, now + seconds)
            else:
                return

    def end(self, stage: str, rows: Sequence[Row]) -> tuple[Row, ...]:
        """A call is done; the rows that are pictures now."""
        self._flying.remove(stage)
        self._busy -= {row.id for row in rows}
        for row in rows:
            if stage == "decode":
                self._drop(row)
            else:
                self.put(replace(row, is_encoded=True, steps_left=row.steps_left - (stage == "denoise")))
        return tuple(rows) if stage == "decode" else ()

    def _call(self, stage: str, rows: tuple[Row, ...], end: float) -> tuple[float, str, tuple[Row, ...]]:
        self._flying.append(stage)
        self._busy |= {row.id for row in rows}
        return end, stage, rows

    def _drop(self, row: Row) -> None:
        del self.board[row.id]
        self._load = None


Router = Callable[[Row, Sequence[Device], float], int]  # the number of the device for a row


def least(prices: Sequence[float], rng: random.Random) -> int:
    """The number of the least one; of several, any."""
    best = min(prices)
    return rng.choice([number for number, price in enumerate(prices) if price == best])


def at_random(rng: random.Random) -> Router:
    """kube-proxy."""
    return lambda row, devices, now: rng.randrange(len(devices))


def round_robin(rng: random.Random) -> Router:
    """One after the other."""
    turn = itertools.count()
    return lambda row, devices, now: next(turn) % len(devices)


def two_choices(rng: random.Random) -> Router:
    """Of two at random the one with fewer requests: Ray Serve's own."""

    def route(row: Row, devices: Sequence[Device], now: float) -> int:
        return min(rng.sample(range(len(devices)), 2), key=lambda number: len(devices[number].board))

    return route


def least_connections(rng: random.Random) -> Router:
    """The one with the fewest requests: HAProxy's, one for all."""
    return lambda row, devices, now: least([len(device.board) for device in devices], rng)


def blind_proxies(rng: random.Random) -> Router:
    """The same, where each of several proxies counts its own requests only."""
    sent: list[list[set[int]]] = []

    def route(row: Row, devices: Sequence[Device], now: float) -> int:
        sent.extend([set() for _ in devices] for _ in range(PROXIES - len(sent)))
        mine = rng.choice(sent)
        for ids, device in zip(mine, devices, strict=True):
            ids &= device.board.keys()
        number = least([len(ids) for ids in mine], rng)
        mine[number].add(row.id)
        return number

    return route


def earliest_finish(rng: random.Random) -> Router:
    """Where everything would be drawn first with it."""
    return lambda row, devices, now: least([device.load.after([row]) for device in devices], rng)


def ours(rng: random.Random) -> Router:
    """The server's own place(): finish and three times the added work."""

    def route(row: Row, devices: Sequence[Device], now: float) -> int:
        placed = place([row], [device.load for device in devices])
        return next(number for number, rows in enumerate(placed) if rows)

    return route


def partition(rng: random.Random) -> Router:
    """Each variant has devices of its own, by its share of the work; among them, where it is drawn first."""
    owned: dict[Weights, list[int]] = {}

    def route(row: Row, devices: Sequence[Device], now: float) -> int:
        if not owned:
            owned.update(_shares(devices))
        own = owned[row.weights]
        return own[least([devices[number].load.after([row]) for number in own], rng)]

    return route


def _shares(devices: Sequence[Device]) -> dict[Weights, list[int]]:
    costs, count = devices[0].fleet.costs, len(devices)
    work = {weights: costs.work(_row(id, steps, 0.0) for id in range(64)) for steps, weights in VARIANTS.items()}
    ends = [0.0, *itertools.accumulate(count * each / sum(work.values()) for each in work.values())]
    return {
        weights: list(range(math.floor(low), min(count, math.ceil(high))))  # a device may be shared by neighbours
        for weights, (low, high) in zip(work, itertools.pairwise(ends), strict=True)
    }


def reported_work(rng: random.Random) -> Router:
    """The one that last reported the least work."""
    reports: list[float] = []
    due = 0.0

    def route(row: Row, devices: Sequence[Device], now: float) -> int:
        nonlocal due
        if now >= due:
            reports[:] = [device.load.work for device in devices]
            due = now + REPORT_S
        return least(reports, rng)

    return route


ROUTERS: dict[str, Callable[[random.Random], Router]] = {
    "random (kube-proxy)": at_random,
    "round robin": round_robin,
    "power of two, by count (Ray's default)": two_choices,
    "least connections (HAProxy)": least_connections,
    f"the same, {PROXIES} proxies blind to each other": blind_proxies,
    "earliest finish": earliest_finish,
    "place(): finish + 3 x added work": ours,
    "fixed partition by variant": partition,
    f"least reported work, every {REPORT_S:g} s": reported_work,
}


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
        yield now, _row(id, rng.choice(EVEN_MIX), now + fleet.deadline)


def _row(id: int, steps: int, deadline: float) -> Row:
    return Row(id, VARIANTS[steps], SIDE, SIDE, deadline, steps, is_encoded=False)


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
