"""Faster later: what is recorded, compiled or measured beside the service, and how it comes in between two calls.

A GPU records graphs of larger batches, and compiles; a CPU compiles larger batches. A change that no call may
overlap is made by loop.when_idle; the new costs go to both sides by loop.replace_costs.
"""

import fcntl
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

from app.engine.load import Model
from app.engine.loop import Loop
from app.engine.messages import EngineConfig
from app.logs import say
from models.gpu.graphs import Graphed
from models.gpu.graphs import compiled as compiled_for_gpu
from models.gpu.prepare import NEVER, SEEN_OFTEN, graphs, record_from

SWITCH_S = 1e-4  # how long a thread keeps the interpreter from others while a compiler runs


def later(loop: Loop, model: Model, config: EngineConfig) -> None:
    """Before the loop runs: begin all that takes time."""
    if graphs(model.pipeline):
        add_batches(loop, model)
        if config.compile:
            loop.when_idle(lambda: compile_graphs(loop, model, config.cache))
    model.device.later(model.registry, lambda: loop.post(lambda: _when_all_is_there(loop, model)))


def add_batches(loop: Loop, model: Model) -> None:
    """Record larger batches, and measure them, each between two calls; the largest first, because the memory of its
    graphs has room for the others'."""

    def add(batch: int) -> None:
        record_from(model.pipeline, 1)
        model.pipeline.prompts.encode([f"warm-up {row} of {batch}" for row in range(batch)])
        loop.replace_costs(loop.costs.joined(model.measure([batch])))
        record_from(model.pipeline, SEEN_OFTEN)

    record_from(model.pipeline, SEEN_OFTEN)
    for batch in sorted(model.batches[model.device.first_batches :], reverse=True):
        loop.when_idle(partial(add, batch))
    loop.when_idle(lambda: say("graphs recorded"))


@contextmanager
def one_at_a_time(cache: str) -> Iterator[None]:
    """Engines compile one after the other: all but the first find in the cache what it made."""
    with ExitStack() as stack:
        with suppress(OSError):  # a folder that cannot be written: each for itself
            Path(cache).mkdir(parents=True, exist_ok=True)
            fcntl.flock(stack.enter_context((Path(cache) / "compiling").open("w")), fcntl.LOCK_EX)
        yield


def compile_graphs(loop: Loop, model: Model, cache: str) -> None:
    """Compile what is recorded, the decoder first: it has most to gain. Each graph is replaced as soon as a better
    one is recorded; at the end the costs are measured anew, between two calls. cache: where compiled code is kept."""
    record_from(model.pipeline, NEVER)  # a recording forbids the waits of the compiler's measurements

    def work() -> None:
        usual = sys.getswitchinterval()
        # Each call of torch lets go of the interpreter's lock, and would wait so long to have it back from a compiler
        # in Python: 5 ms, some 20 times a step.
        with one_at_a_time(cache):
            sys.setswitchinterval(SWITCH_S)
            done = [_is_improved(graphed) for graphed in graphs(model.pipeline) if graphed is not model.pipeline.text]
            sys.setswitchinterval(usual)
        record_from(model.pipeline, SEEN_OFTEN)
        if all(done):
            loop.post(lambda: loop.when_idle(lambda: _in_place(loop, model)))

    threading.Thread(target=work, daemon=True, name="compile").start()


def _is_improved(graphed: Graphed) -> bool:
    try:
        graphed.improve(compiled_for_gpu(graphed.function))
    except Exception as error:  # of a compiler: anything
        say("compilation failed; serving without it", level="warning", reason=str(error))
        return False
    return True


def _when_all_is_there(loop: Loop, model: Model) -> None:
    if not loop.compiled:  # what is compiled for later weights changes no cost
        loop.when_idle(lambda: _in_place(loop, model))


def _in_place(loop: Loop, model: Model) -> None:
    loop.replace_costs(model.measure(model.batches))
    loop.compiled = True
    say("compiled code in place")
