"""Placement: which engine draws a picture. Pure; bench.fleet simulates fleets of any size with this same function."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from app.engine.costs import Costs
from app.engine.jobs import Row
from models.catalog import Weights


@dataclass(frozen=True)
class EngineLoad:
    """What one engine has to draw, and what that takes there. switch: seconds until a weight set that it holds would be
    the one in use, 0 for the one that is. load: until any other would be there."""

    rows: Sequence[Row]
    costs: Costs
    switch: Mapping[Weights, float] = field(default_factory=dict)
    load: float = 0.0

    @cached_property
    def work(self) -> float:
        """Seconds of work queued here."""
        return sum(seconds for _, seconds in self._parts.values())

    def after(self, more: Sequence[Row]) -> float:
        """The same with more rows, which all need the same weights."""
        if not more:
            return self.work
        rows, seconds = self._parts.get(more[0].weights, ((), 0.0))
        return self.work - seconds + self._seconds([*rows, *more])

    @cached_property
    def _parts(self) -> dict[Weights, tuple[list[Row], float]]:
        """The rows by their weights, with their seconds: none shares a call with another part's."""
        parts: defaultdict[Weights, list[Row]] = defaultdict(list)
        for row in self.rows:
            parts[row.weights].append(row)
        return {weights: (rows, self._seconds(rows)) for weights, rows in parts.items()}

    def _seconds(self, rows: Sequence[Row]) -> float:
        return self.costs.work(rows) + self.switch.get(rows[0].weights, self.load)


def place(new: Sequence[Row], engines: Sequence[EngineLoad]) -> list[list[Row]]:
    """The rows of one request for each engine. They are placed one by one, each where 4 * after - 3 * before is least:
    the seconds of work queued there with it and without. That is when the row would be drawn, plus three times the work
    it adds: little where it fills up a batch, much where its weights must be fetched first."""
    if len(engines) == 1:
        return [list(new)]
    placed: list[list[Row]] = [[] for _ in engines]
    for row in new:
        prices = [
            4 * engine.after([*mine, row]) - 3 * engine.after(mine)
            for engine, mine in zip(engines, placed, strict=True)
        ]
        placed[prices.index(min(prices))].append(row)
    return placed
