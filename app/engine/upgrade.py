"""Faster later: what is recorded, compiled or measured beside the service, and how it comes in between two calls.

A GPU records graphs of larger batches, and compiles; a CPU compiles the embedded model. A change that no call may
overlap is made by loop.when_idle; the new costs go to both sides by loop.replace_costs.
"""

import sys
import threading
from functools import partial
from pathlib import Path

from app.engine.load import Model
from app.engine.loop import Loop
from app.engine.messages import EngineConfig
from app.logs import say
from models import compiled
from models.aoti import Broken
from models.catalog import Weights
from models.gpu.graphs import Graphed
from models.gpu.graphs import compiled as compiled_for_gpu
from models.gpu.prepare import NEVER, SEEN_OFTEN, graphs, record_from

SWITCH_S = 1e-4  # how long a thread keeps the interpreter from others while a compiler runs


def prepare(model: Model, config: EngineConfig) -> None:
    """Before the warm-up: whatever is fast at once."""
    attention = model.device.prepare(model.pipeline, model.registry.unet)
    if attention is not None:
        say("attention measured", milliseconds_per_step=attention)
    elif (recipe := _recipe(model, config)) is not None and recipe.is_built():
        _use_compiled(model, recipe)


def later(loop: Loop, model: Model, config: EngineConfig) -> None:
    """Before the loop runs: begin all that takes time."""
    loop.compiled = model.registry.bind is not None
    recorded, recipe = graphs(model.pipeline), _recipe(model, config)
    if recorded:
        add_batches(loop, model)
        if config.compile:
            loop.when_idle(lambda: compile_graphs(loop, model))
    elif recipe is not None and not loop.compiled and compiled.can_build(recipe.cache):
        _build(loop, model, recipe)


def add_batches(loop: Loop, model: Model) -> None:
    """Record larger batches, and measure them, each between two calls; the largest first, because the memory of its
    graphs has room for the others'."""

    def add(batch: int) -> None:
        record_from(model.pipeline, 1)
        model.pipeline.encode([f"warm-up {row} of {batch}" for row in range(batch)])
        loop.replace_costs(loop.costs.joined(model.measure([batch])))
        record_from(model.pipeline, SEEN_OFTEN)

    record_from(model.pipeline, SEEN_OFTEN)
    for batch in sorted(model.batches[model.device.first_batches :], reverse=True):
        loop.when_idle(partial(add, batch))
    loop.when_idle(lambda: say("graphs recorded"))


def compile_graphs(loop: Loop, model: Model) -> None:
    """Compile what is recorded, the decoder first: it has most to gain. Each graph is replaced as soon as a better
    one is recorded; at the end the costs are measured anew, between two calls."""
    record_from(model.pipeline, NEVER)  # a recording forbids the waits of the compiler's measurements

    def work() -> None:
        usual = sys.getswitchinterval()
        # Each call of torch lets go of the interpreter's lock, and would wait so long to have it back from a compiler
        # in Python: 5 ms, some 20 times a step.
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
        say("compilation failed; serving without it", level="warning", reason=str(error)[:500])
        return False
    return True


def _in_place(loop: Loop, model: Model) -> None:
    loop.replace_costs(model.measure(model.batches))
    loop.compiled = True
    say("compiled code in place")


def _recipe(model: Model, config: EngineConfig) -> compiled.Recipe | None:
    is_worth_it = config.compile and model.family.name == "embedded"
    return compiled.Recipe(model.store, model.pipeline.dtype, Path(config.cache)) if is_worth_it else None


def _build(loop: Loop, model: Model, recipe: compiled.Recipe) -> None:
    """Compile for the CPU in a process of its own, then change over."""
    building = compiled.start_build(recipe)

    def change_over() -> None:
        _use_compiled(model, recipe)
        if model.registry.bind is not None:
            _in_place(loop, model)

    def wait() -> None:
        _, errors = building.communicate()
        if building.returncode == 0:
            loop.post(lambda: loop.when_idle(change_over))
        else:
            last = errors.decode(errors="replace").strip().splitlines()[-1:]
            say("compilation failed; serving without it", reason=last)

    threading.Thread(target=wait, daemon=True, name="compile").start()


def _use_compiled(model: Model, recipe: compiled.Recipe) -> None:
    """A library that cannot be loaded is deleted; it will be built again."""
    try:
        text, decoder = compiled.load_text(recipe), compiled.load_decoder(recipe, callers=model.workers)
        bind = compiled.load_unet(recipe, callers=model.workers)
        resident = next(row.name for row in model.registry.status() if row.state == "resident")
        bind(model.registry.weight_set(Weights(resident)))
    except Broken as error:
        compiled.forget(recipe)
        say("compiled code is unusable; deleted", reason=str(error)[:200])
        return
    model.pipeline.text, model.pipeline.decoder = text, decoder
    model.registry.use_compiled(bind)
