"""What a Job, a Row and a Plan are. No torch, no asyncio, no clock."""

from dataclasses import dataclass
from itertools import count
from typing import Annotated

import msgspec

from models.catalog import Steps, Weights
from models.grid import starts

Id = Annotated[int, msgspec.Meta(ge=0)]
Pixels = Annotated[int, msgspec.Meta(ge=8, le=4096, multiple_of=8)]

new_id = count(1).__next__  # an id that no other job of this process has


class Source(msgspec.Struct, frozen=True):
    """The picture that one request's jobs draw over, of their size: height x width x 3 bytes. mask: height x width
    bytes, above 127 where it is drawn anew; none: everywhere."""

    image: bytes
    mask: bytes = b""


class Job(msgspec.Struct, frozen=True):
    """One picture to draw. deadline: seconds on this machine's monotonic clock, which its processes share. owner: who
    asked for it, since no two owners share what is cached. guidance: 1 means without; negative_prompt acts above.
    strength: of models.grid.starts(), for a job that draws over a picture. source: the id of the first job that draws
    over the same one.
    previews: somebody looks on while it is drawn. trace: the request's traceparent, where its stages are wanted in
    detail."""

    id: Id
    prompt: Annotated[str, msgspec.Meta(min_length=1, max_length=2000)]
    weights: Weights
    steps: Steps
    seed: Annotated[int, msgspec.Meta(ge=0, lt=2**32)]
    height: Pixels
    width: Pixels
    deadline: float
    owner: str = ""
    negative_prompt: Annotated[str, msgspec.Meta(max_length=2000)] | None = None
    guidance: float = 1.0
    strength: float | None = None
    source: Id | None = None
    previews: bool = False
    trace: str = ""

    @property
    def path(self) -> range:
        """The rows of its schedule's table that it steps through."""
        return starts(self.steps)[1.0 if self.strength is None else self.strength]

    def row(self, step: int = 0, is_encoded: bool = False, length: int = 0) -> "Row":
        """This job as the scheduler sees it once `step` of its steps are done."""
        count = 2 if self.guidance > 1 else 1
        drawn = (self.id, self.weights, self.height, self.width, self.deadline)
        return Row(*drawn, len(self.path) - step, is_encoded, count, length, self.source)


@dataclass(frozen=True)
class Row:
    """A picture as the scheduler sees it: some steps from its end. count: rows of a UNet call that it takes (two where
    it is guided). length: of its prompt's embeddings, once it is encoded. source: the first of the rows that draw over
    the same picture, if it draws over one."""

    id: int
    weights: Weights
    height: int
    width: int
    deadline: float
    steps_left: int
    is_encoded: bool = True
    count: int = 1
    length: int = 0
    source: int | None = None

    @property
    def group(self) -> tuple[Weights, int, int, int]:
        """Rows of one group can share a UNet call."""
        return self.weights, self.height, self.width, self.length

    @property
    def size(self) -> tuple[int, int]:
        """Rows of one size can share a decode."""
        return self.height, self.width

    @property
    def pixels(self) -> int:
        """Height times width: what the cost of a step and a decode grow with."""
        return self.height * self.width


def age(each: Job | Row) -> tuple[float, int]:
    """The order in which pictures are served: the oldest deadline first."""
    return each.deadline, each.id


@dataclass(frozen=True)
class Plan:
    """The calls that may start now, the most urgent stage first, and the rows that can no longer be served in time.
    Each stage is one call: prompts to encode, or one picture and the prompts of the rows that draw over it; finished
    rows of one size to decode; rows of one group to step."""

    encode: tuple[Row, ...] = ()
    decode: tuple[Row, ...] = ()
    step: tuple[Row, ...] = ()
    refuse: tuple[Row, ...] = ()
