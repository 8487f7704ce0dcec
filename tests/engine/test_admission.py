"""Admission, with a simulated clock: who is let in meets the deadline, and Retry-After is true."""

import heapq
import math
import random
from dataclasses import dataclass, replace

import pytest
from msgspec.structs import replace as replace_cost

from app.engine.admission import Admission, Refusal
from app.engine.costs import Costs
from app.engine.jobs import Row
from app.engine.placement import EngineLoad, place
from app.engine.scheduler import plan
from models.catalog import Style, Weights

COSTS = Costs(step={1: 0.010, 2: 0.013, 4: 0.020, 8: 0.032}, decode={1: 0.01, 8: 0.05}, encode=0.001, pixels=128 * 128)
CAPACITY = 8 / (4 * COSTS.step_seconds(8, 128 * 128) + COSTS.decode_seconds(8, 128 * 128) + 8 * COSTS.encode)


def row(id=0, deadline=30.0, steps=4) -> Row:
    return Row(id, Weights(f"{steps}step-unet"), 128, 128, deadline, steps)


def ask(admission: Admission, new: list[Row], pending: list[Row], who: str = "a", now: float = 0.0) -> Refusal | None:
    return admission.ask([new], [EngineLoad(pending, COSTS)], now, who)


def test_a_burst_of_64_is_admitted_while_its_deadlines_can_be_met():
    admission, pending = Admission(limit=256), []
    for id in range(64):
        assert ask(admission, [row(id)], pending, who=str(id)) is None
        pending.append(row(id))


def test_a_full_queue_refuses_with_a_time_to_come_back():
    refusal = ask(Admission(limit=4), [row(9)], [row(id) for id in range(4)])
    assert refusal is not None
    assert "full" in refusal.reason
    assert refusal.retry_after >= 1


def test_a_flood_from_one_client_books_no_time_for_the_others():
    admission, pending = Admission(limit=4), [row(id) for id in range(4)]
    for _ in range(10_000):
        ask(admission, [row(9)], pending, who="flood")
    other = ask(admission, [row(10)], pending, who="other")
    assert other is not None
    assert other.retry_after <= 15  # the few windows that equal requests are believed to need


def test_a_more_urgent_request_is_refused_where_it_would_make_an_admitted_one_late():
    admission, inside = Admission(limit=1000), []
    while ask(admission, [row(len(inside), deadline=1.0)], inside, who="patient") is None:
        inside.append(row(len(inside), deadline=1.0))
    while ask(admission, [row(len(inside), deadline=0.9)], inside, who="urgent") is None:
        inside.append(row(len(inside), deadline=0.9))
    assert work_until_done(inside) <= 1.0


@pytest.mark.parametrize(
    ("load", "seconds", "limit", "deadline", "senders", "engines"),
    [
        (1.5, 60, 256, 5.0, None, 1),
        (2.0, 60, 256, 5.0, None, 1),
        (2.0, 60, 128, 5.0, None, 1),
        (2.0, 300, 256, 5.0, None, 1),
        (2.0, 300, 256, 5.0, 1, 1),  # all send the same request from one address
        (2.0, 300, 256, 30.0, 1, 1),
        (2.0, 300, 256, 5.0, 10, 1),  # ten different requests
        (2.0, 60, 32, 5.0, None, 2),
        (2.0, 60, 256, 5.0, 1, 2),
        (2.0, 60, 256, 5.0, None, 4),
    ],
)
def test_who_waits_for_retry_after_is_admitted_95_times_in_100(load, seconds, limit, deadline, senders, engines):
    seen = simulate(load, seconds, limit=limit, deadline=deadline, senders=senders, engines=engines)
    assert seen.returned > 100
    assert seen.admitted_again / seen.returned >= 0.95
    assert seen.late == 0
    assert seen.goodput >= 0.9


def test_clients_that_never_come_back_cost_no_throughput():
    seen = simulate(2.0, 60, returns=False)
    assert seen.late == 0
    assert seen.goodput >= 0.9


def test_a_flood_of_different_requests_that_never_return_keeps_nobody_out():
    """Ten times the capacity from clients that never come back, half of it from clients that do."""
    seen = simulate(0.5, 300, flood=10.0)
    assert seen.returned > 100
    assert seen.admitted_again / seen.returned >= 0.95
    assert seen.goodput >= 0.9
    assert seen.glances > 1000
    assert seen.longest_wait <= 400  # without a memory for who comes back: the horizon, half an hour


def test_one_refusal_tells_of_the_next_but_not_of_who_has_more_time_or_a_place():
    admission, pending = Admission(limit=1000), [row(id, deadline=1.0) for id in range(200)]
    assert admission.glance(200, 1, 1.0, 0.0, who="a") is None  # nobody was refused yet
    refusal = ask(admission, [row(300, deadline=1.0)], pending)
    told = admission.glance(200, 1, 1.0, 0.1, who="b")
    assert refusal is not None
    assert told is not None
    assert told.retry_after >= refusal.retry_after
    assert admission.glance(200, 1, 30.0, 0.1, who="c") is None
    assert admission.glance(200, 1, 0.1, 0.1, who="c") is None  # it would be drawn before the others
    assert admission.glance(1000, 1, 30.0, 0.1, who="c") is not None  # the queue is full for everybody
    back = 0.1 + told.retry_after
    ask(admission, [row(301, deadline=back + 0.5)], pending, "d", back)
    assert admission.glance(200, 1, 0.5, back, who="e") is not None
    assert admission.glance(200, 1, 0.5, back, who="b") is None
    assert admission.glance(200, 1, 0.5, back + 1.0, who="e") is None  # that was too long ago to tell


def test_of_several_engines_one_with_a_place_is_enough():
    admission, late, idle = Admission(limit=1000), [row(id, deadline=1.0) for id in range(200)], []
    new = [row(300, deadline=1.0)]
    assert admission.ask([new, []], [EngineLoad(late, COSTS), EngineLoad(idle, COSTS)], 0.0, who="a") is not None
    assert admission.glance(200, 2, 1.0, 0.1, who="b") is None
    assert admission.ask([new, []], [EngineLoad(late, COSTS)] * 2, 0.0, who="a") is not None
    assert admission.glance(400, 2, 1.0, 0.1, who="b") is not None
    assert admission.glance(400, 2, math.inf, 0.1, who="b") is None  # not read yet, and the queue is not full
    assert admission.glance(2000, 2, math.inf, 0.1, who="b") is not None


@dataclass
class Seen:
    """What became of a simulated load. glances: refusals that needed no look at the request.
    late: admitted and then refused. goodput: of the capacity."""

    glances: int = 0
    returned: int = 0
    admitted_again: int = 0
    late: int = 0
    goodput: float = 0.0
    longest_wait: int = 0


def simulate(
    load: float,
    seconds: float,
    returns: bool = True,
    limit: int = 256,
    deadline: float = 5.0,
    senders: int | None = None,
    flood: float = 0.0,
    engines: int = 1,
) -> Seen:
    """Poisson arrivals at `load` times the capacity against the real Admission, placement and schedulers, on a
    simulated clock. senders: how many different fingerprints there are; None: as many as clients. flood: as load, of
    others who never come back. Who does comes up to half a second after its time."""
    random.seed(7)
    costs = COSTS.scaled(4)  # 11 pictures a second and engine: less to simulate
    capacity = engines * CAPACITY / 4
    admission, seen = Admission(limit), Seen()
    boards: list[dict[int, Row]] = [{} for _ in range(engines)]
    arrivals: list[tuple[float, int, bool]] = []
    time, id = 0.0, 0
    while time < seconds:
        time += random.expovariate((load + flood) * capacity)
        id += 1
        arrivals.append((time, id, False))
    floods = {id for _, id, _ in arrivals if random.random() < flood / (load + flood)}
    heapq.heapify(arrivals)
    served = 0
    clocks = [(0.0, engine) for engine in range(engines)]  # when each engine may begin its next call
    while clocks[0][0] < seconds:
        now, engine = heapq.heappop(clocks)
        board = boards[engine]
        while arrivals and arrivals[0][0] <= now:
            at, id, is_return = heapq.heappop(arrivals)
            asked = Row(id, Weights("4step-unet"), 128, 128, at + deadline, 4)
            who = str(id % senders if senders else id)
            loads = [EngineLoad(list(rows.values()), costs) for rows in boards]
            placed = place([asked], loads)
            refusal = admission.glance(sum(map(len, boards)), engines, asked.deadline - now, now, who)
            seen.glances += refusal is not None
            refusal = refusal or admission.ask(placed, loads, now, who)
            seen.returned += is_return
            if refusal is None:
                boards[next(number for number, rows in enumerate(placed) if rows)][id] = asked
                seen.admitted_again += is_return
            elif returns and not is_return and id not in floods:
                seen.longest_wait = max(seen.longest_wait, refusal.retry_after)
                if at + refusal.retry_after < seconds:
                    heapq.heappush(arrivals, (at + refusal.retry_after + random.random() * 0.5, id, True))
        todo = plan(list(board.values()), costs, now)
        seen.late += len(todo.refuse)
        for row in (*todo.refuse, *todo.decode):
            del board[row.id]
        served += len(todo.decode)
        for row in todo.step:
            board[row.id] = replace(row, steps_left=row.steps_left - 1)
        if todo.step:
            now += costs.step_seconds(len(todo.step), 128 * 128) + costs.encode
        if todo.decode:
            now += costs.decode_seconds(len(todo.decode), 128 * 128)
        if not (todo.step or todo.decode):
            now = max(now + 0.001, arrivals[0][0]) if arrivals else seconds
        heapq.heappush(clocks, (now, engine))
    seen.goodput = served / capacity / seconds
    return seen


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


def test_styles_that_must_be_added_first_are_a_part_of_the_price():
    def styled(id: int, deadline: float = 30.0) -> Row:
        return replace(row(id, deadline), weights=Weights("4step-unet", (Style("line", 0.8),)))

    missing = replace_cost(COSTS, style=0.3)
    here = replace_cost(missing, held=frozenset([styled(0).weights]))
    assert missing.alone(styled(0)) == pytest.approx(here.alone(styled(0)) + 0.3)
    alike = [styled(id) for id in range(4)]
    assert missing.work(alike) == pytest.approx(here.work(alike) + 0.3)  # once for all of them
    for costs, is_in in ((missing, False), (here, True)):
        refusal = Admission(limit=256).ask([[styled(0, deadline=0.3)]], [EngineLoad([], costs)], 0.0, who="a")
        assert (refusal is None) == is_in
