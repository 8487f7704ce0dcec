"""The engine's loop with the real model: faults stay with their row, loads stay out of the way, memory is learned."""

import time
from dataclasses import replace

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from app.engine.costs import Costs
from app.engine.jobs import Job, Source
from app.engine.loop import Loop
from app.engine.messages import Cancel, Done, Failed, FromEngine, Measured, Ping, Preview, Report, Submit
from app.engine.queue import Queue, Stepped
from app.errors import UNAVAILABLE
from models.catalog import CATALOG, Weights
from models.device import Device, Tier
from models.pipeline import Pipeline
from models.registry import Registry
from models.weights import WeightStore
from tests.conftest import eventually
from tests.engine.conftest import running
from tests.models import oracle

FAMILY = CATALOG["embedded"]
COSTS = Costs(step={1: 0.01, 2: 0.01, 4: 0.01, 8: 0.01}, decode={1: 0.01, 8: 0.02}, encode=0.0, pixels=128 * 128)
LATER = time.monotonic() + 3600


def job(id: int, prompt: str = "a red apple", variant: str = "2step-unet", deadline: float = LATER) -> Job:
    return Job(id, prompt, Weights(variant), FAMILY.variants[variant].steps[0], id, 128, 128, deadline)


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline(WeightStore(FAMILY), Device(), torch.float32)


class Sent(list[FromEngine]):
    """What the loop sent, and the ids in it by kind."""

    def done(self) -> set[int]:
        return {message.id for message in self if isinstance(message, Done)}

    def failed(self) -> dict[int, str]:
        return {message.id: message.cause for message in self if isinstance(message, Failed)}


def pictures(sent: Sent) -> list[torch.Tensor]:
    """The pixels, by id."""
    done = sorted((message for message in sent if isinstance(message, Done)), key=lambda message: message.id)
    return [torch.frombuffer(bytearray(message.pixels), dtype=torch.uint8).int() for message in done]


def make_loop(pipeline: Pipeline, *resident: str, directory=None, budgets=(1 << 40,)) -> tuple[Loop, Sent]:
    tiers = [Tier("cpu", budget) for budget in budgets]
    registry = Registry(WeightStore(FAMILY, directory), Device(), torch.float32, tiers)
    for name in resident:
        registry.load(Weights(name))
    sent = Sent()
    return Loop(pipeline, registry, COSTS, sent.append), sent


def serve(loop: Loop, sent: Sent, count: int, seconds: float = 120) -> None:
    """Let two workers work until `count` jobs have ended, and leave."""
    with running(loop):
        eventually(lambda: len(sent.done()) + len(sent.failed()) >= count, seconds)


def test_a_row_that_fails_fails_alone(pipeline):
    loop, sent = make_loop(pipeline, "2step-unet")
    poison = "\ud800"  # no tokenizer takes it; HTTP would have refused it
    loop.post(Submit([job(0), job(1), job(2, poison), job(3), job(4)]))
    serve(loop, sent, 5)
    assert sent.failed() == {2: "FAILED"}
    assert sent.done() == {0, 1, 3, 4}


@pytest.mark.parametrize("steps", [1, 2, 8])
def test_who_looks_on_changes_nothing(pipeline, steps):
    """The same pixels, bit for bit, with a preview of each step but the last and without."""
    drawn = []
    for previews in (False, True):
        loop, sent = make_loop(pipeline, f"{steps}step-unet")
        loop.post(Submit([msgspec.structs.replace(job(7, variant=f"{steps}step-unet"), previews=previews)]))
        serve(loop, sent, 1)
        seen = [(each.step, each.height, each.width, len(each.pixels)) for each in sent if isinstance(each, Preview)]
        assert seen == [(step, 16, 16, 16 * 16 * 3) for step in range(1, steps) if previews]
        drawn += pictures(sent)
    assert drawn[0].equal(drawn[1])


def test_a_row_survives_a_neighbour_that_failed_with_it_and_left_meanwhile(pipeline, monkeypatch):
    loop, sent = make_loop(pipeline, "2step-unet")
    encode = pipeline.prompts.encode

    def fails_once_together(prompts, owners):
        if len(prompts) > 1:
            loop.post(Cancel([1]))
            raise RuntimeError("two at a time are too many")
        return encode(prompts, owners)

    monkeypatch.setattr(pipeline.prompts, "encode", fails_once_together)
    loop.post(Submit([job(0), job(1)]))
    serve(loop, sent, 1)
    assert (sent.done(), sent.failed()) == ({0}, {})


def test_nobody_learns_from_the_time_whether_another_has_asked_for_a_prompt(pipeline):
    """Owners share no cache: a prompt that one has asked for is encoded anew for the next."""
    encoded = []
    text = pipeline.text
    pipeline.text = lambda *ids: encoded.append(len(ids[0])) or text(*ids)
    for owner in ("a", "b", "a"):
        pipeline.prompts.encode(["a secret prompt"], [owner])
    pipeline.text = text
    assert encoded == [1, 1]


def over(id: int, strength: float, source: int, variant: str = "4step-unet") -> Job:
    return msgspec.structs.replace(job(id, variant=variant), strength=strength, source=source)


def test_rows_that_draw_over_a_picture_take_only_their_own_steps_and_it_is_encoded_once_for_all(pipeline, monkeypatch):
    loop, sent = make_loop(pipeline, "4step-unet")
    looked = []
    look = pipeline.look
    monkeypatch.setattr(pipeline, "look", lambda *picture: looked.append(picture) or look(*picture))
    source = Source(bytes(oracle.IMAGE.numpy()), bytes(oracle.MASK.numpy()))
    loop.post(Submit([over(0, 0.5, 0), over(1, 0.5, 0)], source))
    loop.post(Submit([job(2, variant="4step-unet")]))
    loop.post(Submit([over(3, 0.25, 3)], Source(source.image)))
    serve(loop, sent, 4)
    assert (sent.failed(), len(looked)) == ({}, 2)
    assert {message.id: len(message.batches) for message in sent if isinstance(message, Done)} == {
        0: 2,
        1: 2,
        2: 4,
        3: 1,
    }


def test_a_picture_that_cannot_be_encoded_fails_its_own_rows_only(pipeline):
    loop, sent = make_loop(pipeline, "4step-unet")
    loop.post(Submit([over(0, 0.5, 0), over(1, 0.5, 0)], Source(b"too short")))
    loop.post(Submit([job(2, variant="4step-unet")]))
    serve(loop, sent, 3)
    assert (sent.done(), sent.failed()) == ({2}, {0: "FAILED", 1: "FAILED"})


async def test_a_request_is_told_of_the_steps_that_are_taken(pipeline):
    queue, jobs = Queue(), [over(0, 0.5, 0)]
    ticket = queue.put(jobs, {each.id: 0 for each in jobs}, wants_steps=True)
    assert (queue.rows(1)[0][0].steps_left, queue.rows(1)[0][0].is_encoded) == (2, False)
    for step in (1, 2):
        queue.stepped([0])
        assert await ticket.next() == Stepped(0, step)
    assert (queue.rows(1)[0][0].steps_left, queue.rows(1)[0][0].is_encoded) == (0, True)


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
    assert loop.registry.is_resident(Weights("4step-lora"))


def test_a_variant_that_cannot_be_loaded_fails_its_own_rows_only(pipeline, embedded_copy):
    broken = embedded_copy / FAMILY.variants["8step-unet"].file
    broken.write_bytes(broken.read_bytes()[:5000])
    loop, sent = make_loop(pipeline, "2step-unet", directory=embedded_copy)
    loop.post(Submit([job(0, variant="8step-unet"), job(1)]))
    serve(loop, sent, 2)
    assert (sent.done(), sent.failed()) == ({1}, {0: "UNAVAILABLE"})


@pytest.mark.parametrize(("seconds", "second"), [(30, {1: "UNAVAILABLE"}), (0, {})])
def test_a_load_that_failed_is_not_tried_again_at_once_and_logged_once(
    pipeline, embedded_copy, monkeypatch, caplog, seconds, second
):
    monkeypatch.setattr("app.engine.loading.UNAVAILABLE", replace(UNAVAILABLE, retry_after=seconds))
    broken = embedded_copy / FAMILY.variants["8step-unet"].file
    whole = broken.read_bytes()
    broken.write_bytes(whole[:5000])
    loop, sent = make_loop(pipeline, "2step-unet", directory=embedded_copy)
    with running(loop):
        loop.post(Submit([job(0, variant="8step-unet")]))
        assert eventually(lambda: bool(sent.failed()))
        broken.write_bytes(whole)
        loop.post(Submit([job(1, variant="8step-unet")]))
        assert eventually(lambda: len(sent.done()) + len(sent.failed()) == 2)
    assert sent.failed() == {0: "UNAVAILABLE", **second}
    assert caplog.messages.count("weights cannot be loaded") == 1


def test_more_variants_than_two_tiers_hold_are_all_served_and_evicted_in_turn(pipeline):
    names = ("1step-unet", "2step-unet", "4step-unet", "2step-lora", "4step-lora")
    jobs = [job(id, variant=names[id % 5]) for id in range(10)]
    roomy, expected = make_loop(pipeline, *names)
    one_set = max(row.resident_bytes for row in roomy.registry.status())
    tight, sent = make_loop(pipeline, "1step-unet", budgets=(one_set, one_set))
    for loop, out in ((roomy, expected), (tight, sent)):
        loop.post(Submit(jobs))
        serve(loop, out, len(jobs))
        assert out.failed() == {}
    for ours, theirs in zip(pictures(sent), pictures(expected), strict=True):
        assert (ours - theirs).abs().max() <= 1
    held = [row.resident_bytes for row in tight.registry.status() if row.state == "resident"]
    assert (len(held), max(held)) == (2, one_set)


def test_a_load_that_fails_midway_leaves_a_busy_variant_in_place(pipeline, embedded_copy):
    """The only tier is full, and what would push its set out turns out to be broken."""
    path = embedded_copy / FAMILY.variants["4step-lora"].file
    state = load_file(path)
    save_file({key: value[:-1] if key.endswith("lora_up.weight") else value for key, value in state.items()}, path)
    whole, _ = make_loop(pipeline, "2step-unet")
    budget = max(row.resident_bytes for row in whole.registry.status())
    loop, sent = make_loop(pipeline, "2step-unet", directory=embedded_copy, budgets=(budget,))
    loop.post(Submit([job(0), job(1, variant="4step-lora"), job(2)]))
    serve(loop, sent, 3)
    assert (sent.done(), sent.failed()) == ({0, 2}, {1: "UNAVAILABLE"})
    assert loop.registry.is_resident(Weights("2step-unet"))


def test_a_flat_picture_is_a_numeric_fault(embedded_copy):
    path = embedded_copy / "vae" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    save_file({k: torch.zeros_like(v) if k.startswith("decoder.conv_out") else v for k, v in state.items()}, path)
    loop, sent = make_loop(Pipeline(WeightStore(FAMILY, embedded_copy), Device(), torch.float32), "1step-unet")
    loop.post(Submit([job(0, variant="1step-unet")]))
    serve(loop, sent, 1)
    assert (sent.done(), sent.failed()) == (set(), {0: "NUMERIC_FAULT"})


def test_a_row_whose_variant_is_not_there_in_time_is_told_that_it_loads(pipeline):
    loop, sent = make_loop(pipeline)
    loop.post(Submit([job(0, deadline=time.monotonic() - 1)]))
    serve(loop, sent, 1)
    assert sent.failed() == {0: "LOADING"}


def test_a_row_past_its_deadline_is_never_drawn(pipeline):
    loop, sent = make_loop(pipeline, "2step-unet")
    loop.post(Submit([job(0, deadline=time.monotonic() - 1), job(1)]))
    serve(loop, sent, 2)
    assert (sent.done(), sent.failed()) == ({1}, {0: "EXPIRED"})


def test_out_of_memory_halves_the_batch_and_loses_nothing(pipeline):
    loop, sent = make_loop(pipeline, "2step-unet")
    unet = loop.registry.use(Weights("2step-unet"))

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
    mixed, mixed_sent = make_loop(pipeline, "2step-unet")
    mixed.post(Submit([job(4), job(5), job(6, "\ud800")]))
    serve(mixed, mixed_sent, 3)
    assert (pictures(sent)[0] - pictures(mixed_sent)[1]).abs().max() <= 1


def test_a_ping_is_answered_between_two_turns(pipeline):
    loop, sent = make_loop(pipeline, "2step-unet")
    loop.post(Ping())
    loop.post(Submit([job(0)]))
    serve(loop, sent, 1)
    report = next(message for message in sent if isinstance(message, Report))
    resident = {row.name: row.resident_bytes for row in report.variants if row.state == "resident"}
    on_disk = sum(t.nbytes for t in load_file(FAMILY.directory / FAMILY.variants["2step-unet"].file).values())
    assert resident == {"2step-unet": 2 * on_disk}  # float16 on disk, float32 here
