"""Admission: a request that cannot meet its deadline is refused, with a Retry-After that holds. Pure, no clock."""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from app.engine.jobs import Row
from app.engine.placement import EngineLoad

KEPT = 0.9  # of its time is what an admitted request may wait: batches are never quite what the table says
FRESH = 0.3  # of its time, and of the queue, while promises are open: the rest is for those who come back
PROMISED = 0.85  # of the capacity is promised to those who come back; fresh requests take what they leave
WINDOW = 1.5  # seconds: Retry-After is whole seconds rounded up, and a client and its network take a moment
PATIENCE = 10.0  # seconds after its time for which a promise holds, where nobody else sends the same request
HORIZON = 1800.0  # seconds; nobody is promised a place later than this
MOST_WINDOWS = 1 << 16  # open at once, about 20 MB
TYPICAL_S = 0.25  # seconds for which one refusal tells of others; what that keeps out is little of a queue's time
ALIKE = 0.9  # of a request's time: one that has this much, or as much more, is drawn at about the same time
SLACK = 0.03  # of its time: a request that misses by less than this is refused with the others
LEARN = 0.01  # of the share that comes back is learned from one promise; a tenth is the least that is believed


@dataclass(frozen=True)
class Refusal:
    """Why a request is turned away, and in how many whole seconds it would be admitted."""

    reason: str
    retry_after: int


@dataclass(frozen=True)
class Typical:
    """What the last request that was read and refused needed, in seconds. work: of the devices. at_once: of work, that
    may come in by one window. overrun: by which it was too late. late: how much later than it may wait a request
    without any work would have begun, on the engine where that is soonest. left: until its deadline. at: when it came.
    """

    work: float
    at_once: float
    overrun: float
    late: float
    left: float
    at: float

    def is_too_late(self, left: float) -> bool:
        """Whether a request with so much time would miss its deadline, too, however little work it is. One with much
        less would be drawn before others, and one with more can wait."""
        return ALIKE * self.left <= left <= self.left / ALIKE and self.late > -SLACK * left


@dataclass
class Window:
    """When and how often one request may come back. newcomers: how many of `room` are meant for first-time requests
    with the same body: nobody can tell them from those who were promised a place."""

    start: float
    room: float = 0.0
    newcomers: float = 0.0
    used: int = 0

    def is_open(self, now: float) -> bool:
        """Whether one more may come in by it. Newcomers, where there are any, would use it up in time."""
        return self.used < self.room and 0 <= now - self.start + 0.05 <= (WINDOW if self.newcomers else PATIENCE)


@dataclass
class Caller:
    """All that is open for one fingerprint, and how often it asked."""

    since: float
    asks: int = 0
    windows: list[Window] = field(default_factory=list)


class Admission:
    """Admission by price. Who is refused gets a time to come back at, later for each by the work they will bring, and
    is judged by what was kept for them when the same fingerprint comes again. Equal requests share windows.
    limit: pictures that are accepted and not finished, per engine."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._callers: dict[str, Caller] = {}
        self._windows: deque[tuple[str, Window]] = deque()  # all of them, by their start
        self._promised_until = 0.0
        self._typical: Typical | None = None
        self._come_back = 1.0  # share of promises that are used: a flood that never returns books little

    def ask(self, new: Sequence[Sequence[Row]], engines: Sequence[EngineLoad], now: float, who: str) -> Refusal | None:
        """None if the rows of one request may enter. new: those for each of the engines, as they were placed. who: the
        request's fingerprint, the same when it comes back."""
        self._close_windows(now)
        parts = [(rows, engine.rows, engine.costs) for rows, engine in zip(new, engines, strict=True) if rows]
        share = KEPT if self._is_kept(who, now) or not self._windows else FRESH
        count, limit = sum(map(len, new)), self.limit * len(engines)
        queued = sum(len(engine.rows) for engine in engines)
        full = queued + count > (limit if share == KEPT else max(count, FRESH * limit))
        if not full and max(costs.overrun(rows, queue, now, share) for rows, queue, costs in parts) <= 0:
            return None
        left = parts[0][0][0].deadline - now
        added = sum(costs.work([*queue, *rows]) - costs.work(queue) for rows, queue, costs in parts)
        work = added / len(engines)  # they work side by side
        at_once = min((KEPT - FRESH) * left, (1 - FRESH) * limit * work / count) + WINDOW
        overrun = max(costs.overrun(rows, queue, now, FRESH) for rows, queue, costs in parts)
        late = min(_late(parts[0][0][0], engine, now) for engine in engines)
        self._typical = Typical(work, at_once, overrun, late, left, now)
        return self._refuse(full, limit, who, self._typical, now)

    def glance(self, queued: int, engines: int, left: float, now: float, who: str) -> Refusal | None:
        """A refusal of a request that nobody has read yet, but for the seconds that it has: there is no place but for
        those who were promised one. None where it has to be read: ask() says more. queued: pictures."""
        self._close_windows(now)
        if (typical := self._typical) is None or now - typical.at > TYPICAL_S:
            return None
        limit = self.limit * engines
        full = queued + 1 > (max(1, FRESH * limit) if self._windows else limit)
        if not full and not typical.is_too_late(left):
            return None
        if (caller := self._callers.get(who)) is not None:
            if any(window.is_open(now) for window in caller.windows):
                return None
            caller.asks += 1
        return self._refuse(full, limit, who, typical, now)

    def _refuse(self, full: bool, limit: int, who: str, asked: Typical, now: float) -> Refusal:
        reason = f"the queue of {limit} pictures is full" if full else "the queue is too long to meet the deadline"
        start = self._promise(who, asked.work, asked.at_once, now, now + max(1.0, asked.overrun))
        return Refusal(reason, math.ceil(start - now))

    def _is_kept(self, who: str, now: float) -> bool:
        caller = self._callers.get(who, Caller(now))
        caller.asks += 1
        window = next((window for window in caller.windows if window.is_open(now)), None)
        if window is not None:
            window.used += 1
        return window is not None

    def _promise(self, who: str, work: float, at_once: float, now: float, earliest: float) -> float:
        """The time to come back at. A window of this fingerprint serves again while what comes in by it and after it
        is no more than `at_once` seconds of work; else there is a new one after all that was promised so far."""
        caller = self._callers.get(who, Caller(now))
        newcomers = WINDOW * caller.asks / max(0.5, now - caller.since)
        for window in caller.windows:
            others = max(0.0, newcomers - window.newcomers)
            cost = (self._come_back + others) * work / PROMISED
            if earliest <= window.start and self._promised_until + cost <= window.start + at_once / PROMISED:
                break
        else:
            others, window = newcomers, Window(max(earliest, self._promised_until))
            cost = (self._come_back + others) * work / PROMISED
            if window.start > now + HORIZON or others * work > at_once or len(self._windows) >= MOST_WINDOWS:
                return min(window.start, now + HORIZON)  # a time, but nothing is kept
            self._callers.setdefault(who, caller).windows.append(window)
            self._windows.append((who, window))
            self._promised_until = window.start
        self._promised_until += cost
        window.room, window.newcomers = window.room + 1 + others, window.newcomers + others
        return window.start

    def _close_windows(self, now: float) -> None:
        while self._windows and self._windows[0][1].start + PATIENCE < now:
            who, window = self._windows.popleft()
            self._callers[who].windows.remove(window)
            if not self._callers[who].windows:
                del self._callers[who]
            if not window.newcomers:
                self._come_back += LEARN * (window.used / window.room - self._come_back)
        self._come_back = max(0.1, self._come_back)


def _late(row: Row, engine: EngineLoad, now: float) -> float:
    """Seconds by which a new row would begin too late on an engine."""
    own = engine.costs.work([*engine.rows, row]) - engine.costs.work(engine.rows)
    return engine.costs.overrun([row], engine.rows, now, FRESH) - own
