"""The door, with a simulated clock: who is let in meets the deadline, and Retry-After is true."""

import heapq
import random
from dataclasses import replace

import pytest

from app.engine.admission import Door
from app.engine.costs import Costs
from app.engine.jobs import Row
from app.engine.scheduler import plan

COSTS = Costs(step={1: 0.010, 2: 0.013, 4: 0.020, 8: 0.032}, decode={1: 0.01, 8: 0.05}, encode=0.001, pixels=128 * 128)
CAPACITY = 8 / (4 * COSTS.step_seconds(8, 128 * 128) + COSTS.decode_seconds(8, 128 * 128) + 8 * COSTS.encode)


def row(id=0, deadline=30.0, steps=4) -> Row:
    return Row(id, f"{steps}step-unet", 128, 128, deadline, steps)


def test_a_burst_of_64_is_admitted_while_its_deadlines_can_be_met():
    door, pending = Door(limit=256), []
    for id in range(64):
        assert door.ask([row(id)], pending, COSTS, 0.0, who=str(id)) is None
        pending.append(row(id))


def test_a_full_queue_refuses_with_a_time_to_come_back():
    refusal = Door(limit=4).ask([row(9)], [row(id) for id in range(4)], COSTS, 0.0, who="a")
    assert refusal is not None
    assert "full" in refusal.reason
    assert refusal.retry_after >= 1


def test_a_flood_from_one_client_books_no_time_for_the_others():
    door, pending = Door(limit=4), [row(id) for id in range(4)]
    for _ in range(10_000):
        door.ask([row(9)], pending, COSTS, 0.0, who="flood")
    other = door.ask([row(10)], pending, COSTS, 0.0, who="other")
    assert other is not None
    assert other.retry_after <= 5


def test_a_more_urgent_request_is_refused_where_it_would_make_an_admitted_one_late():
    door, inside = Door(limit=1000), []
    while door.ask([row(len(inside), deadline=1.0)], inside, COSTS, 0.0, who="patient") is None:
        inside.append(row(len(inside), deadline=1.0))
    while door.ask([row(len(inside), deadline=0.9)], inside, COSTS, 0.0, who="urgent") is None:
        inside.append(row(len(inside), deadline=0.9))
    assert work_until_done(inside) <= 1.0


@pytest.mark.parametrize(("load", "limit"), [(1.5, 256), (2.0, 256), (2.0, 128)])
def test_who_waits_for_retry_after_is_admitted_95_times_in_100(load, limit):
    returned, admitted_again, late, served = simulate(load, seconds=60, returns=True, limit=limit)
    assert returned > 100
    assert admitted_again / returned >= 0.95
    assert late == 0
    assert served >= 0.9 * CAPACITY * 60


def test_clients_that_never_come_back_cost_no_throughput():
    _, _, late, served = simulate(2.0, seconds=60, returns=False)
    assert late == 0
    assert served >= 0.9 * CAPACITY * 60


def simulate(load: float, seconds: float, returns: bool, limit: int = 256) -> tuple[int, int, int, int]:
    """Poisson arrivals at `load` times the capacity against the real door and the real scheduler, on a simulated clock.
    Returns how many came back, were admitted on coming back, were refused after admission, were served."""
    random.seed(7)
    door, board = Door(limit), {}
    arrivals: list[tuple[float, int, bool]] = []
    time, id = 0.0, 0
    while time < seconds:
        time += random.expovariate(load * CAPACITY)
        id += 1
        arrivals.append((time, id, False))
    heapq.heapify(arrivals)
    returned = again = late = served = 0
    now = 0.0
    while now < seconds:
        while arrivals and arrivals[0][0] <= now:
            at, id, is_return = heapq.heappop(arrivals)
            asked = Row(id, "4step-unet", 128, 128, at + 5.0, 4)
            refusal = door.ask([asked], list(board.values()), COSTS, now, who=str(id))
            returned += is_return
            if refusal is None:
                board[id] = asked
                again += is_return
            elif returns and not is_return and at + refusal.retry_after < seconds:
                heapq.heappush(arrivals, (at + refusal.retry_after + random.random() * 0.2, id, True))
        todo = plan(list(board.values()), COSTS, now)
        late += len(todo.refuse)
        for row in (*todo.refuse, *todo.decode):
            del board[row.id]
        served += len(todo.decode)
        for row in todo.step:
            board[row.id] = replace(row, steps_left=row.steps_left - 1)
        if todo.step:
            now += COSTS.step_seconds(len(todo.step), 128 * 128) + COSTS.encode
        if todo.decode:
            now += COSTS.decode_seconds(len(todo.decode), 128 * 128)
        if not (todo.step or todo.decode):
            now = arrivals[0][0] if arrivals else seconds
    return returned, again, late, served


def work_until_done(rows: list[Row]) -> float:
    """When the scheduler has drawn all of them; a row that would be late fails the test."""
    now, board = 0.0, {row.id: row for row in rows}
    while board:
        todo = plan(list(board.values()), COSTS, now)
        assert not todo.refuse
        for row in todo.decode:
            del board[row.id]
        for row in todo.step:
            board[row.id] = replace(row, steps_left=row.steps_left - 1)
        now += COSTS.step_seconds(len(todo.step), 128 * 128) if todo.step else 0
        now += COSTS.decode_seconds(len(todo.decode), 128 * 128) if todo.decode else 0
    return now
