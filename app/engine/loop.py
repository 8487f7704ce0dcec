"""The engine's loop: what is running, what is waiting, and one turn after another of plan and work."""

import json
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from app.engine.costs import Costs
from app.engine.jobs import Job, Row
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
from models.pipeline import Conditioning, Pipeline, UNetFunction
from models.registry import Registry

Inbox = queue.SimpleQueue[ToEngine | Callable[[], None]]
CHUNKS_BEHIND = 2  # of finished rows, waiting for the decoder
MANY = 1 << 30
STEP, DECODE = 0, 1


@dataclass
class Running:
    """A job on the board, with its tensors. latents: (4, h, w) float32, from its first step on."""

    job: Job
    arrived: float
    step: int = 0
    latents: Tensor | None = None
    conditioning: Conditioning | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    batches: list[int] = field(default_factory=list)

    @property
    def row(self) -> Row:
        """This job as the scheduler sees it."""
        job = self.job
        return Row(job.id, job.variant, job.height, job.width, job.deadline, job.steps - self.step)

    def spent(self, stage: str, seconds: float) -> None:
        """Count time towards a stage."""
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds


class Loop:
    """Owns the device. Other threads post to the inbox; on a GPU one of them decodes.

    send: puts a message on the wire; may be called from any thread.
    """

    def __init__(
        self, pipeline: Pipeline, registry: Registry, costs: Costs, send: Callable[[FromEngine], None]
    ) -> None:
        self.pipeline, self.registry, self.costs, self.send = pipeline, registry, costs, send
        self.inbox: Inbox = queue.SimpleQueue()
        self.board: dict[int, Running] = {}
        self.compiled = False
        self._loading: set[str] = set()
        self._caps = [MANY, MANY]  # rows that fit into memory, learned: of a step, of a decode
        # Bounded: where decodes are what is slow, the steps wait for them, not the finished rows for ever.
        self._finishing: queue.Queue[list[Running]] = queue.Queue(maxsize=CHUNKS_BEHIND)
        self._decoding: dict[int, Running] = {}
        # On a GPU a second thread decodes beside the next steps. On a CPU both would want the same cores, and compiled
        # code holds the interpreter's lock: measured, 33 images/s instead of 70 (docs/decisions.md).
        self._decodes_beside = pipeline.device != "cpu"
        if self._decodes_beside:
            threading.Thread(target=self._decode_forever, daemon=True, name="decode").start()

    def run(self) -> None:
        """Serve until the process ends."""
        while True:
            self.accept(block=not self.has_work())
            self.turn()

    def has_work(self) -> bool:
        """Whether a turn now would do anything."""
        return any(self.registry.is_resident(running.job.variant) for running in self.board.values())

    def accept(self, block: bool) -> None:
        """Take in what has arrived. Sleeps only when there is nothing to do."""
        try:
            message = self.inbox.get(block=block, timeout=0.1 if self.board else None)
            while True:
                self._take(message)
                message = self.inbox.get_nowait()
        except queue.Empty:
            return

    def turn(self) -> None:
        """One plan, and the work it asks for."""
        now = time.monotonic()
        ready = [running.row for running in self.board.values() if self.registry.is_resident(running.job.variant)]
        todo = plan(ready, self.costs, now)
        for row in todo.refuse:
            self._fail(row.id, "expired")
        if todo.decode:
            self._finish([self.board.pop(row.id) for row in todo.decode])
        if todo.step:
            self._encode([running for running in self.board.values() if running.conditioning is None])
            self._step([self.board[row.id] for row in todo.step if row.id in self.board])
        self._tend_loading(now)

    def report(self) -> Report:
        """The answer to a Ping."""
        variants = self.registry.store.family.variants
        return Report(
            [
                VariantReport(row.name, variants[row.name].steps, row.state, row.resident_bytes, row.reason)
                for row in self.registry.status()
            ],
            torch.cuda.memory_allocated() if self.pipeline.device.startswith("cuda") else 0,
            self.registry.switches,
            self.compiled,
        )

    def replace_costs(self, costs: Costs) -> None:
        """Plan by a new table from now on, without what was learned not to fit, and tell the other side."""
        self.costs = costs.capped(*self._caps)
        self.send(Measured(self.costs))

    def _take(self, message: ToEngine | Callable[[], None]) -> None:
        match message:
            case Submit(jobs):
                now = time.monotonic()
                self.board.update({job.id: Running(job, now) for job in jobs})
            case Cancel(ids):
                for id in ids:
                    self.board.pop(id, None)
                    self._decoding.pop(id, None)
            case Ping():
                self.send(self.report())
            case _:
                message()

    def _step(self, rows: list[Running]) -> None:
        rows = [row for row in rows if row.conditioning is not None]  # a row whose prompt failed has left the board
        if not rows:
            return
        try:
            unet = self.registry.use(rows[0].job.variant)
        except KeyError:
            return  # evicted since the plan was made: the rows stay, and it is loaded again
        start = time.monotonic()
        try:
            stepped = self._denoise(unet, rows)
        except Exception as error:
            if is_out_of_memory(error) and len(rows) > 1:
                self._learn(STEP, len(rows) // 2)  # nothing is lost: the rows stay on the board
            else:
                self._isolate(rows, error, self._step)
            return
        seconds = time.monotonic() - start
        for running, latents in zip(rows, stepped, strict=True):
            if running.step == 0:
                running.spent("queue", start - running.arrived - running.seconds.get("encode", 0.0))
            running.latents, running.step = latents, running.step + 1
            running.spent("denoise", seconds)
            running.batches.append(len(rows))
        self._worked("denoise", rows, seconds)

    def _denoise(self, unet: UNetFunction, rows: list[Running]) -> Tensor:
        schedule = self.registry.schedules[rows[0].job.variant]
        for row in rows:
            if row.latents is None and row.conditioning is not None:
                row.conditioning = self.pipeline.project(unet, row.conditioning)
        latents = [
            self.pipeline.noise(row.job.seed, row.job.height, row.job.width, schedule)
            if row.latents is None
            else row.latents
            for row in rows
        ]
        step = self.pipeline.to_device(torch.tensor([row.step for row in rows]))
        conditioning = [row.conditioning for row in rows if row.conditioning is not None]
        stepped = self.pipeline.denoise(unet, schedule, torch.stack(latents), step, conditioning)
        self.pipeline.synchronize()  # between steps, so that new rows can join; within a step nothing waits
        return stepped

    def _encode(self, new: list[Running]) -> None:
        """Give rows their conditioning, all that are new together: a call costs more than a prompt."""
        if not new:
            return
        start = time.monotonic()
        try:
            encoded = self.pipeline.encode([row.job.prompt for row in new])
        except Exception as error:
            self._isolate(new, error, self._encode)
            return
        seconds = time.monotonic() - start
        for running, conditioning in zip(new, encoded, strict=True):
            running.conditioning = conditioning
            running.spent("encode", seconds)
        self._worked("encode", new, seconds)

    def _finish(self, rows: list[Running]) -> None:
        self._decoding.update({row.job.id: row for row in rows})
        chunk = self.costs.best_decode_batch
        for start in range(0, len(rows), chunk):
            if self._decodes_beside:
                self._finishing.put(rows[start : start + chunk])
            else:
                self._decode(rows[start : start + chunk])

    def _decode_forever(self) -> None:
        while True:
            try:
                self._decode(self._finishing.get())
            except BaseException:
                traceback.print_exc()
                os._exit(70)  # never alive and mute: the other process starts a new engine

    def _decode(self, rows: list[Running]) -> None:
        rows = [row for row in rows if row.job.id in self._decoding]  # the others were cancelled while they waited
        if not rows:
            return
        start = time.monotonic()
        try:
            pictures, sound = self.pipeline.decode([row.latents for row in rows if row.latents is not None])
        except Exception as error:
            if is_out_of_memory(error) and len(rows) > 1:
                self._learn(DECODE, len(rows) // 2)
            self._isolate(rows, error, self._decode)
            return
        seconds = time.monotonic() - start
        for running, pixels, is_sound in zip(rows, pictures, sound.tolist(), strict=True):
            running.spent("decode", seconds)
            self._send_picture(running, pixels, is_sound)
        self._worked("decode", rows, seconds)

    def _send_picture(self, running: Running, pixels: Tensor, sound: bool) -> None:
        job = running.job
        self._decoding.pop(job.id, None)
        if not sound:
            self.send(Failed(job.id, "numeric_fault", f"{job.variant} made a blank or undefined picture"))
            return
        truncated = running.conditioning is not None and running.conditioning.truncated
        data = pixels.numpy().tobytes()
        self.send(Done(job.id, job.height, job.width, data, running.seconds, running.batches, truncated))

    def _isolate(self, rows: list[Running], error: Exception, retry: Callable[[list[Running]], object]) -> None:
        """Find the row that fails by halving: it fails alone, its neighbours go on."""
        out_of_memory = is_out_of_memory(error)
        if out_of_memory:
            torch.cuda.empty_cache()
        else:
            end_if_the_device_is_lost(error)
        if len(rows) == 1:
            self._fail(rows[0].job.id, "out_of_memory" if out_of_memory else "failed", type(error).__name__)
            return
        retry(rows[: len(rows) // 2])
        retry(rows[len(rows) // 2 :])

    def _learn(self, what: int, rows: int) -> None:
        """Memory did not suffice for more than `rows` at once: never try it again."""
        torch.cuda.empty_cache()
        self._caps[what] = min(self._caps[what], rows)
        self.replace_costs(self.costs)

    def _fail(self, id: int, code: str, detail: str = "") -> None:
        self.board.pop(id, None)
        self._decoding.pop(id, None)
        self.send(Failed(id, code, detail))

    def _worked(self, stage: str, rows: list[Running], seconds: float) -> None:
        job = rows[0].job
        self.send(Worked(stage, job.variant, [row.job.id for row in rows], seconds, job.height * job.width))

    def _tend_loading(self, now: float) -> None:
        """Start to load what is asked for and not there; rows that cannot wait any longer are told so."""
        for running in list(self.board.values()):
            name = running.job.variant
            if self.registry.is_resident(name):
                continue
            if now > running.job.deadline:
                self._fail(running.job.id, "loading", name)
            elif name not in self._loading:
                self._loading.add(name)
                threading.Thread(target=self._load, args=(name,), daemon=True, name=f"load {name}").start()

    def _load(self, name: str) -> None:
        try:
            self.registry.load(name)
        except Exception as error:
            reason = str(error)
            self.inbox.put(lambda: self._fail_variant(name, reason))
        self.inbox.put(lambda: self._loading.discard(name))

    def _fail_variant(self, name: str, reason: str) -> None:
        for running in [running for running in self.board.values() if running.job.variant == name]:
            self._fail(running.job.id, "variant_unavailable", reason)


def is_out_of_memory(error: Exception) -> bool:
    """Whether the device's memory did not suffice; cuBLAS and cuDNN say so in their own words."""
    return isinstance(error, torch.OutOfMemoryError) or "ALLOC_FAILED" in str(error)


def end_if_the_device_is_lost(error: Exception) -> None:
    """A CUDA error other than out-of-memory poisons its context for good: only a new process cures it."""
    if isinstance(error, torch.AcceleratorError) or "CUDA error" in str(error):
        print(json.dumps({"event": "the device is lost; the engine ends", "error": str(error)}), file=sys.stderr)
        os._exit(70)  # EX_SOFTWARE; from any thread
