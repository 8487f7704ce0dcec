"""Accepted jobs that are not finished, and the events that each request waits for. Everything is on the event loop."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from app import errors
from app.engine.jobs import Job, Row, Source, age
from app.engine.messages import Done, Preview
from app.errors import Problem

GRACE_S = 0.05  # past the deadline, for an event that is on its way
NEWS_S = 5.0  # without an event for so long, whoever wants steps is told how long it will be


@dataclass(frozen=True)
class Stepped:
    """A picture has taken one more of its steps."""

    id: int
    step: int


@dataclass(frozen=True)
class Accepted:
    """The engine has the jobs of a request."""

    jobs: tuple[Job, ...]


@dataclass(frozen=True)
class Waiting:
    """A request stands in the queue. ahead: pictures of others that go before. seconds: until its first step, about."""

    ahead: int
    seconds: float


Event = Accepted | Waiting | Stepped | Preview | Done


class Ticket:
    """What one request waits for: the events of its jobs, until each is Done. Who reads too slowly for all previews
    gets the newest of each picture, and everything else."""

    def __init__(self, jobs: Sequence[Job], wants_steps: bool) -> None:
        self.ids = {job.id for job in jobs}
        self.deadline = jobs[0].deadline
        self.wants_steps = wants_steps
        self._events: asyncio.Queue[Event | Problem] = asyncio.Queue()
        self._previews: dict[int, Preview] = {}  # unread, by picture

    def put(self, event: Event | Problem) -> None:
        """Tell whoever waits."""
        if isinstance(event, Preview):
            is_behind = event.id in self._previews
            self._previews[event.id] = event
            if is_behind:
                return
        self._events.put_nowait(event)

    async def next(self) -> Event | None:
        """The next event; None where there was none for a while and steps are wanted. Raises the Problem that one of
        the jobs met, or errors.EXPIRED at the deadline."""
        left = max(0.0, self.deadline - time.monotonic()) + GRACE_S
        try:
            async with asyncio.timeout(min(left, NEWS_S) if self.wants_steps else left):
                event = await self._events.get()
        except TimeoutError:
            if self.wants_steps and left > NEWS_S:
                return None
            raise Problem(errors.EXPIRED) from None
        if isinstance(event, Problem):
            raise event
        return self._previews.pop(event.id) if isinstance(event, Preview) else event


@dataclass
class Pending:
    """A job, the engine that has it, and who waits for it. engine: None while it has none. steps: the most that its
    ticket was told of. deaths: of engines that were working on it."""

    job: Job
    row: Row
    ticket: Ticket
    engine: int | None
    source: Source | None = None
    has_begun: bool = False
    steps: int = 0
    deaths: int = 0


class Queue:
    """All jobs between their admission and their end, by id. Engines are known by their numbers."""

    def __init__(self) -> None:
        self._pending: dict[int, Pending] = {}
        self._orphans: dict[int, Pending] = {}  # those that have no engine

    def __len__(self) -> int:
        """Pictures accepted and not finished."""
        return len(self._pending)

    def rows(self, engines: int) -> list[list[Row]]:
        """Every job as the scheduler sees it, by engine."""
        rows: list[list[Row]] = [[] for _ in range(engines)]
        for pending in self._pending.values():
            if pending.engine is not None:
                rows[pending.engine].append(pending.row)
        return rows

    @property
    def waiting(self) -> int:
        """Pictures that have had no step yet."""
        return sum(not pending.has_begun for pending in self._pending.values())

    def ahead(self, row: Row) -> tuple[int | None, list[Row]]:
        """The engine that has a row, and what goes there before it, the first one first, if it has had no step yet."""
        if (pending := self._pending.get(row.id)) is None or pending.has_begun:
            return None, []
        others = [each.row for each in self._pending.values() if each.engine == pending.engine]
        return pending.engine, sorted((each for each in others if age(each) < age(row)), key=age)

    @property
    def orphans(self) -> list[Pending]:
        """The jobs that have no engine, the most urgent first."""
        return sorted(self._orphans.values(), key=lambda pending: age(pending.job))

    @property
    def suspected(self) -> set[int]:
        """The engines that have a job on which another has died."""
        return {each.engine for each in self._pending.values() if each.deaths and each.engine is not None}

    def put(
        self, jobs: Sequence[Job], engines: Mapping[int, int], wants_steps: bool, source: Source | None = None
    ) -> Ticket:
        """Take one request's jobs in. engines: of each, by id. wants_steps: its ticket tells of each step, too. source:
        what they draw over."""
        ticket = Ticket(jobs, wants_steps)
        self._pending.update({job.id: Pending(job, job.row(), ticket, engines[job.id], source) for job in jobs})
        return ticket

    def remove(self, ticket: Ticket) -> dict[int, list[int]]:
        """Take out what is left of a request; the ids of its unfinished jobs by the engine that has them."""
        left: dict[int, list[int]] = {}
        for id in ticket.ids:
            pending = self._pop(id)
            if pending is not None and pending.engine is not None:
                left.setdefault(pending.engine, []).append(id)
        return left

    def stepped(self, ids: Sequence[int]) -> None:
        """Each of these jobs has taken a step. Its ticket is told of none twice."""
        for id in ids:
            if (pending := self._pending.get(id)) is not None:
                pending.has_begun = True
                pending.row = replace(pending.row, steps_left=pending.row.steps_left - 1, is_encoded=True)
                step = len(pending.job.path) - pending.row.steps_left
                if step > pending.steps:
                    pending.steps = step
                    if pending.ticket.wants_steps:
                        pending.ticket.put(Stepped(id, step))

    def shown(self, preview: Preview) -> None:
        """There is a preview of a job."""
        if (pending := self._pending.get(preview.id)) is not None:
            pending.ticket.put(preview)

    def settle(self, id: int, outcome: Done | Problem) -> bool:
        """A job has ended. False where nobody waits for it any more."""
        pending = self._pop(id)
        if pending is not None:
            pending.ticket.put(outcome)
        return pending is not None

    def orphan(self, engine: int, worked_on: set[int]) -> None:
        """An engine has gone: its jobs begin anew, elsewhere. worked_on: what it may have died of."""
        for id, pending in self._pending.items():
            if pending.engine == engine:
                pending.engine, pending.row, pending.has_begun = None, pending.job.row(), False
                pending.deaths += id in worked_on
                self._orphans[id] = pending

    def adopt(self, orphan: Pending, engine: int) -> None:
        """An engine takes an orphan."""
        orphan.engine = engine
        del self._orphans[orphan.job.id]

    def fail_all(self, problem: Problem) -> None:
        """There is no engine, nor will there be one in time."""
        for id in list(self._pending):
            self.settle(id, problem)

    def _pop(self, id: int) -> Pending | None:
        self._orphans.pop(id, None)
        return self._pending.pop(id, None)
