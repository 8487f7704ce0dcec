"""Accepted jobs that are not finished, and the events that each request waits for. Everything is on the event loop."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from app import errors
from app.engine.jobs import Job, Row
from app.engine.messages import Done
from app.errors import Problem
from models.catalog import Weights

GRACE_S = 0.05  # past the deadline, for an event that is on its way


@dataclass(frozen=True)
class Stepped:
    """A picture has taken one more of its steps."""

    id: int
    step: int


@dataclass(frozen=True)
class Accepted:
    """The engine has the jobs of a request."""

    jobs: tuple[Job, ...]


Event = Accepted | Stepped | Done


class Ticket:
    """What one request waits for: the events of its jobs, until each is Done."""

    def __init__(self, jobs: Sequence[Job], wants_steps: bool) -> None:
        self.ids = {job.id for job in jobs}
        self.deadline = jobs[0].deadline
        self.wants_steps = wants_steps
        self._events: asyncio.Queue[Event | Problem] = asyncio.Queue()

    def put(self, event: Event | Problem) -> None:
        """Tell whoever waits."""
        self._events.put_nowait(event)

    async def next(self) -> Event:
        """The next event. Raises the Problem that one of the jobs met, or errors.EXPIRED at the deadline."""
        try:
            async with asyncio.timeout(max(0.0, self.deadline - time.monotonic()) + GRACE_S):
                event = await self._events.get()
        except TimeoutError:
            raise Problem(errors.EXPIRED) from None
        if isinstance(event, Problem):
            raise event
        return event


@dataclass
class Pending:
    """A job in the engine, and who waits for it."""

    row: Row
    steps: int
    ticket: Ticket
    has_begun: bool = False


class Queue:
    """All jobs between their admission and their end, by id."""

    def __init__(self) -> None:
        self._pending: dict[int, Pending] = {}
        self._styled: set[Weights] = set()  # those that the engine has in memory

    def __len__(self) -> int:
        """Pictures accepted and not finished."""
        return len(self._pending)

    @property
    def rows(self) -> list[Row]:
        """Every job as the scheduler sees it."""
        return [pending.row for pending in self._pending.values()]

    @property
    def waiting(self) -> int:
        """Pictures that have had no step yet."""
        return sum(not pending.has_begun for pending in self._pending.values())

    def put(self, jobs: Sequence[Job], wants_steps: bool) -> Ticket:
        """Take one request's jobs in. wants_steps: its ticket tells of each step, too."""
        ticket = Ticket(jobs, wants_steps)
        self._pending.update({job.id: Pending(self.row(job), job.steps, ticket) for job in jobs})
        return ticket

    def row(self, job: Job) -> Row:
        """A job as the scheduler sees it, with weights that are in memory or must be made first."""
        return self._placed(job.row())

    def loaded(self, weights: Weights, left: Sequence[Weights]) -> None:
        """The engine has a set in memory, and some others no more."""
        self._styled = (self._styled | {weights}) - set(left)
        for pending in self._pending.values():
            if pending.row.weights.is_styled:
                pending.row = self._placed(pending.row)

    def _placed(self, row: Row) -> Row:
        is_here = not row.weights.is_styled or row.weights in self._styled
        return row if row.is_here == is_here else replace(row, is_here=is_here)

    def remove(self, ticket: Ticket) -> list[int]:
        """Take out what is left of a request; the ids of its unfinished jobs."""
        return [id for id in ticket.ids if self._pending.pop(id, None) is not None]

    def stepped(self, ids: Sequence[int]) -> None:
        """Each of these jobs has taken a step."""
        for id in ids:
            if (pending := self._pending.get(id)) is not None:
                pending.has_begun = True
                pending.row = replace(pending.row, steps_left=pending.row.steps_left - 1)
                if pending.ticket.wants_steps:
                    pending.ticket.put(Stepped(id, pending.steps - pending.row.steps_left))

    def settle(self, id: int, outcome: Done | Problem) -> bool:
        """A job has ended. False where nobody waits for it any more."""
        pending = self._pending.pop(id, None)
        if pending is not None:
            pending.ticket.put(outcome)
        return pending is not None

    def fail_all(self, problem: Problem) -> None:
        """The engine has gone, and every job with it."""
        for pending in self._pending.values():
            pending.ticket.put(problem)
        self._pending.clear()
        self._styled.clear()
