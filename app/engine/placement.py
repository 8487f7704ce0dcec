"""Placement: which engine draws a picture. Pure; bench.fleet simulates fleets of any size with this same function."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from app.engine.costs import Costs
from app.engine.jobs import Row
from models.catalog import Weights

ADDED = 4  # times the work a picture adds, beside what is queued: it delays those who come after it, too


@dataclass(frozen=True)
class EngineLoad:
    """What one engine has to draw, and what that takes there. switch: seconds until a weight set that it holds would be
    the one in use, 0 for the one that is. load: until any other would be there."""

    rows: Sequence[Row]
    costs: Costs
    switch: Mapping[Weights, float] = field(default_factory=dict)
    load: float = 0.0

    def seconds(self, rows: Sequence[Row]) -> float:
        """Until these would be drawn, the weights they need included."""
        fetched = {row.weights for row in rows}
        return self.costs.work(rows) + sum(self.switch.get(weights, self.load) for weights in fetched)


def place(new: Sequence[Row], engines: Sequence[EngineLoad]) -> list[list[Row]]:
    """The new rows for each engine. They are placed one by one, each where 4 * after - 3 * before is least: after and
    before are the seconds of work queued there with it and without. That is when the row would be drawn, plus three
    times the work it adds: little where it fills up a batch, much where its weights must be fetched first."""
    if len(engines) == 1:
        return [list(new)]
    queues = [_Queue(engine) for engine in engines]
    placed: list[list[Row]] = [[] for _ in engines]
    for row in new:
        _, home = min((queue.seconds + ADDED * queue.added(row), index) for index, queue in enumerate(queues))
        queues[home].add(row)
        placed[home].append(row)
    return placed


class _Queue:
    """An engine's rows by weights, of which none shares a call with another's, so that only one part is priced anew."""

    def __init__(self, engine: EngineLoad) -> None:
        self._engine = engine
        self._parts: defaultdict[Weights, list[Row]] = defaultdict(list)
        for row in engine.rows:
            self._parts[row.weights].append(row)
        self._seconds = {weights: engine.seconds(rows) for weights, rows in self._parts.items()}
        self.seconds = sum(self._seconds.values())

    def added(self, row: Row) -> float:
        """Seconds of work that a row would add."""
        together = [*self._parts.get(row.weights, ()), row]
        return self._engine.seconds(together) - self._seconds.get(row.weights, 0.0)

    def add(self, row: Row) -> None:
        """Take it in."""
        added = self.added(row)
        self._parts[row.weights].append(row)
        self._seconds[row.weights] = self._seconds.get(row.weights, 0.0) + added
        self.seconds += added
