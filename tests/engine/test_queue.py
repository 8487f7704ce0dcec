"""What one request hears of its jobs."""

import time

import msgspec
import pytest

from app.engine.costs import Costs
from app.engine.jobs import Job
from app.engine.messages import Done, Preview
from app.engine.queue import Queue
from models.catalog import Weights


def job(id: int) -> Job:
    return Job(id, "an apple", Weights("8step-unet"), 8, id, 128, 128, time.monotonic() + 60, previews=True)


async def test_who_lags_misses_previews_and_nothing_else():
    queue, jobs = Queue(), [job(1), job(2)]
    ticket = queue.put(jobs, {each.id: 0 for each in jobs}, wants_steps=False)
    done = [Done(each.id, "8step-unet", 128, 128, b"", {}, [], [], False) for each in jobs]
    for step in range(1, 8):
        queue.shown(Preview(1, step, 16, 16, b""))
    queue.shown(Preview(2, 1, 16, 16, b""))
    queue.settle(1, done[0])
    queue.settle(2, done[1])
    queue.shown(Preview(1, 8, 16, 16, b""))
    heard = [await ticket.next() for _ in range(4)]
    assert [(each.id, each.step) for each in heard[:2] if isinstance(each, Preview)] == [(1, 7), (2, 1)]
    assert heard[2:] == done


def test_how_long_a_row_waits_follows_from_what_goes_before_it():
    """All of another group; of its own only what leaves it no place in a batch."""
    costs = Costs(step={1: 0.1, 2: 0.1}, decode={1: 0.2}, encode=0.0, pixels=128 * 128)  # 2 is the best batch
    own, other = [job(id).row() for id in range(1, 5)], msgspec.structs.replace(job(9), weights=Weights("x")).row()
    assert costs.wait(own[3], []) == costs.wait(own[3], own[:1]) == 0
    assert costs.wait(own[3], own[:3]) == pytest.approx(costs.work(own[:2]))
    assert costs.wait(own[3], [other]) == pytest.approx(8 * 0.1 + 0.2)
