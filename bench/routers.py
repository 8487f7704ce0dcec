"""Devices on paper, and the ways to share a load among them: each router is a function of one picture's row."""

import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from app.engine.costs import Costs
from app.engine.jobs import Row
from app.engine.placement import EngineLoad, place
from app.engine.scheduler import Workers, plan
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
        many = [row_of(id, EVEN_MIX[id % len(EVEN_MIX)], 0.0) for id in range(4096)]
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
    work = {weights: costs.work(row_of(id, steps, 0.0) for id in range(64)) for steps, weights in VARIANTS.items()}
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


def row_of(id: int, steps: int, deadline: float) -> Row:
    """A picture of so many steps, as the scheduler knows it."""
    return Row(id, VARIANTS[steps], SIDE, SIDE, deadline, steps, is_encoded=False)
