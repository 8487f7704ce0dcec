"""The HTTP process's side of the engine: it starts the process, prices and submits jobs, and survives its death."""

import asyncio
import contextlib
import ctypes.util
import logging
import os
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import msgspec

from app.engine import messages
from app.engine.admission import Door
from app.engine.config import EngineConfig
from app.engine.costs import Costs
from app.engine.jobs import Job, Row
from app.metrics import Metrics
from app.problems import EngineDied, InvalidRequest, NotReady, Overloaded, Problem, expired, from_engine

log = logging.getLogger("app.engine")

PING_S = 1.0  # between two pings
HUNG_S = 20.0  # without an answer for this long, the engine is killed and started again
FRESH_S = 3.0  # readiness wants an answer not older than this
BACK_OFF_S = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)  # before the next start, by deaths in a row
SETTLED_S = 60.0  # an engine that lived this long starts again at once
QUIET = {"TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error"}  # our log is JSON lines
GRACE_S = 0.05  # past the deadline, for an answer that is on its way

# glibc gives large blocks back to the kernel at once, and takes them again for the next layer: a fifth of a decode.
KEEP_MEMORY = (
    "glibc.malloc.mmap_threshold=268435456:glibc.malloc.trim_threshold=536870912:glibc.malloc.top_pad=67108864"
)


def allocator() -> dict[str, str]:
    """Environment of an engine that reuses its memory: tcmalloc where it is installed, else a patient glibc."""
    tcmalloc = ctypes.util.find_library("tcmalloc_minimal")
    return {"LD_PRELOAD": tcmalloc} if tcmalloc else {"GLIBC_TUNABLES": KEEP_MEMORY}


@dataclass
class Pending:
    """A job in the engine, and who waits for it."""

    row: Row
    answer: asyncio.Future[messages.Done]
    has_begun: bool = False


class EngineClient:
    """One engine process and all jobs in it. Everything runs on the event loop."""

    def __init__(self, config: EngineConfig, queue_limit: int, metrics: Metrics) -> None:
        self.config, self.metrics = config, metrics
        self.ready: messages.Ready | None = None
        self.report: messages.Report | None = None
        self.fatal: str | None = None
        self.draining = False
        self._door = Door(queue_limit)
        self._pending: dict[int, Pending] = {}
        self._next_id = 0
        self._costs: Costs | None = None
        self._drift = 1.0
        self._last_answer = 0.0
        self._unanswered = 0
        self._has_served = False
        self._writer: asyncio.StreamWriter | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._supervisor: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to start the engine; returns at once."""
        self._supervisor = asyncio.create_task(self._supervise())

    async def stop(self) -> None:
        """Close the pipe; the engine leaves with it."""
        if self._supervisor is not None:
            self._supervisor.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._supervisor

    @property
    def is_busy(self) -> bool:
        """Whether somebody waits for a picture."""
        return bool(self._pending)

    @property
    def is_ready(self) -> bool:
        """Whether a request now would be served: the engine answered a moment ago, and we are not draining."""
        return self.ready is not None and not self.draining and time.monotonic() - self._last_answer < FRESH_S + PING_S

    async def run(self, jobs: Sequence[Job], who: str) -> list[messages.Done]:
        """Draw one request's jobs, all with one deadline. Cancelling this call takes its jobs out of the engine.
        who: the request's fingerprint, for its Retry-After. Raises the Problem that describes what went wrong."""
        self._admit(jobs, who)
        loop = asyncio.get_running_loop()
        answers = []
        for job in jobs:
            answer: asyncio.Future[messages.Done] = loop.create_future()
            self._pending[job.id] = Pending(_row(job), answer)
            answers.append(answer)
        self._send(messages.Submit(list(jobs)))
        try:
            async with asyncio.timeout(max(0.0, jobs[0].deadline - time.monotonic()) + GRACE_S):
                return await asyncio.gather(*answers)
        except TimeoutError:
            raise expired() from None
        finally:
            left = [job.id for job in jobs if self._pending.pop(job.id, None) is not None]
            if left:
                self._send(messages.Cancel(left))

    def new_id(self) -> int:
        """An id that no other job of this server has."""
        self._next_id += 1
        return self._next_id

    def require_ready(self) -> messages.Ready:
        """What the engine said when it became ready. Raises NotReady."""
        if self.draining:
            raise NotReady("the server is shutting down; ask another instance", retry_after=5)
        if self.ready is None:
            raise NotReady("the engine is starting; ask again", retry_after=5)
        return self.ready

    def gauge(self) -> None:
        """Bring the gauges up to date, before a scrape."""
        waiting = sum(not pending.has_begun for pending in self._pending.values())
        self.metrics.waiting.set(waiting)
        self.metrics.running.set(len(self._pending) - waiting)
        self.metrics.ready.set(self.is_ready)
        if self.report is not None:
            for variant in self.report.variants:
                self.metrics.resident.labels(variant.name).set(variant.resident_bytes)
            self.metrics.device_bytes.set(self.report.device_bytes)
            self.metrics.switches.set(self.report.switches)
        if self._costs is not None:
            for batch, seconds in self._costs.step.items():
                self.metrics.step_cost.labels(str(batch)).set(seconds)

    def _admit(self, jobs: Sequence[Job], who: str) -> None:
        self.require_ready()
        assert self._costs is not None
        rows, now = [_row(job) for job in jobs], time.monotonic()
        if (needed := self._costs.alone(rows[0])) > rows[0].deadline - now:
            raise InvalidRequest(f"this machine needs {needed:.2f} s for this request at the least", "timeout")
        pending = [pending.row for pending in self._pending.values()]
        refusal = self._door.ask(rows, pending, self._costs.scaled(self._drift), now, who)
        if refusal is not None:
            detail = f"{refusal.reason}; ask again in {refusal.retry_after} s"
            raise Overloaded(detail, retry_after=refusal.retry_after)

    def _send(self, message: messages.ToEngine) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(messages.frame(message))

    async def _supervise(self) -> None:
        deaths = 0
        while True:
            started = time.monotonic()
            try:
                await self._live()
            except asyncio.IncompleteReadError:
                log.debug("the engine's pipe ended")
            except Exception:
                log.exception("the engine or its pipe failed")
            finally:
                await self._bury()
            if self.fatal is not None:
                return
            deaths = 1 if time.monotonic() - started > SETTLED_S else deaths + 1
            pause = BACK_OFF_S[min(deaths - 1, len(BACK_OFF_S) - 1)]
            self.metrics.restarts.inc()
            log.error("the engine died; starting it again in %.0f s", pause)
            await asyncio.sleep(pause)

    async def _live(self) -> None:
        """One life of the engine, from its start to the end of its pipe."""
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "app.engine.worker", str(theirs.fileno())),
                msgspec.json.encode(self.config).decode(),
                pass_fds=[theirs.fileno()],
                env={**QUIET, **allocator(), **os.environ},
                start_new_session=True,  # a Ctrl-C in the terminal is for us to act on
            )
        reader, self._writer = await asyncio.open_connection(sock=ours)
        pinging = asyncio.create_task(self._ping())
        try:
            while True:
                self._receive(await messages.read(reader))
        finally:
            pinging.cancel()

    async def _ping(self) -> None:
        while True:
            await asyncio.sleep(PING_S)
            if self.ready is None:
                continue
            self._send(messages.Ping())
            self._unanswered += 1  # counted, not timed: where the whole machine paused, nobody hung
            if self._unanswered * PING_S > HUNG_S and self._process is not None:
                log.error("the engine has not answered for %.0f s; killing it", HUNG_S)
                self._process.kill()

    async def _bury(self) -> None:
        """The engine has gone, or must: nobody may wait for it any longer."""
        self.ready = None
        if self.report is not None:  # what it held has gone with it
            gone = [msgspec.structs.replace(row, state="on disk", resident_bytes=0) for row in self.report.variants]
            self.report = messages.Report(gone, 0, 0, False)
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        for pending in self._pending.values():
            if not pending.answer.done():
                pending.answer.set_exception(EngineDied("the engine ended while it held this request", retry_after=5))
        self._pending.clear()
        if self._process is not None:
            try:
                async with asyncio.timeout(2):
                    await self._process.wait()
            except TimeoutError:
                self._process.kill()
                await self._process.wait()

    def _receive(self, message: messages.FromEngine) -> None:
        match message:
            case messages.Ready():
                self.ready, self._costs, self.report = message, message.costs, message.report
                self._has_served = True
                self._drift, self._last_answer, self._unanswered = 1.0, time.monotonic(), 0
                log.info("ready: %s on %s in %s", message.family, message.device, message.dtype)
            case messages.Measured(costs):
                self._costs, self._drift = costs, 1.0
            case messages.Report():
                self.report, self._last_answer, self._unanswered = message, time.monotonic(), 0
            case messages.Worked():
                self._count(message)
            case messages.Done(id):
                self._settle(id, message)
            case messages.Failed(id, code, detail):
                if code not in ("expired", "loading"):
                    log.error("job %d failed: %s %s", id, code, detail)
                self._settle(id, from_engine(code, detail))
            case messages.Fatal(reason):
                log.error("the engine cannot start: %s", reason)
                if not self._has_served:
                    self.fatal = reason

    def _settle(self, id: int, outcome: messages.Done | Problem) -> None:
        pending = self._pending.pop(id, None)
        if pending is None or pending.answer.done():
            return  # its client has left
        if isinstance(outcome, Problem):
            pending.answer.set_exception(outcome)
        else:
            self.metrics.images.labels(pending.row.variant).inc()
            self.metrics.queue.observe(outcome.seconds.get("queue", 0.0))
            pending.answer.set_result(outcome)

    def _count(self, worked: messages.Worked) -> None:
        if worked.stage != "denoise":
            {"encode": self.metrics.encode, "decode": self.metrics.decode}[worked.stage].observe(worked.seconds)
            return
        self.metrics.denoise.observe(worked.seconds)
        self.metrics.batch.labels(worked.variant).observe(len(worked.ids))
        for id in worked.ids:
            if (pending := self._pending.get(id)) is not None:
                pending.has_begun = True
                pending.row = replace(pending.row, steps_left=pending.row.steps_left - 1)
        if self._costs is not None:
            expected = self._costs.step_seconds(len(worked.ids), worked.pixels)
            # A slow average: the machine may be busier than at warm-up, and the prices must stay true.
            self._drift = min(10.0, max(0.5, 0.98 * self._drift + 0.02 * worked.seconds / expected))


def _row(job: Job) -> Row:
    return Row(job.id, job.variant, job.height, job.width, job.deadline, job.steps)
