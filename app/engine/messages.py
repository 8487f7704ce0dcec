"""What crosses between the HTTP process and the engine: the engine's configuration, and messages both ways."""

from typing import Annotated

import msgspec

from app.engine.costs import Costs
from app.engine.jobs import Id, Job, Source
from models.catalog import Weights


class EngineConfig(msgspec.Struct, frozen=True):
    """What the engine is told at its start. None: decide on the machine. Budgets in bytes; directories as strings.
    catalogs: texts by path, as they were when the server was started, however often the engine is. styles: the folder
    of style LoRAs; None: the family's own. start_timeout: seconds until it must be ready.
    name: among several engines. gpu: the one that it sees, as CUDA_VISIBLE_DEVICES names it; None: as many as we do."""

    model: str | None
    catalogs: dict[str, str]
    directory: str | None
    device: str | None
    dtype: str | None
    threads: int | None
    max_batch: int | None
    preload: list[str] | None
    device_budget: int | None
    host_budget: int
    compile: bool
    fp8: bool
    cache: str
    styles: str | None = None
    log_level: str = "info"
    start_timeout: float = 600.0
    name: str | None = None
    gpu: str | None = None


class Submit(msgspec.Struct, tag=True, frozen=True):
    """Draw these pictures. source: what they draw over, if anything; once, for a frame is limited."""

    jobs: list[Job]
    source: Source | None = None


class Cancel(msgspec.Struct, tag=True, frozen=True):
    """Nobody waits for these any more."""

    ids: list[Id]


class Ping(msgspec.Struct, tag=True, frozen=True):
    """Answer between two steps: the loop is alive."""


class VariantReport(msgspec.Struct, frozen=True):
    """A variant as the registry sees it; state as in models.registry.VariantStatus."""

    name: str
    state: str
    resident_bytes: int = 0
    reason: str | None = None


class Held(msgspec.Struct, frozen=True):
    """A weight set in the engine's memory. seconds: until it would be the one in use, as measured."""

    weights: Weights
    seconds: float


class Report(msgspec.Struct, tag=True, frozen=True):
    """The answer to a Ping. device_bytes: GPU memory in use; None on a CPU. held: what needs no load. load: seconds
    that the last one took. log_lines_dropped: since the last report."""

    variants: list[VariantReport]
    device_bytes: int | None
    switches: int
    compiled: bool
    held: list[Held] = []
    load: float = 0.0
    log_lines_dropped: int = 0


class Starting(msgspec.Struct, tag=True, frozen=True):
    """The answer to a Ping before Ready."""


class Ready(msgspec.Struct, tag=True, frozen=True):
    """The engine serves: what it serves, and what it measured at warm-up."""

    family: str
    device: str
    dtype: str
    costs: Costs
    report: Report


class Measured(msgspec.Struct, tag=True, frozen=True):
    """New costs, once compiled code is in place."""

    costs: Costs


class Loaded(msgspec.Struct, tag=True, frozen=True):
    """A weight set was read into memory. seconds: what that took. left: what had to leave memory for it."""

    weights: Weights
    seconds: float
    left: list[Weights]


class Worked(msgspec.Struct, tag=True, frozen=True):
    """One call on the device. stage: "encode", "denoise" or "decode". ids: the pictures in it. rows: of the call."""

    stage: str
    weights: Weights
    ids: list[Id]
    rows: int
    seconds: float
    pixels: int


class Mark(msgspec.Struct, frozen=True):
    """A stage of one picture, where it is traced. start: on the monotonic clock. rows: of the call that it was in."""

    stage: str
    start: float
    seconds: float
    rows: int


class Preview(msgspec.Struct, tag=True, frozen=True):
    """What a step takes for the finished picture: height x width x 3 bytes, an eighth of the picture's sides."""

    id: Id
    step: int
    height: int
    width: int
    pixels: bytes


class Done(msgspec.Struct, tag=True, frozen=True):
    """A picture: height x width x 3 bytes. seconds: by stage. batches: the rows of each of its steps. tokens: of its
    prompt, whose end was not read where that is truncated. flagged: by the operator's check, in HTTP."""

    id: Id
    weights: Weights
    height: int
    width: int
    pixels: bytes
    seconds: dict[str, float]
    batches: list[int]
    tokens: int
    truncated: bool
    marks: list[Mark] = []
    flagged: bool = False


class Failed(msgspec.Struct, tag=True, frozen=True):
    """No picture. cause: a key of app.errors.CAUSES. detail: for the log."""

    id: Id
    cause: Annotated[str, msgspec.Meta(max_length=64)]
    detail: str = ""


class Fatal(msgspec.Struct, tag=True, frozen=True):
    """The engine cannot start, and starting it again would not help; the reason is for the operator."""

    reason: str


ToEngine = Submit | Cancel | Ping
FromEngine = Starting | Ready | Measured | Report | Loaded | Worked | Preview | Done | Failed | Fatal
