"""The process that owns one device. It warms up, serves its pipe, and leaves with it; torch lives from here down.

Run by app.engine.client as `python -m app.engine.worker FD CONFIG`.
"""

import os
import queue
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import msgspec
import torch

from app.engine import cuda
from app.engine.config import EngineConfig
from app.engine.costs import Costs
from app.engine.loop import Loop
from app.engine.messages import Fatal, FromEngine, Ready, frame, receive
from app.engine.warmup import measure
from app.logs import say
from models import compiled, fp8
from models.aoti import Broken
from models.catalog import CATALOG, Family
from models.pipeline import Pipeline
from models.registry import OverBudget, Registry, Tier
from models.weights import BadWeights, MissingWeights, WeightStore

DEFAULT_VARIANT = "4step-unet"
LANES = 2  # calls at a time. CPU: of half the threads each. GPU: one steps, one decodes
MAX_BATCH = {"cpu": 16, "cuda": 8}  # rows; the cost table may choose fewer. SDXL at 1024 px is flat after 8 on an H100.


class NoDevice(Exception):
    """The device that was asked for is not there."""


class Wire:
    """The engine's end of the socket: a thread that reads for the loop, and one that writes."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._outbox: queue.SimpleQueue[FromEngine] = queue.SimpleQueue()
        threading.Thread(target=self._write, daemon=True, name="write").start()

    def send(self, message: FromEngine) -> None:
        """Put a message on the wire; never blocks."""
        self._outbox.put(message)

    def feed(self, loop: Loop) -> None:
        """Give the loop what arrives, in a thread of its own."""
        threading.Thread(target=self._read, args=(loop,), daemon=True, name="read").start()

    def last_word(self, message: FromEngine) -> None:
        """Send a message at once, before the process ends."""
        self._sock.sendall(frame(message))

    def _write(self) -> None:
        while True:
            try:
                self._sock.sendall(frame(self._outbox.get()))
            except OSError:
                os._exit(0)  # the HTTP process has gone, and with it everybody who waits

    def _read(self, loop: Loop) -> None:
        while True:
            try:
                loop.post(receive(self._sock))
            except (EOFError, OSError):
                os._exit(0)


def choose_family(config: EngineConfig, device: str) -> Family:
    """SDXL where it is asked for, or where there is a GPU and its weights are here; else the embedded model."""
    if config.model is not None:
        return CATALOG[config.model]
    sdxl = CATALOG["sdxl"]
    directory = Path(config.directory) if config.directory else None
    return sdxl if device == "cuda" and WeightStore(sdxl, directory).is_complete() else CATALOG["embedded"]


def choose_dtype(config: EngineConfig, device: str) -> torch.dtype:
    """What was asked for; else float16 on a GPU, and bfloat16 on a CPU that computes it in hardware."""
    if config.dtype is not None:
        return getattr(torch, config.dtype)
    if device == "cuda":
        return torch.float16
    return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


def build_loop(config: EngineConfig, wire: Wire) -> tuple[Loop, compiled.Recipe | None]:
    """Load the model and warm up. Raises MissingWeights, BadWeights, OverBudget, NoDevice, fp8.NoFp8."""
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise NoDevice("DEVICE=cuda, but torch finds no CUDA device here: leave DEVICE out, or install CUDA's torch")
    threads = config.threads or len(os.sched_getaffinity(0))
    lanes = min(LANES, threads) if device == "cpu" else LANES
    torch.set_num_threads(max(1, threads // lanes))  # each lane's
    if device == "cuda":
        cuda.set_up(Path(config.cache))
    dtype, family = choose_dtype(config, device), choose_family(config, device)
    store = WeightStore(family, Path(config.directory) if config.directory else None)
    pipeline = Pipeline(store, device, dtype)
    tiers = [Tier("cpu", config.host_budget, pinned=device == "cuda")]
    if device == "cuda":
        budget = cuda.spare_memory() if config.device_budget is None else config.device_budget
        tiers = [Tier("cuda", budget), *tiers]
    registry = Registry(store, device, dtype, tiers)
    if config.fp8:
        fp8.require(device)
        registry.in_fp8 = True
    for name in choose_preload(store):
        registry.load(name)
    say("weights loaded", variants=[row.name for row in registry.status() if row.state == "resident"])
    if device == "cuda":
        cuda.prepare(pipeline, registry)
    recipe = compiled.Recipe(store, dtype, Path(config.cache)) if config.compile and _compiles(family, device) else None
    if recipe is not None and recipe.is_built():
        _use_compiled(pipeline, registry, recipe, lanes)
    # On a GPU a batch of one is enough to serve: the others are recorded beside the service.
    batches = _sizes(config, device)[: 1 if device == "cuda" else None]
    costs = _measured(pipeline, registry, lanes, batches)
    loop = Loop(pipeline, registry, costs, wire.send, lanes)
    loop.compiled = registry.bind is not None
    return loop, recipe


def choose_preload(store: WeightStore) -> list[str]:
    """What is loaded before the first request: all that is here of the small model; of SDXL one variant, the default if
    it is here, or if none is and it must be fetched."""
    here = store.variants_here()
    if store.family.name == "embedded" and here:
        return here
    return [DEFAULT_VARIANT] if DEFAULT_VARIANT in here or not here else here[:1]


def _compiles(family: Family, device: str) -> bool:
    return device == "cpu" and family.name == "embedded"


def _sizes(config: EngineConfig, device: str) -> list[int]:
    """The batch sizes that are measured: 1, 2, 4, ... the largest."""
    return [1 << power for power in range((config.max_batch or MAX_BATCH[device]).bit_length())]


def _measured(pipeline: Pipeline, registry: Registry, lanes: int, batches: Sequence[int]) -> Costs:
    at_a_time = 1 if registry.bind is None else lanes  # else the lanes do different things: one module steps at a time
    return measure(pipeline, registry, _resident(registry), registry.store.family.size.default, batches, at_a_time)


def _resident(registry: Registry) -> str:
    return next(row.name for row in registry.status() if row.state == "resident")


def _use_compiled(pipeline: Pipeline, registry: Registry, recipe: compiled.Recipe, lanes: int) -> None:
    """Change over to compiled code. A library that cannot be loaded is deleted; it will be built again."""
    try:
        text, decoder = compiled.load_text(recipe), compiled.load_decoder(recipe, callers=lanes)
        bind = compiled.load_unet(recipe, callers=lanes)
        bind(registry.weight_set(_resident(registry)))
    except Broken as error:
        compiled.forget(recipe)
        say("compiled code is unusable; deleted", reason=str(error)[:200])
        return
    pipeline.text, pipeline.decoder = text, decoder
    registry.use_compiled(bind)


def compile_later(config: EngineConfig, loop: Loop, recipe: compiled.Recipe) -> None:
    """Build the compiled code beside the service, then change over between two turns."""
    building = compiled.start_build(recipe)

    def swap_in() -> None:
        _use_compiled(loop.pipeline, loop.registry, recipe, loop.lanes)
        loop.compiled = loop.registry.bind is not None
        loop.replace_costs(_measured(loop.pipeline, loop.registry, loop.lanes, _sizes(config, loop.pipeline.device)))
        if loop.compiled:
            say("compiled code in place")

    def wait() -> None:
        _, errors = building.communicate()
        if building.returncode == 0:
            loop.post(lambda: loop.when_idle(swap_in))
        else:
            last = errors.decode(errors="replace").strip().splitlines()[-1:]
            say("compilation failed; serving without it", reason=last)

    threading.Thread(target=wait, daemon=True, name="compile").start()


def main() -> None:
    """Serve one device until the pipe closes."""
    say("engine started")  # behind its imports
    # Signals to the process group are the HTTP process's business: the engine leaves when its pipe does.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    wire = Wire(socket.socket(fileno=int(sys.argv[1])))
    config = msgspec.json.decode(sys.argv[2], type=EngineConfig)
    try:
        loop, recipe = build_loop(config, wire)
    except (MissingWeights, BadWeights, OverBudget, NoDevice, fp8.NoFp8, torch.OutOfMemoryError) as error:
        wire.last_word(Fatal(str(error)))
        raise SystemExit(f"the engine cannot start: {error}") from error
    wire.feed(loop)
    family = loop.registry.store.family.name
    dtype = str(loop.pipeline.dtype).removeprefix("torch.")
    wire.send(Ready(family, loop.pipeline.device, dtype, loop.costs, loop.report()))
    if recipe is not None and not loop.compiled and compiled.can_build(recipe.cache):
        compile_later(config, loop, recipe)
    if loop.pipeline.device == "cuda":
        measured = partial(_measured, loop.pipeline, loop.registry, loop.lanes)
        batches = _sizes(config, "cuda")
        cuda.record_later(loop, measured, batches[1:])
        if config.compile:
            loop.when_idle(lambda: cuda.compile_later(loop, lambda: measured(batches)))
    loop.run()


if __name__ == "__main__":
    main()
