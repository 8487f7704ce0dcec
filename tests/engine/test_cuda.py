"""What a GPU is given beside the service, given to a CPU: code that takes the place of recorded code, one by one."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import pytest
import torch

from app.engine import cuda
from app.engine.calls import Call, make
from app.engine.costs import Costs
from app.engine.jobs import Job
from app.engine.loop import Loop
from app.engine.messages import Done, FromEngine, Measured, Ping, Report, Submit
from app.engine.warmup import measure
from models.catalog import CATALOG
from models.graphs import Graphed, by_calling
from models.pipeline import Pipeline, advance
from models.registry import Registry, Tier
from models.weights import WeightStore
from tests.conftest import ROOT, eventually

STORE = WeightStore(CATALOG["embedded"])


class Engine:
    """A loop in two lanes over functions that are recorded by calling, with what it sent."""

    def __init__(self) -> None:
        self.pipeline = Pipeline(STORE, "cpu", torch.float32)
        self.registry = Registry(STORE, "cpu", torch.float32, [Tier("cpu", 1 << 40)])
        self.registry.static = True
        self.registry.load("1step-unet")
        self.pipeline.text = Graphed(self.pipeline.text, by_calling)
        self.pipeline.decoder = Graphed(self.pipeline.decoder, by_calling, cuda.DECODED)
        self.steps = self.pipeline.steps[self.registry.unet] = Graphed(partial(advance, self.registry.unet), by_calling)
        self.sent: list[FromEngine] = []
        self.loop = Loop(self.pipeline, self.registry, self.measure([1]), self.sent.append)

    def measure(self, batches: Sequence[int]) -> Costs:
        return measure(self.pipeline, self.registry, "1step-unet", 128, batches, 1)

    def run(self) -> None:
        for _ in range(2):
            threading.Thread(target=self.loop.serve, daemon=True).start()

    def draw(self, *ids: int) -> list[bytes]:
        end = time.monotonic() + 60
        self.loop.post(Submit([Job(id, "a robot", "1step-unet", 1, id % 10, 128, 128, end) for id in ids]))
        assert eventually(lambda: self.done().keys() >= set(ids), 30)
        return [self.done()[id] for id in ids]

    def done(self) -> dict[int, bytes]:
        return {each.id: each.pixels for each in list(self.sent) if isinstance(each, Done)}


def buckets(graphed: Callable) -> list[int]:
    assert isinstance(graphed, Graphed)
    return sorted(bucket for bucket, _ in graphed._graphs)


def test_larger_batches_are_recorded_beside_the_service_and_measured_then():
    engine = Engine()
    assert (buckets(engine.steps), buckets(engine.pipeline.decoder), sorted(engine.loop.costs.step)) == ([1], [1], [1])
    cuda.record_later(engine.loop, engine.measure, [2, 4, 8])
    engine.run()
    assert eventually(lambda: engine.loop._flying != [], 10)
    first = engine.draw(0, 1, 2)
    assert eventually(lambda: sorted(engine.loop.costs.step) == [1, 2, 4, 8], 30)
    assert buckets(engine.steps) == buckets(engine.pipeline.text) == [1, 2, 4, 8]
    assert buckets(engine.pipeline.decoder) == [1, 2, 4]
    learned = [sorted(each.costs.step) for each in engine.sent if isinstance(each, Measured)]
    assert learned == [[1, 8], [1, 4, 8], [1, 2, 4, 8]]
    kinds = [type(each) for each in engine.sent if isinstance(each, Done | Measured)]
    assert kinds == [Measured, Done, Done, Done, Measured, Measured]  # who came meanwhile was served between two
    for before, after in zip(first, engine.draw(10, 11, 12), strict=True):
        assert abs(np.frombuffer(before, np.uint8).astype(int) - np.frombuffer(after, np.uint8)).max() <= 1


def test_pings_are_answered_while_a_change_is_made_and_calls_wait_for_its_end():
    engine = Engine()
    entered, leave = threading.Event(), threading.Event()

    def change() -> None:
        entered.set()
        assert leave.wait(30)

    engine.loop.when_idle(change)
    engine.run()
    assert entered.wait(30)
    engine.loop.post(Ping())
    engine.loop.post(Submit([Job(0, "a robot", "1step-unet", 1, 7, 128, 128, time.monotonic() + 60)]))
    assert eventually(lambda: any(isinstance(each, Report) for each in engine.sent), 10)
    time.sleep(0.3)
    assert engine.done() == {}
    leave.set()
    assert eventually(lambda: 0 in engine.done(), 30)


def test_where_a_compiler_fails_the_rest_is_compiled_and_service_goes_on_without(monkeypatch, capfd):
    engine, tried = Engine(), []

    def compiler(function):
        tried.append(function)
        if function is engine.pipeline.vae:
            raise RuntimeError("no such kernel")
        return function

    monkeypatch.setattr(cuda, "compiled", compiler)
    engine.run()
    before = engine.draw(0)
    cuda.compile_later(engine.loop, lambda: engine.measure([1]))
    assert eventually(lambda: len(tried) == 2 and engine.steps.often == cuda.SEEN_OFTEN, 30)
    assert "no such kernel" in capfd.readouterr().err
    assert engine.draw(10) == before
    assert not engine.loop.compiled


@pytest.mark.parametrize(
    "error",
    [
        "torch.AcceleratorError('CUDA error: an illegal memory access was encountered')",
        "RuntimeError('CUDA error: device-side assert triggered')",
    ],
)
def test_an_error_that_loses_the_device_ends_the_process(error):
    lines = f"""
import torch
from app.engine.calls import Call, make
def work(rows): raise {error}
make(Call("denoise", [], work, print))
"""
    done = subprocess.run([sys.executable, "-c", lines], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 70
    assert "the device is lost" in done.stderr


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("no"), RuntimeError("CUDA error: out of memory"), ValueError("a row")]
)
def test_no_other_error_does(error):
    def work(rows: list) -> None:
        raise error

    assert make(Call("denoise", [], work, print))[0] is error


def test_compiled_code_comes_in_beside_the_service_and_pictures_stay_the_same(monkeypatch):
    engine, compiled = Engine(), []
    monkeypatch.setattr(cuda, "compiled", lambda function: compiled.append(function) or function)  # no Inductor here
    engine.run()
    before = engine.draw(0)
    cuda.compile_later(engine.loop, lambda: engine.measure([1, 2, 4]))
    assert eventually(lambda: engine.loop.compiled, 30)
    assert len(compiled) == 2
    assert sorted(engine.loop.costs.step) == [1, 2, 4]  # measured anew
    assert engine.draw(10) == before
