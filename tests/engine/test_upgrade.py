"""What a GPU is given beside the service, given to a CPU: code that takes the place of recorded code, one by one."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch

from app.engine import upgrade
from app.engine.calls import Call, make
from app.engine.jobs import Job
from app.engine.load import Model
from app.engine.loop import Loop
from app.engine.messages import Done, FromEngine, Measured, Ping, Report, Submit
from models.catalog import CATALOG, Weights
from models.device import Tier
from models.gpu.graphs import Graphed
from models.gpu.prepare import SEEN_OFTEN
from models.pipeline import Pipeline
from models.registry import Registry
from models.weights import WeightStore
from tests.conftest import ROOT, eventually
from tests.engine.conftest import running
from tests.models.gpu_way import GpuWay

STORE = WeightStore(CATALOG["embedded"])


class Engine:
    """A loop of two worker threads over functions that are recorded by calling, with what it sent."""

    def __init__(self, *batches: int) -> None:
        device = GpuWay()
        self.pipeline = Pipeline(STORE, device, torch.float32)
        registry = Registry(STORE, device, torch.float32, [Tier("cpu", 1 << 40)])
        registry.load(Weights("1step-unet"))
        device.prepare(self.pipeline, registry)
        self.steps = self.pipeline.steps[registry.unet]
        self.model = Model(self.pipeline, registry, 2, batches)
        self.sent: list[FromEngine] = []
        self.loop = Loop(self.pipeline, registry, self.model.measure([1]), self.sent.append)

    def draw(self, *ids: int) -> list[bytes]:
        end = time.monotonic() + 60
        self.loop.post(Submit([Job(id, "a robot", Weights("1step-unet"), 1, id % 10, 128, 128, end) for id in ids]))
        assert eventually(lambda: self.done().keys() >= set(ids), 30)
        return [self.done()[id] for id in ids]

    def done(self) -> dict[int, bytes]:
        return {each.id: each.pixels for each in list(self.sent) if isinstance(each, Done)}


def buckets(graphed: Callable) -> list[int]:
    assert isinstance(graphed, Graphed)
    return sorted(bucket for bucket, _ in graphed._graphs)


def test_larger_batches_are_recorded_beside_the_service_and_measured_then():
    engine = Engine(1, 2, 4, 8)
    assert (buckets(engine.steps), buckets(engine.pipeline.decoder), sorted(engine.loop.costs.step)) == ([1], [1], [1])
    upgrade.add_batches(engine.loop, engine.model)
    with running(engine.loop):
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
    with running(engine.loop):
        assert entered.wait(30)
        engine.loop.post(Ping())
        engine.loop.post(Submit([Job(0, "a robot", Weights("1step-unet"), 1, 7, 128, 128, time.monotonic() + 60)]))
        assert eventually(lambda: any(isinstance(each, Report) for each in engine.sent), 10)
        time.sleep(0.3)
        assert engine.done() == {}
        leave.set()
        assert eventually(lambda: 0 in engine.done(), 30)


def test_where_a_compiler_fails_the_rest_is_compiled_and_service_goes_on_without(monkeypatch, caplog, tmp_path):
    engine, tried = Engine(1), []

    def compiler(function):
        tried.append(function)
        if function is engine.pipeline.vae:
            raise RuntimeError("no such kernel")
        return function

    monkeypatch.setattr(upgrade, "compiled_for_gpu", compiler)
    with running(engine.loop):
        before = engine.draw(0)
        upgrade.compile_graphs(engine.loop, engine.model, str(tmp_path))
        assert eventually(lambda: len(tried) == 2 and engine.steps.often == SEEN_OFTEN, 30)
        assert any("no such kernel" in str(vars(record)) for record in caplog.records)
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
from models.gpu.device import Gpu
def work(rows): raise {error}
make(Call("denoise", [], work, print), Gpu)
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

    assert make(Call("denoise", [], work, print), GpuWay())[0] is error


def test_compiled_code_comes_in_beside_the_service_and_pictures_stay_the_same(monkeypatch, tmp_path):
    engine, compiled = Engine(1, 2, 4), []
    monkeypatch.setattr(
        upgrade, "compiled_for_gpu", lambda function: compiled.append(function) or function
    )  # no Inductor here
    with running(engine.loop):
        before = engine.draw(0)
        upgrade.compile_graphs(engine.loop, engine.model, str(tmp_path))
        assert eventually(lambda: engine.loop.compiled, 30)
        assert len(compiled) == 2
        assert sorted(engine.loop.costs.step) == [1, 2, 4]  # measured anew
        assert engine.draw(10) == before


def test_engines_compile_one_after_the_other(tmp_path):
    order: list[str] = []

    def second() -> None:
        with upgrade.one_at_a_time(str(tmp_path)):
            order.append("second")

    with upgrade.one_at_a_time(str(tmp_path)):
        waiting = threading.Thread(target=second)
        waiting.start()
        waiting.join(0.2)
        order.append("first")
    waiting.join()
    assert order == ["first", "second"]
