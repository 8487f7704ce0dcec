"""What a GPU is given beside the service, given to a CPU: code that takes the place of recorded code, one by one."""

import threading
import time
from functools import partial

import torch

from app.engine import cuda
from app.engine.costs import Costs
from app.engine.jobs import Job
from app.engine.loop import Loop
from app.engine.messages import Done, FromEngine, Submit
from app.engine.warmup import measure
from models.catalog import CATALOG
from models.graphs import Graphed, by_calling
from models.pipeline import Pipeline, advance
from models.registry import Registry, Tier
from models.weights import WeightStore
from tests.conftest import eventually

STORE = WeightStore(CATALOG["embedded"])
COSTS = Costs(step={1: 0.01, 2: 0.01}, decode={1: 0.01, 2: 0.01}, encode=0.0, pixels=128 * 128)


def test_compiled_code_comes_in_beside_the_service_and_pictures_stay_the_same(monkeypatch):
    pipeline, registry = (
        Pipeline(STORE, "cpu", torch.float32),
        Registry(STORE, "cpu", torch.float32, [Tier("cpu", 1 << 40)]),
    )
    registry.static = True
    registry.load("1step-unet")
    pipeline.text, pipeline.decoder = Graphed(pipeline.text, by_calling), Graphed(pipeline.decoder, by_calling)
    pipeline.steps[registry.unet] = Graphed(partial(advance, registry.unet), by_calling)
    measure(pipeline, registry, "1step-unet", 128, 2, 1)
    compiled = []
    monkeypatch.setattr(cuda, "compiled", lambda function: compiled.append(function) or function)  # no Inductor here
    sent: list[FromEngine] = []
    loop = Loop(pipeline, registry, COSTS, sent.append)
    for _ in range(2):
        threading.Thread(target=loop.serve, daemon=True).start()

    def draw(id: int) -> bytes:
        loop.post(Submit([Job(id, "a robot", "1step-unet", 1, 7, 128, 128, time.monotonic() + 60)]))
        assert eventually(lambda: any(isinstance(each, Done) and each.id == id for each in sent), 30)
        return next(each.pixels for each in sent if isinstance(each, Done) and each.id == id)

    before = draw(0)
    cuda.compile_later(loop, lambda: measure(pipeline, registry, "1step-unet", 128, 4, 1))
    assert eventually(lambda: loop.compiled, 30)
    assert len(compiled) == 2
    assert sorted(loop.costs.step) == [1, 2, 4]  # measured anew
    assert draw(1) == before
