"""What the HTTP process tells the engine process when it starts it."""

import msgspec


class EngineConfig(msgspec.Struct, frozen=True):
    """None means: decide on the machine. Budgets in bytes; directories as strings, "" for none."""

    model: str | None
    directory: str
    device: str | None
    dtype: str | None
    threads: int | None
    max_batch: int | None
    device_budget: int | None
    host_budget: int
    compile: bool
    fp8: bool
    cache: str
    preload: list[str] | None = None
