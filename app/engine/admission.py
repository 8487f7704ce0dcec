"""The door: a request that cannot meet its deadline is refused here, with a Retry-After that holds. Pure, no clock."""

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from app.engine.costs import Costs
from app.engine.jobs import Row

FRESH = 0.75  # of its time, and of the queue, is what a new request may take; the rest is kept for those who come back
KEPT = 0.95  # what a request that was told to come back may wait for
PROMISED = 0.85  # of the capacity is promised to those who come back; fresh requests take what they leave
PATIENCE = 10.0  # seconds after its time for which a promise holds
PROMISES = 4096  # fingerprints remembered
PLACES = 64  # kept for one fingerprint at a time
HORIZON = 300.0  # seconds; nobody is promised a place later than this


@dataclass(frozen=True)
class Refusal:
    """Why a request is turned away, and in how many whole seconds it would be admitted."""

    reason: str
    retry_after: int


class Door:
    """Admission by price. Those who are refused get a time to come back at, later for each, and an entry in a list of
    promises under their fingerprint: when they come back, they are judged by what was kept for them."""

    def __init__(self, limit: int) -> None:
        self.limit = limit  # pictures accepted and not finished
        self._promises: OrderedDict[str, list[float]] = OrderedDict()
        self._promised_until = 0.0

    def ask(self, new: Sequence[Row], pending: Sequence[Row], costs: Costs, now: float, who: str) -> Refusal | None:
        """None if the rows of one request may enter. who: the request's fingerprint, the same when it comes back."""
        kept = self._is_kept(who, now)
        full = len(pending) + len(new) > (self.limit if kept else max(len(new), FRESH * self.limit))
        wait = _overrun(new, pending, costs, now, KEPT if kept else FRESH)
        if not full and wait <= 0:
            return None
        reason = f"the queue of {self.limit} pictures is full" if full else "the queue is too long to meet the deadline"
        return Refusal(reason, self._promise(new, pending, costs, now, who, wait))

    def _is_kept(self, who: str, now: float) -> bool:
        times = self._promises.get(who, [])
        due = next((time for time in times if time - 1.0 <= now <= time + PATIENCE), None)
        if due is not None:
            times.remove(due)
        return due is not None

    def _promise(
        self, new: Sequence[Row], pending: Sequence[Row], costs: Costs, now: float, who: str, wait: float
    ) -> int:
        """A time to come back at, in seconds from now, and a place kept for then. Who already has as many places as one
        client is kept, or would have to wait beyond the horizon, gets a time but no place: a flood books nothing."""
        times = [time for time in self._promises.pop(who, []) if now <= time + PATIENCE]
        time = max(now + max(wait, 1.0), self._promised_until)
        if len(times) < PLACES and time - now < HORIZON:
            work = costs.work([*pending, *new]) - costs.work(pending)
            self._promised_until = time + work / PROMISED
            times.append(time)
        self._promises[who] = times
        while len(self._promises) > PROMISES:
            self._promises.popitem(last=False)
        return math.ceil(min(time - now, HORIZON))


def _overrun(new: Sequence[Row], pending: Sequence[Row], costs: Costs, now: float, share: float) -> float:
    """Seconds by which the worst-off row, new or pending, would miss `share` of its time, oldest deadline first.
    0 or less: nobody would. Pending rows are held to their whole time; they were admitted."""
    shares = costs.shares([*pending, *new])
    fresh = {row.id for row in new}
    finish, worst = now, -math.inf
    oldest_new = min(row.deadline for row in new)
    for row in sorted([*pending, *new], key=lambda row: (row.deadline, row.id)):
        finish += shares[row.id]
        if row.id in fresh:
            worst = max(worst, finish - (now + share * (row.deadline - now)))
        elif row.deadline > oldest_new:
            worst = max(worst, finish - row.deadline)
    return worst
