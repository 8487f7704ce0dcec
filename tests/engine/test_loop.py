"""The engine's loop with the real model: faults stay with their row, loads stay out of the way, memory is learned."""

import threading
import time

import pytest
import torch
from safetensors.torch import load_file

from app.engine.costs import Costs
from app.engine.jobs import Job
from app.engine.loop import Loop
from app.engine.messages import Cancel, Done, Failed, FromEngine, Measured, Ping, Report, Submit
from models.catalog import CATALOG
from models.pipeline import Pipeline
from models.registry import Registry, Tier
from models.weights import WeightStore

FAMILY = CATALOG["embedded"]
COSTS = Costs(step={1: 0.01, 2: 0.01, 4: 0.01, 8: 0.01}, decode={1: 0.01, 8: 0.02}, encode=0.0, pixels=128 * 128)
LATER = time.monotonic() + 3600


def job(id: int, prompt: str = "a red apple", variant: str = "2step-unet", deadline: float = LATER) -> Job:
    return Job(id, prompt, variant, FAMILY.variants[variant].steps, id, 128, 128, deadline)


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline(WeightStore(FAMILY), "cpu", torch.float32)


class Sent(list[FromEngine]):
    """What the loop sent, and the ids in it by kind."""

    def done(self) -> set[int]:
        return {message.id for message in self if isinstance(message, Done)}

    def failed(self) -> dict[int, str]:
        return {message.id: message.code for message in self if isinstance(message, Failed)}


def make_loop(pipeline: Pipeline, *resident: str, directory=None) -> tuple[Loop, Sent]:
    registry = Registry(WeightStore(FAMILY, directory), "cpu", torch.float32, [Tier("cpu", 1 << 40)])
    for name in resident:
        registry.load(name)
    sent = Sent()
    return Loop(pipeline, registry, COSTS, sent.append), sent


def serve(loop: Loop, sent: Sent, count: int, seconds: float = 60) -> None:
    """Let two lanes work until `count` jobs have ended."""
    for _ in range(2):
        threading.Thread(target=loop.serve, daemon=True).start()
    end = time.monotonic() + seconds
    while len(sent.done()) + len(sent.failed()) < count and time.monotonic() < end:
        time.sleep(0.005)


def test_a_row_that_fails_fails_alone(pipeline):
    loop, sent = make_loop(pipeline, "2step-unet")
    poison = "\ud800"  # no tokenizer takes it; HTTP would have refused it
    loop.post(Submit([job(0), job(1), job(2, poison), job(3), job(4)]))
    serve(loop, sent, 5)
    assert sent.failed() == {2: "failed"}
    assert sent.done() == {0, 1, 3, 4}


def test_a_cancelled_row_leaves_and_its_neighbours_stay(pipeline):
    loop, sent = make_loop(pipeline, "2step-unet")
    loop.post(Submit([job(0), job(1), job(2)]))
    loop.post(Cancel([1]))
    serve(loop, sent, 2)
    assert (sent.done(), sent.failed(), loop.board) == ({0, 2}, {}, {})


def test_a_variant_is_loaded_at_its_first_request_while_others_are_served(pipeline):
    loop, sent = make_loop(pipeline, "2step-unet")
    loop.post(Submit([job(0, variant="4step-lora"), job(1)]))
    serve(loop, sent, 2)
    assert sent.done() == {0, 1}
    assert loop.registry.is_resident("4step-lora")


def test_a_variant_that_cannot_be_loaded_fails_its_own_rows_only(pipeline, embedded_copy):
    broken = embedded_copy / FAMILY.variants["8step-unet"].file
    broken.write_bytes(broken.read_bytes()[:5000])
    loop, sent = make_loop(pipeline, "2step-unet", directory=embedded_copy)
    loop.post(Submit([job(0, variant="8step-unet"), job(1)]))
    serve(loop, sent, 2)
    assert (sent.done(), sent.failed()) == ({1}, {0: "variant_unavailable"})


def test_a_row_whose_variant_is_not_there_in_time_is_told_that_it_loads(pipeline):
    loop, sent = make_loop(pipeline)
    loop.post(Submit([job(0, deadline=time.monotonic() - 1)]))
    serve(loop, sent, 1)
    assert sent.failed() == {0: "loading"}


def test_a_row_past_its_deadline_is_never_drawn(pipeline):
    loop, sent = make_loop(pipeline, "2step-unet")
    loop.post(Submit([job(0, deadline=time.monotonic() - 1), job(1)]))
    serve(loop, sent, 2)
    assert (sent.done(), sent.failed()) == ({1}, {0: "expired"})


def test_out_of_memory_halves_the_batch_and_loses_nothing(pipeline):
    loop, sent = make_loop(pipeline, "2step-unet")
    unet = loop.registry.use("2step-unet")

    def small_device(latents, *rest):
        if len(latents) > 3:
            raise torch.OutOfMemoryError
        return unet(latents, *rest)

    loop.registry.use_compiled(lambda weight_set: small_device)
    loop.post(Submit([job(id) for id in range(8)]))
    serve(loop, sent, 8)
    assert (sent.done(), sent.failed()) == (set(range(8)), {})
    learned = [message.costs for message in sent if isinstance(message, Measured)]
    assert max(learned[-1].step) == 2


def test_pictures_drawn_around_faults_are_the_ones_drawn_alone(pipeline):
    loop, sent = make_loop(pipeline, "2step-unet")
    loop.post(Submit([job(5)]))
    serve(loop, sent, 1)
    alone = sent[-1] if isinstance(sent[-1], Done) else next(m for m in sent if isinstance(m, Done))
    mixed, mixed_sent = make_loop(pipeline, "2step-unet")
    mixed.post(Submit([job(4), job(5), job(6, "\ud800")]))
    serve(mixed, mixed_sent, 3)
    among = next(message for message in mixed_sent if isinstance(message, Done) and message.id == 5)
    difference = torch.frombuffer(bytearray(alone.pixels), dtype=torch.uint8).int()
    difference -= torch.frombuffer(bytearray(among.pixels), dtype=torch.uint8).int()
    assert difference.abs().max() <= 1


def test_a_ping_is_answered_between_two_turns(pipeline):
    loop, sent = make_loop(pipeline, "2step-unet")
    loop.post(Ping())
    serve(loop, sent, 0)
    while not sent:
        time.sleep(0.005)
    report = next(message for message in sent if isinstance(message, Report))
    resident = {row.name: row.resident_bytes for row in report.variants if row.state == "resident"}
    on_disk = sum(t.nbytes for t in load_file(FAMILY.directory / FAMILY.variants["2step-unet"].file).values())
    assert resident == {"2step-unet": 2 * on_disk}  # float16 on disk, float32 here
