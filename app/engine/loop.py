"""The engine's loop: what is on the board, and in worker threads one call on the device after another.

A worker that ends a call takes in what has arrived, plans, and makes the next call itself: no thread waits for another
to tell it what to do. The board is changed under one lock; tensors are worked on without it.
"""

import gc
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from app.engine import work
from app.engine.calls import Call, Running, ids_in, make
from app.engine.costs import Costs
from app.engine.jobs import age
from app.engine.loading import Loading
from app.engine.messages import (
    Cancel,
    Failed,
    FromEngine,
    Measured,
    Ping,
    Report,
    Submit,
    ToEngine,
    Worked,
)
from app.engine.scheduler import Workers, may_change, plan
from app.logs import STDERR, leave
from models.catalog import Weights
from models.pipeline import Pipeline
from models.prompts import Conditioning
from models.registry import Registry

log = logging.getLogger(__name__)
CHANGE_S = 300.0  # a change that takes longer has hung: a recording on a GPU may take many seconds
MANY = 1 << 30

Message = ToEngine | Callable[[], None]


class Loop:
    """Owns the device.

    send: puts a message on the wire; may be called from any thread. workers: calls at a time, each on torch's number of
    threads. On a GPU one worker steps while another decodes; on a CPU each does whatever is next, for two calls of one
    thread each waste less than one call of two (docs/decisions.md).
    """

    def __init__(
        self, pipeline: Pipeline, registry: Registry, costs: Costs, send: Callable[[FromEngine], None], workers: int = 2
    ) -> None:
        self.pipeline, self.registry, self.costs, self.send, self.workers = pipeline, registry, costs, send, workers
        self.note: Callable[[Sequence[int]], None] = lambda ids: None  # of all pictures that are in calls
        self.board: dict[int, Running] = {}
        self.compiled = False
        self._inbox: deque[Message] = deque()
        self._loading = Loading(registry, self.post, send, self._fail_weights)
        self._flying: list[Call] = []
        self._retries: list[Call] = []
        self._when_idle: deque[Call] = deque()
        self._changed = time.monotonic()  # when the last change was made
        self._lock = threading.Condition()
        self._stopped = False
        self._caps = {"denoise": MANY, "decode": MANY}  # rows of a call that fit into memory, as learned
        self._threads = torch.get_num_threads()  # of a worker; torch counts them per thread

    def post(self, message: Message) -> None:
        """Give the loop a message, or a change to make under its lock. From any thread."""
        with self._lock:
            if isinstance(message, Ping):
                self._take(message)  # now: every worker may be in a call of many seconds
            else:
                self._inbox.append(message)
                self._lock.notify()

    def run(self) -> None:
        """Serve until stop(). This thread becomes a worker, too."""
        gc.collect()
        gc.freeze()  # a collection need not walk through torch and the model: it would stop every worker for 0.1 s
        others = [
            threading.Thread(target=self.serve, daemon=True, name=f"worker {number}")
            for number in range(1, self.workers)
        ]
        for thread in others:
            thread.start()
        self.serve()
        for thread in others:
            thread.join()
        self._loading.join()
        gc.unfreeze()

    def stop(self) -> None:
        """Let every worker leave behind its call. From any thread."""
        with self._lock:
            self._stopped = True
            self._lock.notify_all()

    def serve(self) -> None:
        """Be a worker, until stop()."""
        torch.set_num_threads(self._threads)
        self.pipeline.device.join_steps()
        try:
            with self._lock:
                while not self._stopped:
                    call = self._next_call()
                    if call is None:
                        # For the deadlines of what cannot start yet, and for a change whose turn comes.
                        self._lock.wait(0.1 if self.board or self._when_idle else None)
                        continue
                    if self._inbox or any(not row.busy for row in self.board.values()):
                        self._lock.notify()  # there may be something for another worker, too
                    self._lock.release()
                    try:
                        result, seconds = make(call, self.pipeline.device)
                    finally:
                        self._lock.acquire()
                    self._settle(call, result, seconds)
        except BaseException:
            log.critical("a worker failed; the engine ends", exc_info=True)
            leave(70)  # never alive and mute: the other process starts a new engine

    def when_idle(self, change: Callable[[], None]) -> None:
        """Make a change that no call may overlap, in a worker. Under the lock: post it, or say it before run()."""
        self._when_idle.append(Call("change", [], lambda rows: change(), lambda *settled: None))

    def report(self) -> Report:
        """The answer to a Ping."""
        return Report(
            self._loading.variants(),
            self.pipeline.device.memory_used(),
            self.registry.switches,
            self.compiled,
            self._loading.held(),
            self.registry.load_seconds,
            STDERR.take_dropped(),
        )

    def replace_costs(self, costs: Costs) -> None:
        """Plan by a new table from now on, without what was learned not to fit, and tell the other side."""
        self.costs = costs.capped(self._caps["denoise"], self._caps["decode"])
        self.send(Measured(self.costs))

    def _take(self, message: Message) -> None:
        match message:
            case Submit(jobs, source):
                now = time.monotonic()
                self.board.update({job.id: Running(job, now, source) for job in jobs})
            case Cancel(ids):
                for id in ids:
                    self.board.pop(id, None)
            case Ping():
                now = time.monotonic()
                if not any(now - call.start > self._patience(call) for call in self._flying):
                    self.send(self.report())  # else the other process ends this one
            case _:
                message()

    def _patience(self, call: Call) -> float:
        if not call.rows:
            return CHANGE_S
        return self.costs.patience(call.stage, len(call.rows), call.rows[0].row.pixels)

    def _next_call(self) -> Call | None:
        """What this worker does next, or None."""
        while self._inbox:
            self._take(self._inbox.popleft())
        if any(not call.rows for call in self._flying):
            return None  # a change, that no call may overlap
        now = time.monotonic()
        # A change never comes before a retry, whose weights it may change.
        if self._when_idle and not self._retries and may_change(now, self._changed, bool(self.board)):
            return None if self._flying else self._start(replace(self._when_idle.popleft(), start=now))
        workers, flying = self._workers(), [call.stage for call in self._flying]
        for retry in self._retries:
            if workers.room(retry.stage, flying) > 0:
                self._retries.remove(retry)
                return self._start(replace(retry, start=now))  # what it waited is not the call's
        todo = plan([row.row for row in self._resident_rows(now)], self.costs, now, workers, flying)
        for late in todo.refuse:
            self._fail(late.id, "EXPIRED")
        encode, decode, step = ([self.board[row.id] for row in each] for each in (todo.encode, todo.decode, todo.step))
        try:
            if encode:
                return self._start_encode(encode)
            if decode:
                return self._start(Call("decode", decode, partial(work.decode, self.pipeline), self._decoded))
            return self._start_step(step) if step else None
        except KeyError:
            return None  # weights were evicted since the plan was made: the rows stay, and they are loaded again

    def _workers(self) -> Workers:
        device = self.pipeline.device
        # A module steps with one variant's weights in it; code that is bound to weights steps in every worker.
        steps = device.steps_at_a_time or (1 if self.registry.bind is None else self.workers)
        return Workers(self.workers, steps, device.decodes_at_a_time or self.workers)

    def _resident_rows(self, now: float) -> list[Running]:
        """The rows that no call has and whose weights are here. Those of the others are loaded; a row that cannot wait
        for them any longer is told so."""
        here, missing = [], []
        for running in [running for running in self.board.values() if not running.busy]:
            if self.registry.is_resident(running.job.weights):
                here.append(running)
            elif now > running.job.deadline:
                self._fail(running.job.id, "LOADING", running.job.weights.variant)
            else:
                missing.append(running.job.weights)
        if missing:
            by_age = sorted(self.board.values(), key=lambda each: age(each.job))
            self._loading.ask(set(missing), list(dict.fromkeys(each.job.weights for each in by_age)))
        return here

    def _start(self, call: Call) -> Call:
        for row in call.rows:
            row.busy = True
        self._flying.append(call)
        self.note(ids_in(self._flying))
        return call

    def _start_encode(self, rows: list[Running]) -> Call:
        factors = {row.job.weights: self.registry.text_factors(row.job.weights) for row in rows}
        return self._start(Call("encode", rows, partial(work.encode, self.pipeline, factors), self._encoded))

    def _start_step(self, rows: list[Running]) -> Call:
        unet = self.registry.use(rows[0].job.weights)
        step = partial(work.denoise, self.pipeline, self.registry, unet, self.send)
        return self._start(Call("denoise", rows, step, self._stepped))

    def _settle(self, call: Call, result: Any, seconds: float) -> None:
        self._flying.remove(call)
        self.note(ids_in(self._flying))
        for row in call.rows:
            row.busy = False
        if not call.rows:
            if isinstance(result, Exception):
                raise result  # who knows what is half changed
            self._changed = time.monotonic()
            return
        if isinstance(result, Exception) and self.pipeline.device.is_out_of_memory(result):
            self._shrink(call, result)
        elif isinstance(result, Exception):
            self._isolate(call, result)
        else:
            job = call.rows[0].job
            worked = Worked(call.stage, job.weights, ids_in([call]), call.count, seconds, job.height * job.width)
            call.settle(call.rows, result, call.start, seconds)
            self.send(worked)

    def _is_here(self, row: Running) -> bool:
        """Whether the client of a row still waits for it."""
        return self.board.get(row.job.id) is row

    def _encoded(self, rows: list[Running], found: list[Conditioning], start: float, seconds: float) -> None:
        for running, conditioning in zip(rows, found, strict=True):
            running.conditioning = conditioning
            running.spent("encode", start, seconds, len(rows))

    def _stepped(self, rows: list[Running], stepped: Tensor, start: float, seconds: float) -> None:
        count = sum(running.row.count for running in rows)
        for running, latents in zip(rows, stepped, strict=True):
            if running.step == 0:
                running.spent("queue", running.arrived, start - running.arrived - running.seconds.get("encode", 0.0))
            running.latents, running.step = latents, running.step + 1
            running.spent("denoise", start, seconds, count)
            running.batches.append(count)

    def _decoded(
        self, rows: list[Running], drawn: tuple[list[bytes], list[bool]], start: float, seconds: float
    ) -> None:
        for running, pixels, is_valid in zip(rows, *drawn, strict=True):
            job = running.job
            running.spent("decode", start, seconds, len(rows))
            if not self._is_here(running):
                continue
            if not is_valid:
                self._fail(job.id, "NUMERIC_FAULT", f"{job.weights.variant} made a blank or undefined picture")
                continue
            del self.board[job.id]
            self.send(running.done(pixels))

    def _isolate(self, call: Call, error: Exception) -> None:
        """Find the row that fails by halving: it fails alone, its neighbours go on."""
        if len(call.rows) == 1:
            log.error("a %s failed", call.stage, exc_info=error)
            self._fail(call.rows[0].job.id, "FAILED", type(error).__name__)
            return
        rows = [row for row in call.rows if self._is_here(row)]
        for half in (rows[: len(rows) // 2], rows[len(rows) // 2 :]):
            if half:
                self._retries.append(Call(call.stage, half, call.work, call.settle))
                for row in half:
                    row.busy = True

    def _shrink(self, call: Call, error: Exception) -> None:
        """Out of memory: nothing is lost, the rows stay on the board and the batch is smaller from now on."""
        self.pipeline.device.release_memory()
        if len(call.rows) == 1:
            self._fail(call.rows[0].job.id, "OUT_OF_MEMORY")
        elif call.stage in self._caps:
            self._caps[call.stage] = min(self._caps[call.stage], call.count // 2)
            self.replace_costs(self.costs)
        else:
            self._isolate(call, error)

    def _fail(self, id: int, cause: str, detail: str = "") -> None:
        if self.board.pop(id, None) is not None:
            self.send(Failed(id, cause, detail))

    def _fail_weights(self, weights: Weights, cause: str, reason: str) -> None:
        for running in [running for running in self.board.values() if running.job.weights == weights]:
            self._fail(running.job.id, cause, reason)
