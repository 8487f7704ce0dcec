"""One engine process: started, asked whether it is alive, killed when it hangs, and started again when it dies."""

import asyncio
import contextlib
import logging
import math
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import msgspec

from app.engine import wire
from app.engine.costs import Costs
from app.engine.flight import Flight
from app.engine.jobs import Row
from app.engine.messages import (
    EngineConfig,
    Fatal,
    FromEngine,
    Held,
    Loaded,
    Measured,
    Ping,
    Ready,
    Report,
    Starting,
    ToEngine,
    Worked,
)
from app.engine.placement import EngineLoad
from app.logs import STDERR
from models.catalog import Weights

log = logging.getLogger("app.engine")

PING_S = 1.0  # between two pings
HUNG_S = 20.0  # without an answer for this long, starting or serving, the engine is killed and started again
FRESH_S = 3.0  # readiness wants an answer not older than this
BACK_OFF_S = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)  # before the next start, by deaths in a row
SETTLED_S = 60.0  # an engine that lived this long starts again at once
STILLBORN = 3  # deaths in a row of an engine that never served: it never will
MOST_DEATHS, DEATHS_S = 5, 60.0  # so many deaths within so many seconds end the server, too
QUIET = {"TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
SAFE = {"PYTHONSAFEPATH": "1"}  # nothing is imported from the working directory, by the engine and what it starts
SPARE = 8  # descriptors kept back: whatever took all others, an engine can be started
LEARN = 0.02  # of a call's drift from its measured cost is learned at once

# glibc gives large blocks back to the kernel at once, and takes them again for the next layer: a fifth of a decode.
KEEP_MEMORY = (
    "glibc.malloc.mmap_threshold=268435456:glibc.malloc.trim_threshold=536870912:glibc.malloc.top_pad=67108864"
)


def allocator() -> dict[str, str]:
    """Environment of an engine that reuses its memory. Not tcmalloc: with that preloaded, OpenVINO 2026.4 frees what it
    did not allocate, and the process aborts at its first graph."""
    return {"GLIBC_TUNABLES": KEEP_MEMORY}


class Spare:
    """Descriptors that nobody else can take."""

    def __init__(self) -> None:
        self._held: list[int] = []

    @contextlib.contextmanager
    def lent(self) -> Iterator[None]:
        """They are free for what is opened meanwhile; then as many as can be had are taken again."""
        while self._held:
            os.close(self._held.pop())
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                while len(self._held) < SPARE:
                    self._held.append(os.open(os.devnull, os.O_RDONLY))


def visible(config: EngineConfig) -> dict[str, str]:
    """Environment of an engine that sees one GPU, by the number that nvidia-smi shows or by its UUID."""
    return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": config.gpu} if config.gpu is not None else {}


class EngineProcess:
    """name: among several. ready, report, costs: what the engine said last; ready is None while it does not serve.
    fatal: why it is not started any more. hear: takes its messages. died: is called at each death, with the ids of the
    pictures that it was working on."""

    def __init__(
        self, config: EngineConfig, hear: Callable[[FromEngine], None], died: Callable[[set[int]], None]
    ) -> None:
        self.config, self._hear, self._died = config, hear, died
        self.name = config.name or "0"
        self.ready: Ready | None = None
        self.report: Report | None = None
        self.costs: Costs | None = None
        self.fatal: str | None = None
        self._spare = Spare()
        self._drift = 1.0
        self._in_use: Weights | None = None
        self._style = 0.0  # seconds to make a weight set with styles, the least so far
        self._flight = Flight()
        self._last_answer = 0.0
        self._unanswered = 0
        self._pings = 0
        self._has_served = False
        self._writer: asyncio.StreamWriter | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._supervisor: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to start the engine; returns at once."""
        self._supervisor = asyncio.create_task(self._supervise())

    async def stop(self) -> None:
        """Close the pipe; the engine leaves with it."""
        if self._supervisor is not None:
            self._supervisor.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._supervisor

    def send(self, message: ToEngine) -> None:
        """Put a message on the wire; never blocks. It is lost where the engine has gone: its jobs have failed then."""
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(wire.frame(message))

    @property
    def is_answering(self) -> bool:
        """Whether the engine serves, and answered a moment ago."""
        return self.ready is not None and time.monotonic() - self._last_answer < FRESH_S + PING_S

    def load(self, rows: Sequence[Row]) -> EngineLoad:
        """These rows at what they take here: as the engine measured at its start, and as that drifted since, for the
        machine may be busier now. For one that has been ready."""
        assert self.costs is not None
        assert self.report is not None
        switch = {each.weights: each.seconds for each in self.report.held}
        if self._in_use in switch:
            switch[self._in_use] = 0.0
        costs = msgspec.structs.replace(self.costs.scaled(self._drift), style=self._style, held=frozenset(switch))
        return EngineLoad(rows, costs, switch, self.report.load)

    async def _supervise(self) -> None:
        in_row, deaths = 0, list[float]()
        while True:
            started = time.monotonic()
            try:
                await self._live()
            except (asyncio.IncompleteReadError, ConnectionError):
                log.debug("the engine's pipe ended")
            except Exception:
                log.exception("the engine or its pipe failed")
            finally:
                await self._bury()
            if self.fatal is not None:
                return
            now = time.monotonic()
            in_row = 1 if now - started > SETTLED_S else in_row + 1
            if self._process is not None:  # else nothing could be started, for now: the machine's fault
                deaths = [*(death for death in deaths if now - death < DEATHS_S), now]
            if len(deaths) >= (MOST_DEATHS if self._has_served else STILLBORN):
                self._give_up(f"the engine died {len(deaths)} times within {now - deaths[0]:.0f} s, {self._end}")
                return
            pause = BACK_OFF_S[min(in_row - 1, len(BACK_OFF_S) - 1)]
            log.error("the engine died, %s; starting it again in %.0f s", self._end, pause, extra=self._whose)
            await asyncio.sleep(pause)

    def _give_up(self, reason: str) -> None:
        self.fatal = reason
        self._hear(Fatal(reason))

    @property
    def _whose(self) -> dict[str, dict[str, str]]:
        return {"fields": {} if self.config.name is None else {"device": self.config.name}}

    @property
    def _end(self) -> str:
        code = self._process.returncode if self._process is not None else None
        if code is None:
            return "before it was started"
        return f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"

    async def _live(self) -> None:
        """One life of the engine, from its start to the end of its pipe."""
        self._process, self._unanswered, self._pings = None, 0, 0
        self._flight.write([])
        with self._spare.lent():
            ours, theirs = socket.socketpair()
            with theirs:
                self._process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-m", "app.engine.worker", str(theirs.fileno()), str(self._flight.descriptor)),
                    msgspec.json.encode(self.config).decode(),
                    pass_fds=[theirs.fileno(), self._flight.descriptor],
                    env={**QUIET, **allocator(), **os.environ, **visible(self.config), **SAFE},
                    start_new_session=True,  # a Ctrl-C in the terminal is for us to act on
                )
            reader, self._writer = await asyncio.open_connection(sock=ours)
        pinging = asyncio.create_task(self._ping())
        try:
            while True:
                self._receive(await wire.read(reader))
        finally:
            pinging.cancel()

    async def _ping(self) -> None:
        while True:
            await asyncio.sleep(PING_S)
            self.send(Ping())
            self._pings += 1  # counted, not timed: where the whole machine paused, nobody hung
            self._unanswered += 1
            if self._process is None:
                continue
            if self._unanswered * PING_S > HUNG_S:
                log.error("the engine has not answered for %.0f s; killing it", HUNG_S, extra=self._whose)
                self._process.kill()
            elif self.ready is None and self._pings * PING_S > (limit := self.config.start_timeout):
                log.error("the engine is not ready after %.0f s, START_TIMEOUT_S; killing it", limit, extra=self._whose)
                self._process.kill()

    async def _bury(self) -> None:
        """The engine has gone, or must: nobody may wait for it any longer."""
        self.ready = None
        if self.report is not None:  # what it held has gone with it
            gone = [msgspec.structs.replace(row, state="on disk", resident_bytes=0) for row in self.report.variants]
            self.report = Report(gone, None, 0, False)
            self._in_use = None
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        self._died(self._flight.read())
        if self._process is not None:
            try:
                async with asyncio.timeout(2):
                    await self._process.wait()
            except TimeoutError:
                self._process.kill()
                await self._process.wait()

    def _receive(self, message: FromEngine) -> None:
        match message:
            case Starting():
                self._unanswered = 0
            case Ready():
                self.ready, self.costs, self.report = message, message.costs, message.report
                self._has_served = True
                self._drift, self._last_answer, self._unanswered = 1.0, time.monotonic(), 0
                what = (message.family, message.device, message.dtype)
                log.info("ready: %s on %s in %s", *what, extra=self._whose)
                self._hear(message)
            case Measured(costs):
                self.costs, self._drift = costs, 1.0
            case Report():
                self.report, self._last_answer, self._unanswered = message, time.monotonic(), 0
                STDERR.count_dropped(message.log_lines_dropped)
            case Loaded():
                self._note_load(message)
                self._hear(message)
            case Fatal(reason):
                if self._has_served:
                    log.error("the engine cannot start: %s", reason, extra=self._whose)
                else:
                    self._give_up(f"the engine cannot start: {reason}")
            case _:
                if isinstance(message, Worked) and message.stage == "denoise" and self.costs is not None:
                    times = message.seconds / self.costs.step_seconds(message.rows, message.pixels)
                    self._drift = min(10.0, max(0.5, (1 - LEARN) * self._drift + LEARN * times))
                    self._in_use = message.weights
                self._hear(message)

    def _note_load(self, loaded: Loaded) -> None:
        """What the engine holds from now on: the next report says the same, up to a second later."""
        if loaded.weights.is_styled:
            self._style = min(loaded.seconds, self._style or math.inf)
        if self.report is not None:
            gone = {loaded.weights, *loaded.left}
            held = [*(each for each in self.report.held if each.weights not in gone), Held(loaded.weights, 0.0)]
            self.report = msgspec.structs.replace(self.report, held=held)
