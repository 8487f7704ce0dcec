"""Measured costs: what a step and a decode take at each batch size. They choose the batch and price a queue."""

import math
from collections.abc import Iterable, Sequence

import msgspec

from app.engine.jobs import Row, age
from models.catalog import Weights

GOOD_ENOUGH = 0.95  # of the best images/s: a larger batch would only add latency
HUNG_TIMES, HUNG_S = 10.0, 10.0  # a call that takes so many times its measured cost, and at least so long, has hung


class Costs(msgspec.Struct, frozen=True):
    """Seconds of a UNet step and of a VAE decode by batch size, measured at warm-up at one picture size.

    step, decode: seconds by batch size, from 1 up. pixels: of the measured pictures; other sizes are priced in
    proportion. encode: seconds to encode one prompt; picture: one picture of these pixels, to draw over. workers: calls
    that the device makes at a time.
    """

    step: dict[int, float]
    decode: dict[int, float]
    encode: float
    pixels: int
    workers: int = 1
    picture: float = 0.0

    def step_seconds(self, batch: int, pixels: int) -> float:
        """What one UNet call on `batch` rows takes."""
        return _interpolate(self.step, batch) * pixels / self.pixels

    def decode_seconds(self, batch: int, pixels: int) -> float:
        """What decoding `batch` pictures together takes."""
        return _interpolate(self.decode, batch) * pixels / self.pixels

    def picture_seconds(self, row: Row) -> float:
        """What encoding the picture that a row draws over takes, where that is still to be done."""
        return self.picture * row.pixels / self.pixels if row.source is not None and not row.is_encoded else 0.0

    @property
    def best_batch(self) -> int:
        """The smallest batch of a UNet step that reaches 95 % of the best images/s."""
        return _smallest_good(self.step)

    @property
    def best_decode_batch(self) -> int:
        """The same for the VAE."""
        return _smallest_good(self.decode)

    def alone(self, row: Row) -> float:
        """The least time from now to the row's picture, if it had the device for itself."""
        steps = row.steps_left * self.step_seconds(row.count, row.pixels)
        return self.picture_seconds(row) + steps + self.decode_seconds(1, row.pixels)

    def patience(self, stage: str, pictures: int, pixels: int) -> float:
        """Seconds after which a call of a stage has hung."""
        encode = pictures * self.encode + self.picture * pixels / self.pixels
        seconds = {"encode": encode, "decode": self.decode_seconds(pictures, pixels)}
        expected = seconds.get(stage, self.step_seconds(2 * pictures, pixels))
        return max(HUNG_S, HUNG_TIMES * expected)

    def work(self, rows: Iterable[Row]) -> float:
        """Seconds until the device has finished these rows, batched as the scheduler would batch them."""
        return sum(self.shares(rows).values())

    def shares(self, rows: Iterable[Row]) -> dict[int, float]:
        """Each row's share of those seconds, by id: its steps and decode in the batches its group allows."""
        groups: dict[tuple[Weights, int, int, int], list[Row]] = {}
        for row in rows:
            groups.setdefault(row.group, []).append(row)
        shares = {}
        for group in groups.values():
            pixels = group[0].pixels
            batch = min(sum(row.count for row in group), self.best_batch)
            decodes = min(len(group), self.best_decode_batch)
            step = self.step_seconds(batch, pixels) / batch
            decode = self.decode_seconds(decodes, pixels) / decodes + self.encode
            for row in group:
                once = self.picture_seconds(row) if row.source == row.id else 0.0  # for all that draw over it
                shares[row.id] = (once + row.count * row.steps_left * step + decode) / self.workers
        return shares

    def wait(self, row: Row, before: Sequence[Row]) -> float:
        """Seconds until a row's first step, about. before: those that go before it, the first one first. It waits for
        all of other groups, and for as many of its own as leave it no place in a batch."""
        own = [each for each in before if each.group == row.group]
        blocking = own[: max(0, sum(each.count for each in own) + row.count - self.best_batch)]
        return self.work([*(each for each in before if each.group != row.group), *blocking])

    def overrun(self, new: Sequence[Row], pending: Sequence[Row], now: float, share: float) -> float:
        """Seconds by which the worst-off row, new or pending, would miss its deadline, oldest deadline first; a new one
        `share` of its time, while a pending one, once admitted, has all of it. 0 or less: nobody would."""
        shares = self.shares([*pending, *new])
        fresh = {row.id for row in new}
        finish, worst = now, -math.inf
        oldest_new = min(row.deadline for row in new)
        for row in sorted([*pending, *new], key=age):
            finish += shares[row.id]
            if row.id in fresh:
                worst = max(worst, finish - (now + share * (row.deadline - now)))
            elif row.deadline > oldest_new:
                worst = max(worst, finish - row.deadline)
        return worst

    def scaled(self, by: float) -> "Costs":
        """The same table where everything takes `by` times as long: a machine that is busier than at warm-up."""
        return msgspec.structs.replace(
            self,
            step={batch: seconds * by for batch, seconds in self.step.items()},
            decode={batch: seconds * by for batch, seconds in self.decode.items()},
            encode=self.encode * by,
            picture=self.picture * by,
        )

    def joined(self, other: "Costs") -> "Costs":
        """The same table with what another has measured since."""
        return msgspec.structs.replace(
            self,
            step={**self.step, **other.step},
            decode={**self.decode, **other.decode},
            encode=other.encode,
            picture=other.picture,
        )

    def capped(self, step: int, decode: int) -> "Costs":
        """The same table without the batch sizes above these: larger ones do not fit into memory."""
        return msgspec.structs.replace(
            self,
            step={size: seconds for size, seconds in self.step.items() if size <= step},
            decode={size: seconds for size, seconds in self.decode.items() if size <= decode},
        )


def _smallest_good(table: dict[int, float]) -> int:
    best = max(batch / seconds for batch, seconds in table.items())
    return min(batch for batch, seconds in table.items() if batch / seconds >= GOOD_ENOUGH * best)


def _interpolate(table: dict[int, float], batch: int) -> float:
    """Linear between measured sizes; above the largest, in proportion to it."""
    if batch in table:
        return table[batch]
    largest = max(table)
    if batch > largest:
        return table[largest] * batch / largest
    below = max(size for size in table if size < batch)
    above = min(size for size in table if size > batch)
    return table[below] + (table[above] - table[below]) * (batch - below) / (above - below)
