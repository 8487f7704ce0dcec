"""The engine behind one queue, as the APIs see it: it admits jobs, tells what becomes of them, and counts."""

import logging
import time
from collections.abc import AsyncGenerator, Sequence

from app import errors
from app.engine.admission import Admission, Refusal
from app.engine.jobs import Job
from app.engine.messages import Cancel, Done, EngineConfig, Failed, FromEngine, Ready, Report, Submit, Worked
from app.engine.process import EngineProcess
from app.engine.queue import Accepted, Event, Queue
from app.errors import CAUSES, FAILED, Problem
from app.logs import STDERR
from app.metrics import Metrics

log = logging.getLogger("app.engine")

EXPECTED = ("EXPIRED", "LOADING", "UNAVAILABLE")  # nobody's fault, or logged where it happened: no line in the log


class Fleet:
    """One engine process today. draining: set when the server is told to stop; nothing new is admitted then."""

    def __init__(self, config: EngineConfig, queue_limit: int, metrics: Metrics) -> None:
        self.metrics = metrics
        self.draining = False
        self._queue = Queue()
        self._admission = Admission(queue_limit)
        self._engine = EngineProcess(config, self._hear, self._bury)

    def start(self) -> None:
        """Begin to start the engine; returns at once."""
        self._engine.start()

    async def stop(self) -> None:
        """End the engine."""
        await self._engine.stop()

    @property
    def fatal(self) -> str | None:
        """Why no engine can ever start, if so."""
        return self._engine.fatal

    @property
    def report(self) -> Report | None:
        """What the engine said last of its weights and memory."""
        return self._engine.report

    @property
    def is_busy(self) -> bool:
        """Whether somebody waits for a picture."""
        return len(self._queue) > 0

    @property
    def is_ready(self) -> bool:
        """Whether a request now would be served."""
        return self._engine.is_answering and not self.draining

    def require_ready(self) -> Ready:
        """What the engine said when it became ready. Raises Problem while it is not, or while we drain."""
        if self.draining:
            raise Problem(errors.DRAINING)
        if self._engine.ready is None:
            raise Problem(errors.STARTING)
        return self._engine.ready

    def glance(self, seconds: float, who: str) -> None:
        """Raises the Problem of a request that nobody has read yet, but for the seconds that it has, where it will not
        be served whatever it says. who: as for watch()."""
        self.require_ready()
        _raise(self._admission.glance(len(self._queue), seconds, time.monotonic(), who))

    async def watch(self, jobs: Sequence[Job], who: str, wants_steps: bool = False) -> AsyncGenerator[Event]:
        """Draw one request's jobs, all with one deadline, and tell what becomes of them, until each is Done.
        who: the request's fingerprint, for its Retry-After. To close this iterator takes its jobs out of the engine.
        Raises the Problem that describes what went wrong."""
        self._admit(jobs, who)
        ticket = self._queue.put(jobs, wants_steps)
        self._engine.send(Submit(list(jobs)))
        missing = len(jobs)
        try:
            yield Accepted(tuple(jobs))
            while missing:
                event = await ticket.next()
                missing -= isinstance(event, Done)
                yield event
        finally:
            if left := self._queue.remove(ticket):
                self._engine.send(Cancel(left))

    def gauge(self) -> None:
        """Bring the gauges up to date, before a scrape."""
        waiting = self._queue.waiting
        self.metrics.waiting.set(waiting)
        self.metrics.running.set(len(self._queue) - waiting)
        self.metrics.ready.set(self.is_ready)
        self.metrics.engine_ready.labels("0").set(self._engine.is_answering)
        prices = self._engine.prices
        self.metrics.work.labels("0").set(prices.work(self._queue.rows) if prices is not None else 0)
        self.metrics.log_lines_dropped.inc(STDERR.take_dropped())
        if (report := self._engine.report) is not None:
            for variant in report.variants:
                self.metrics.resident.labels(variant.name).set(variant.resident_bytes)
            self.metrics.device_bytes.set(report.device_bytes or 0)
            self.metrics.switches.set(report.switches)
        if self._engine.costs is not None:
            for batch, seconds in self._engine.costs.step.items():
                self.metrics.step_cost.labels(str(batch)).set(seconds)

    def _admit(self, jobs: Sequence[Job], who: str) -> None:
        self.require_ready()
        costs, prices = self._engine.costs, self._engine.prices
        assert costs is not None
        assert prices is not None
        rows, now = [job.row() for job in jobs], time.monotonic()
        if (needed := costs.alone(rows[0])) > rows[0].deadline - now:
            detail = f"this machine needs {needed:.2f} s for this request at the least"
            raise Problem(errors.INVALID, detail, "timeout")
        _raise(self._admission.ask(rows, self._queue.rows, prices, now, who))

    def _bury(self) -> None:
        self._queue.fail_all(Problem(errors.ENGINE_DIED))
        if self.fatal is None and not self.draining:
            self.metrics.restarts.inc()

    def _hear(self, message: FromEngine) -> None:
        match message:
            case Worked():
                self._count(message)
            case Done(id):
                if self._queue.settle(id, message):
                    self.metrics.images.labels(message.variant).inc()
                    self.metrics.queue.observe(message.seconds.get("queue", 0.0))
            case Failed(id, cause, detail):
                if cause not in EXPECTED:
                    log.error("job %d failed: %s %s", id, cause, detail)
                self._queue.settle(id, Problem(CAUSES.get(cause, FAILED)))

    def _count(self, worked: Worked) -> None:
        self.metrics.stages[worked.stage].observe(worked.seconds)
        if worked.stage == "denoise":
            self.metrics.batch.labels(worked.variant).observe(worked.rows)
            self._queue.stepped(worked.ids)


def _raise(refusal: Refusal | None) -> None:
    if refusal is not None:
        detail = f"{refusal.reason}; ask again in {refusal.retry_after} s"
        raise Problem(errors.OVERLOADED, detail, retry_after=refusal.retry_after)
