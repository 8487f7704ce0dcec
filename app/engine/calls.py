"""A job on the board, a call on the device, and what became of it."""

import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from app.engine.jobs import Job, Row, Source
from app.engine.messages import Done, Mark
from app.logs import leave, say
from models.device import Device
from models.original import Kept, Original
from models.prompts import Conditioning


@dataclass(eq=False)
class Running:
    """A job on the board, with its tensors. latents: (4, h, w) float32, from its first step on. step: how many it has
    taken. busy: a worker has it, and nothing else may be done with it until the call is done. source: what it draws
    over, until that is encoded; original: the same from there on. kept: what it puts back, where it inpaints.
    noise: what each step adds, (steps, 4, h, w), where its sampler adds any."""

    job: Job
    arrived: float
    source: Source | None = None
    step: int = 0
    busy: bool = False
    latents: Tensor | None = None
    noise: Tensor | None = None
    conditioning: Conditioning | None = None
    original: Original | None = None
    kept: Kept | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    batches: list[int] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)

    @property
    def row(self) -> Row:
        """This job as the scheduler sees it."""
        if self.conditioning is None:
            return self.job.row(self.step)
        return self.job.row(self.step, is_encoded=True, length=len(self.conditioning.prompt_embeds))

    def done(self, pixels: bytes) -> Done:
        """What its client is told."""
        assert self.conditioning is not None
        drawn = (self.job.id, self.job.weights.variant, self.job.height, self.job.width, pixels)
        text = (self.conditioning.tokens, self.conditioning.truncated)
        return Done(*drawn, self.seconds, self.batches, *text, self.marks)

    def spent(self, stage: str, start: float, seconds: float, rows: int = 1) -> None:
        """Count time towards a stage. rows: of the call."""
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds
        if self.job.trace:
            self.marks.append(Mark(stage, start, seconds, rows))


@dataclass(frozen=True, eq=False)
class Call:
    """One call on the device, by one worker: a stage of some rows. settle: takes its result, under the lock."""

    stage: str
    rows: list[Running]
    work: Callable[[list[Running]], Any]
    settle: Callable[[list[Running], Any, float, float], None]
    start: float = field(default_factory=time.monotonic)

    @property
    def count(self) -> int:
        """Rows of the UNet that it steps."""
        return sum(running.row.count for running in self.rows)


def ids_in(calls: Sequence[Call]) -> list[int]:
    """Of the pictures in them."""
    return [row.job.id for call in calls for row in call.rows]


def make(call: Call, device: Device) -> tuple[Any, float]:
    """In a worker thread: the result of a call, or its error, and the seconds it took."""
    start = time.monotonic()
    try:
        result = call.work(call.rows)
    except Exception as error:
        if device.is_lost(error):
            say("the device is lost; the engine ends", level="critical", error=str(error))
            leave(70)  # EX_SOFTWARE; from any thread
        for each in (error, error.__context__):  # their frames hold the failed call's tensors
            if each is not None:
                traceback.clear_frames(each.__traceback__)
        result = error
    return result, time.monotonic() - start
