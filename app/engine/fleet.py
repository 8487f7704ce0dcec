"""The engines behind one queue, as the APIs see them: it admits jobs, places them, tells what becomes of them, and
counts."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from functools import partial

from msgspec.structs import replace

from app import errors
from app.engine.admission import Admission, Refusal
from app.engine.jobs import Job, Row, Source
from app.engine.messages import (
    Cancel,
    Done,
    EngineConfig,
    Failed,
    Fatal,
    FromEngine,
    Loaded,
    Preview,
    Ready,
    Report,
    Submit,
    Worked,
)
from app.engine.placement import place
from app.engine.process import EngineProcess
from app.engine.queue import Accepted, Event, Queue, Waiting
from app.errors import CAUSES, FAILED, Problem
from app.logs import STDERR
from app.metrics import Metrics, labels

log = logging.getLogger("app.engine")

# Nobody's fault, or logged where it happened: no line in the log.
EXPECTED = ("EXPIRED", "LOADING", "UNAVAILABLE", "BAD_STYLE", "STYLE_GONE")
STATES = ("on disk", "failed", "loading", "resident")  # of a variant, the best last
MOST_DEATHS = 2  # of engines that were working on a picture: it is what they died of


class Fleet:
    """One engine process per device. draining: set when the server is told to stop; nothing new is admitted then."""

    def __init__(self, configs: Sequence[EngineConfig], queue_limit: int, metrics: Metrics) -> None:
        self.metrics = metrics
        self.draining = False
        self._queue = Queue()
        self._admission = Admission(queue_limit)
        self._engines = [
            EngineProcess(config, self._hear, partial(self._bury, number)) for number, config in enumerate(configs)
        ]

    def start(self) -> None:
        """Begin to start the engines; returns at once."""
        for engine in self._engines:
            engine.start()

    async def stop(self) -> None:
        """End the engines."""
        self._queue.fail_all(Problem(errors.ENGINE_DIED))
        await asyncio.gather(*(engine.stop() for engine in self._engines))

    @property
    def fatal(self) -> str | None:
        """Why no engine can ever start, if so."""
        reasons = [engine.fatal for engine in self._engines]
        return reasons[0] if all(reasons) else None

    @property
    def report(self) -> Report | None:
        """What the engines that serve said last of their weights, together."""
        return _together([engine.report for engine in self._engines if engine.ready and engine.report])

    @property
    def is_busy(self) -> bool:
        """Whether somebody waits for a picture."""
        return len(self._queue) > 0

    @property
    def serving(self) -> int:
        """How many engines would take a picture now."""
        return sum(engine.is_answering for engine in self._engines)

    @property
    def is_ready(self) -> bool:
        """Whether a request now would be served."""
        return self.serving > 0 and not self.draining

    def require_ready(self) -> Ready:
        """What an engine said when it became ready. Raises Problem while none is, or while we drain."""
        if self.draining:
            raise Problem(errors.DRAINING)
        ready = next((engine.ready for engine in self._engines if engine.ready is not None), None)
        if ready is None:
            raise Problem(errors.STARTING)
        return ready

    def glance(self, seconds: float, who: str) -> None:
        """Raises the Problem of a request that nobody has read yet, but for the seconds that it has, where it will not
        be served whatever it says. who: as for watch()."""
        self.require_ready()
        _raise(self._admission.glance(len(self._queue), len(self._open()), seconds, time.monotonic(), who))

    async def watch(
        self, jobs: Sequence[Job], who: str, wants_steps: bool = False, source: Source | None = None
    ) -> AsyncGenerator[Event]:
        """Draw one request's jobs, all with one deadline, and tell what becomes of them, until each is Done. Who
        wants_steps hears of the queue, too, and again where nothing else happens.
        who: the request's fingerprint, for its Retry-After. source: what they draw over. To close this iterator takes
        its jobs out of the engines. Raises the Problem that describes what went wrong."""
        engines = self._admit(jobs, who)
        ticket = self._queue.put(jobs, engines, wants_steps, source)
        for number in set(engines.values()):
            self._engines[number].send(Submit([job for job in jobs if engines[job.id] == number], source))
        missing = len(jobs)
        try:
            yield Accepted(tuple(jobs))
            if wants_steps:
                yield self._waiting(jobs[0].row())
            while missing:
                event = await ticket.next()
                missing -= isinstance(event, Done)
                yield event or self._waiting(jobs[0].row())
        finally:
            for number, ids in self._queue.remove(ticket).items():
                self._engines[number].send(Cancel(ids))
            self._place_orphans()

    def work_seconds(self) -> dict[str, float]:
        """Seconds until each engine that serves has drawn what it has, by its name."""
        rows = self._queue.rows(len(self._engines))
        return {engine.name: engine.load(rows[number]).work for number, engine in self._open()}

    def gauge(self) -> None:
        """Bring the gauges up to date, before a scrape."""
        waiting = self._queue.waiting
        self.metrics.waiting.set(waiting)
        self.metrics.running.set(len(self._queue) - waiting)
        self.metrics.ready.set(self.is_ready)
        self.metrics.log_lines_dropped.inc(STDERR.take_dropped())
        self.metrics.work.clear()  # an engine that does not serve is not idle
        for name, seconds in self.work_seconds().items():
            self.metrics.work.labels(name).set(seconds)
        for engine in self._engines:
            self.metrics.engine_ready.labels(engine.name).set(engine.is_answering)
            if (report := engine.report) is not None:
                for variant in report.variants:
                    self.metrics.resident.labels(variant.name, engine.name).set(variant.resident_bytes)
                self.metrics.device_bytes.labels(engine.name).set(report.device_bytes or 0)
                self.metrics.switches.labels(engine.name).set(report.switches)
            if engine.costs is not None:
                for batch, seconds in engine.costs.step.items():
                    self.metrics.step_cost.labels(str(batch), engine.name).set(seconds)
                for batch, seconds in engine.costs.decode.items():
                    self.metrics.decode_cost.labels(str(batch), engine.name).set(seconds)

    def _open(self) -> list[tuple[int, EngineProcess]]:
        """The engines that take new work, with their numbers: those that answered lately; if none did, those that
        serve, for one of them may."""
        ready = [(number, engine) for number, engine in enumerate(self._engines) if engine.ready is not None]
        return [each for each in ready if each[1].is_answering] or ready

    def _admit(self, jobs: Sequence[Job], who: str) -> dict[int, int]:
        """The number of the engine for each job, by its id."""
        self.require_ready()
        new, now = [job.row() for job in jobs], time.monotonic()
        rows, opened = self._queue.rows(len(self._engines)), self._open()
        loads = [engine.load(rows[number]) for number, engine in opened]
        if (needed := min(load.costs.alone(new[0]) for load in loads)) > new[0].deadline - now:
            detail = f"this machine needs {needed:.2f} s for this request at the least"
            raise Problem(errors.INVALID, detail, "timeout")
        placed = place(new, loads)
        _raise(self._admission.ask(placed, loads, now, who))
        return {row.id: number for (number, _), rows in zip(opened, placed, strict=True) for row in rows}

    def _waiting(self, row: Row) -> Waiting:
        number, ahead = self._queue.ahead(row)
        seconds = self._engines[number].load(ahead).costs.wait(row, ahead) if number is not None and ahead else 0.0
        return Waiting(len(ahead), seconds)

    def _bury(self, number: int, worked_on: set[int]) -> None:
        if self.fatal is None and not self.draining:
            self.metrics.restarts.labels(self._engines[number].name).inc()
        if len(self._engines) == 1:
            self._queue.fail_all(Problem(errors.ENGINE_DIED))
        self._queue.orphan(number, worked_on)
        for orphan in self._queue.orphans:
            if orphan.deaths >= MOST_DEATHS:
                self._queue.settle(orphan.job.id, Problem(errors.DEADLY))
        self._place_orphans()

    def _place_orphans(self) -> None:
        """Give the pictures of engines that died to others. An engine gets no second one of those that it may die of,
        so that it is known which it was; that one fails alone."""
        for orphan in self._queue.orphans:
            suspected = self._queue.suspected if orphan.deaths else ()
            opened = [each for each in self._open() if each[0] not in suspected]
            if not opened:
                continue
            rows = self._queue.rows(len(self._engines))
            loads = [engine.load(rows[number]) for number, engine in opened]
            if min(load.costs.alone(orphan.row) for load in loads) > orphan.job.deadline - time.monotonic():
                self._queue.settle(orphan.job.id, Problem(errors.ENGINE_DIED))
                continue
            placed = place([orphan.row], loads)
            number, engine = next(each for each, mine in zip(opened, placed, strict=True) if mine)
            self._queue.adopt(orphan, number)
            engine.send(Submit([orphan.job], orphan.source))

    def _hear(self, message: FromEngine) -> None:
        match message:
            case Ready():
                self._place_orphans()
            case Loaded():
                if message.weights.is_styled:
                    self.metrics.style_load.observe(message.seconds)
            case Worked():
                self._count(message)
            case Done(id):
                if self._queue.settle(id, message):
                    self.metrics.images.labels(*labels(message.weights)).inc()
                    self.metrics.queue.observe(message.seconds.get("queue", 0.0))
                self._place_orphans()
            case Preview():
                self._queue.shown(message)
            case Failed(id, cause, detail):
                if cause not in EXPECTED:
                    log.error("job %d failed: %s %s", id, cause, detail)
                shown = detail if cause == "BAD_STYLE" else None  # it says what to change, and no path
                self._queue.settle(id, Problem(CAUSES.get(cause, FAILED), shown))
                self._place_orphans()
            case Fatal(reason):
                if self.fatal is not None:
                    self._queue.fail_all(Problem(errors.ENGINE_DIED))
                else:
                    log.warning("serving without this engine: %s", reason)

    def _count(self, worked: Worked) -> None:
        self.metrics.stages[worked.stage].observe(worked.seconds)
        if worked.stage == "denoise":
            self.metrics.batch.labels(*labels(worked.weights)).observe(worked.rows)
            self._queue.stepped(worked.ids)


def _raise(refusal: Refusal | None) -> None:
    if refusal is not None:
        detail = f"{refusal.reason}; ask again in {refusal.retry_after} s"
        raise Problem(errors.OVERLOADED, detail, retry_after=refusal.retry_after)


def _together(reports: Sequence[Report]) -> Report | None:
    """What several engines say of one family: of each variant the best state that it has anywhere."""
    if not reports:
        return None
    variants = []
    for same in zip(*(report.variants for report in reports), strict=True):
        best = max(same, key=lambda variant: STATES.index(variant.state))
        variants.append(replace(best, resident_bytes=sum(variant.resident_bytes for variant in same)))
    return Report(variants, None, 0, all(report.compiled for report in reports))
