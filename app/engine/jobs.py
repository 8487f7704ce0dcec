"""What a Job, a Row and a Plan are. No torch, no asyncio, no clock."""

from dataclasses import dataclass
from typing import Annotated

import msgspec

Id = Annotated[int, msgspec.Meta(ge=0)]
Pixels = Annotated[int, msgspec.Meta(ge=8, le=4096, multiple_of=8)]


class Job(msgspec.Struct, frozen=True):
    """One picture to draw. deadline: seconds on this machine's monotonic clock, which its processes share.
    jpeg: the quality of a JPEG file that the engine may make of it; 0 where its pixels are wanted."""

    id: Id
    prompt: Annotated[str, msgspec.Meta(min_length=1, max_length=2000)]
    variant: Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
    steps: Annotated[int, msgspec.Meta(ge=1, le=8)]
    seed: Annotated[int, msgspec.Meta(ge=0, lt=2**32)]
    height: Pixels
    width: Pixels
    deadline: float
    jpeg: Annotated[int, msgspec.Meta(ge=0, le=100)] = 0


@dataclass(frozen=True)
class Row:
    """A job as the scheduler sees it: one row of a batch, some steps from its picture."""

    id: int
    variant: str
    height: int
    width: int
    deadline: float
    steps_left: int

    @property
    def group(self) -> tuple[str, int, int]:
        """Rows of one group can share a UNet call."""
        return self.variant, self.height, self.width

    @property
    def pixels(self) -> int:
        """Height times width: what the cost of a step and a decode grow with."""
        return self.height * self.width


@dataclass(frozen=True)
class Plan:
    """What the engine does next: rows of one group to step, finished rows to decode, rows that are too late."""

    step: tuple[Row, ...] = ()
    decode: tuple[Row, ...] = ()
    refuse: tuple[Row, ...] = ()
