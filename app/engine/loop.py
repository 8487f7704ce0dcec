"""The engine's loop: what is running, what is waiting, and in lanes, threads of the device, one call after another.

A lane that ends a call takes in what has arrived, plans, and makes the next call itself: no thread waits for another to
tell it what to do. The board is changed under one lock; tensors are worked on without it.
"""

import gc
import os
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from app.engine import work
from app.engine.calls import Call, Running, make
from app.engine.costs import Costs
from app.engine.messages import (
    Cancel,
    Done,
    Failed,
    FromEngine,
    Measured,
    Ping,
    Report,
    Submit,
    ToEngine,
    VariantReport,
    Worked,
)
from app.engine.scheduler import plan
from models.catalog import Weights
from models.pipeline import Conditioning, Pipeline
from models.registry import Registry

CHUNKS_BEHIND = 2  # a GPU's steps wait where more finished rows than so many decodes take wait for the decoder
STUCK_S = 10.0  # a call that takes longer is not one: pings go unanswered, and the other process ends this one
CHANGE_S = 300.0  # the same of a change: a recording on a GPU may take many seconds
PAUSE_S, IDLE_S = 2.0, 0.5  # before each change: of service where somebody waits, of quiet where nobody does
MANY = 1 << 30


class Loop:
    """Owns the device.

    send: puts a message on the wire; may be called from any thread. lanes: calls at a time, each on torch's number of
    threads. On a GPU one lane steps while another decodes; on a CPU every lane does whatever is next, for two calls of
    one thread each waste less than one call of two (docs/decisions.md).
    """

    def __init__(
        self, pipeline: Pipeline, registry: Registry, costs: Costs, send: Callable[[FromEngine], None], lanes: int = 2
    ) -> None:
        self.pipeline, self.registry, self.costs, self.send, self.lanes = pipeline, registry, costs, send, lanes
        self.board: dict[int, Running] = {}
        self.compiled = False
        self._inbox: deque[ToEngine | Callable[[], None]] = deque()
        self._loading: set[str] = set()
        self._flying: list[Call] = []
        self._retries: list[Call] = []
        self._when_idle: deque[Call] = deque()
        self._changed = time.monotonic()  # when the last change was made
        self._lock = threading.Condition()
        self._caps = {"denoise": MANY, "decode": MANY}  # rows of a call that fit into memory, as learned
        self._threads = torch.get_num_threads()  # of a lane; torch counts them per thread

    def post(self, message: ToEngine | Callable[[], None]) -> None:
        """Give the loop a message, or a change to make under its lock. From any thread."""
        with self._lock:
            self._inbox.append(message)
            self._lock.notify()

    def run(self) -> None:
        """Serve until the process ends. This thread becomes a lane, too."""
        gc.collect()
        gc.freeze()  # a collection need not walk through torch and the model: that stops every lane for 0.1 s and more
        for number in range(1, self.lanes):
            threading.Thread(target=self.serve, daemon=True, name=f"lane {number}").start()
        self.serve()

    def serve(self) -> None:
        """Be a lane."""
        torch.set_num_threads(self._threads)
        self.pipeline.device.join_steps()
        try:
            with self._lock:
                while True:
                    call = self._next_call()
                    if call is None:
                        # For the deadlines of what cannot start yet, and for a change whose turn comes.
                        self._lock.wait(0.1 if self.board or self._when_idle else None)
                        continue
                    if self._inbox or any(not row.busy for row in self.board.values()):
                        self._lock.notify()  # there may be something for another lane, too
                    self._lock.release()
                    try:
                        result, seconds = make(call, self.pipeline.device)
                    finally:
                        self._lock.acquire()
                    self._land(call, result, seconds)
        except BaseException:
            traceback.print_exc()
            os._exit(70)  # never alive and mute: the other process starts a new engine

    def when_idle(self, change: Callable[[], None]) -> None:
        """Make a change that no call may overlap, in a lane. Under the lock: post it, or say it before run()."""
        self._when_idle.append(Call("change", [], lambda rows: change(), lambda *landed: None))

    def report(self) -> Report:
        """The answer to a Ping."""
        variants = self.registry.store.family.variants
        return Report(
            [
                VariantReport(row.name, variants[row.name].steps, row.state, row.resident_bytes, row.reason or "")
                for row in self.registry.status()
            ],
            self.pipeline.device.memory_used() or 0,
            self.registry.switches,
            self.compiled,
        )

    def replace_costs(self, costs: Costs) -> None:
        """Plan by a new table from now on, without what was learned not to fit, and tell the other side."""
        self.costs = costs.capped(self._caps["denoise"], self._caps["decode"])
        self.send(Measured(self.costs))

    def _take(self, message: ToEngine | Callable[[], None]) -> None:
        match message:
            case Submit(jobs):
                now = time.monotonic()
                self.board.update({job.id: Running(job, now) for job in jobs})
            case Cancel(ids):
                for id in ids:
                    self.board.pop(id, None)
            case Ping():
                now = time.monotonic()
                if all(now - call.start < (STUCK_S if call.rows else CHANGE_S) for call in self._flying):
                    self.send(self.report())
            case _:
                message()

    def _next_call(self) -> Call | None:
        """What this lane does next, or None."""
        while self._inbox:
            self._take(self._inbox.popleft())
        if any(not call.rows for call in self._flying):
            return None  # a change, that no call may overlap
        now = time.monotonic()
        if self._may_change(now):
            return None if self._flying else self._start(replace(self._when_idle.popleft(), start=now))
        self._tend_loading(now)
        retry = next((call for call in self._retries if self._room(call.stage) > 0), None)
        if retry is not None:
            self._retries.remove(retry)
            return self._start(replace(retry, start=now))  # what it waited is not the call's
        idle = [
            row for row in self.board.values() if not row.busy and self.registry.is_resident(Weights(row.job.variant))
        ]
        new = [row for row in idle if row.conditioning is None]
        if new and self._room("encode") > 0:  # all together: a call costs more than a prompt
            return self._start(Call("encode", new, partial(work.encode, self.pipeline), self._encoded))
        room = 0 if self._decoder_is_behind(idle) else self._room("denoise")
        todo = plan([row.row for row in idle if row.conditioning is not None], self.costs, now, room)
        for late in todo.refuse:
            self._fail(late.id, "expired")
        if todo.decode and self._room("decode") > 0:
            first = todo.decode[0]
            alike = [row for row in todo.decode if (row.height, row.width) == (first.height, first.width)]
            rows = [self.board[row.id] for row in alike[: self.costs.best_decode_batch]]
            return self._start(Call("decode", rows, partial(work.decode, self.pipeline), self._decoded))
        if todo.step:
            return self._start_step([self.board[row.id] for row in todo.step])
        return None

    def _may_change(self, now: float) -> bool:
        """Whether it is a change's turn. Not before a retry, whose weights it may change."""
        turn = now - self._changed > (PAUSE_S if self.board else IDLE_S)
        return bool(self._when_idle) and not self._retries and turn

    def _room(self, stage: str) -> int:
        """How many more calls of a stage may start now."""
        flying = Counter(call.stage for call in self._flying)
        if self.pipeline.device.steps_at_a_time is not None:  # each of the two streams takes one call at a time
            return 1 - (flying["decode"] if stage == "decode" else flying["encode"] + flying["denoise"])
        free = self.lanes - len(self._flying)
        if stage == "encode" or (stage == "denoise" and not self.compiled):
            return min(free, 1 - flying[stage])  # one prompt cache; one module, with one variant's weights in it
        return free

    def _decoder_is_behind(self, idle: list[Running]) -> bool:
        """Whether the steps of a GPU, which go first there, must wait so that finished rows need not for ever."""
        finished = sum(row.step == row.job.steps for row in idle)
        return (
            self.pipeline.device.decodes_at_a_time is not None
            and finished > CHUNKS_BEHIND * self.costs.best_decode_batch
        )

    def _start(self, call: Call) -> Call:
        for row in call.rows:
            row.busy = True
        self._flying.append(call)
        return call

    def _land(self, call: Call, result: Any, seconds: float) -> None:
        self._flying.remove(call)
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
            call.land(call.rows, result, call.start, seconds)
            job = call.rows[0].job
            ids = [row.job.id for row in call.rows]
            self.send(Worked(call.stage, job.variant, ids, seconds, job.height * job.width))

    def _is_here(self, row: Running) -> bool:
        """Whether the client of a row still waits for it."""
        return self.board.get(row.job.id) is row

    def _encoded(self, rows: list[Running], found: list[Conditioning], start: float, seconds: float) -> None:
        for running, conditioning in zip(rows, found, strict=True):
            running.conditioning = conditioning
            running.spent("encode", seconds)

    def _start_step(self, rows: list[Running]) -> Call | None:
        job = rows[0].job
        try:
            unet = self.registry.use(Weights(job.variant))
        except KeyError:
            return None  # evicted since the plan was made: the rows stay, and it is loaded again
        step = partial(work.denoise, self.pipeline, unet, self.registry.schedule(job.variant, job.steps))
        return self._start(Call("denoise", rows, step, self._stepped))

    def _stepped(self, rows: list[Running], stepped: Tensor, start: float, seconds: float) -> None:
        for running, latents in zip(rows, stepped, strict=True):
            if running.step == 0:
                running.spent("queue", start - running.arrived - running.seconds.get("encode", 0.0))
            running.latents, running.step = latents, running.step + 1
            running.spent("denoise", seconds)
            running.batches.append(len(rows))

    def _decoded(
        self, rows: list[Running], drawn: tuple[list[bytes], list[bool]], start: float, seconds: float
    ) -> None:
        for running, picture, is_sound in zip(rows, *drawn, strict=True):
            running.spent("decode", seconds)
            if self._is_here(running):
                self._send_picture(running, picture, is_sound)

    def _send_picture(self, running: Running, picture: bytes, is_sound: bool) -> None:
        job = running.job
        if not is_sound:
            self._fail(job.id, "numeric_fault", f"{job.variant} made a blank or undefined picture")
            return
        del self.board[job.id]
        truncated = running.conditioning is not None and running.conditioning.truncated
        self.send(Done(job.id, job.height, job.width, picture, False, running.seconds, running.batches, truncated))

    def _isolate(self, call: Call, error: Exception) -> None:
        """Find the row that fails by halving: it fails alone, its neighbours go on."""
        if len(call.rows) == 1:
            traceback.print_exception(error)
            self._fail(call.rows[0].job.id, "failed", type(error).__name__)
            return
        rows = [row for row in call.rows if self._is_here(row)]
        for half in (rows[: len(rows) // 2], rows[len(rows) // 2 :]):
            if half:
                self._retries.append(Call(call.stage, half, call.work, call.land))
                for row in half:
                    row.busy = True

    def _shrink(self, call: Call, error: Exception) -> None:
        """Out of memory: nothing is lost, the rows stay on the board and the batch is smaller from now on."""
        self.pipeline.device.release_memory()
        if len(call.rows) == 1:
            self._fail(call.rows[0].job.id, "out_of_memory")
        elif call.stage in self._caps:
            self._caps[call.stage] = min(self._caps[call.stage], len(call.rows) // 2)
            self.replace_costs(self.costs)
        else:
            self._isolate(call, error)

    def _fail(self, id: int, code: str, detail: str = "") -> None:
        if self.board.pop(id, None) is not None:
            self.send(Failed(id, code, detail))

    def _tend_loading(self, now: float) -> None:
        """Start to load what is asked for and not there; rows that cannot wait any longer are told so."""
        for running in list(self.board.values()):
            name = running.job.variant
            if self.registry.is_resident(Weights(name)):
                continue
            if now > running.job.deadline:
                self._fail(running.job.id, "loading", name)
            elif name not in self._loading:
                self._loading.add(name)
                threading.Thread(target=self._load, args=(name,), daemon=True, name=f"load {name}").start()

    def _load(self, name: str) -> None:
        try:
            self.registry.load(Weights(name))
        except Exception as error:
            reason = str(error)
            self.post(lambda: self._fail_variant(name, reason))
        self.post(lambda: self._loading.discard(name))

    def _fail_variant(self, name: str, reason: str) -> None:
        for running in [running for running in self.board.values() if running.job.variant == name]:
            self._fail(running.job.id, "variant_unavailable", reason)
