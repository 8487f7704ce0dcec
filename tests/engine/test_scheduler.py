"""The scheduler, with a simulated clock: who is stepped, who is decoded, who is refused."""

from hypothesis import given, settings
from hypothesis import strategies as st

from app.engine.costs import Costs
from app.engine.jobs import Plan, Row
from app.engine.scheduler import plan

FLAT = Costs(step={1: 0.01, 2: 0.01, 4: 0.01, 8: 0.01}, decode={1: 0.01, 8: 0.02}, encode=0.0, pixels=128 * 128)
LINEAR = Costs(step={1: 0.01, 2: 0.02, 4: 0.04, 8: 0.08}, decode={1: 0.01, 8: 0.08}, encode=0.0, pixels=128 * 128)


def row(id=0, steps_left=4, deadline=10.0, variant="4step-unet", side=128) -> Row:
    return Row(id, variant, side, side, deadline, steps_left)


def test_a_new_job_joins_a_running_batch_between_two_steps():
    old, new = row(1, steps_left=3), row(2, steps_left=4)
    assert plan([old, new], FLAT, now=0.0).step == (old, new)


def test_a_finished_row_is_decoded_while_the_others_step_on():
    done, going = row(1, steps_left=0), row(2, steps_left=1)
    todo = plan([done, going], FLAT, now=0.0)
    assert (todo.decode, todo.step) == ((done,), (going,))


def test_rows_of_another_variant_or_size_wait_for_their_own_call():
    first, lora, large = row(1, deadline=1), row(2, variant="4step-lora"), row(3, side=256)
    assert plan([large, lora, first], FLAT, now=0.0).step == (first,)


def test_the_oldest_deadline_chooses_the_group():
    many = [row(id, deadline=9) for id in range(5)]
    oldest = row(9, deadline=8, variant="8step-unet", steps_left=8)
    assert plan([*many, oldest], FLAT, now=0.0).step == (oldest,)


def test_a_row_that_cannot_meet_its_deadline_is_refused_at_once():
    late, good = row(1, steps_left=4, deadline=0.04), row(2)
    todo = plan([late, good], FLAT, now=0.0)
    assert (todo.refuse, todo.step) == ((late,), (good,))


def test_the_batch_is_no_larger_than_what_the_measured_costs_pay_for():
    rows = [row(id) for id in range(20)]
    assert len(plan(rows, FLAT, now=0.0).step) == 8
    assert len(plan(rows, LINEAR, now=0.0).step) == 1


def test_with_nothing_to_do_the_plan_is_empty():
    assert plan([], FLAT, now=0.0) == Plan()


rows = st.lists(
    st.builds(
        Row,
        id=st.integers(0, 10**6),
        variant=st.sampled_from(["1step-unet", "4step-unet", "8step-lora"]),
        height=st.sampled_from([128, 256]),
        width=st.just(128),
        deadline=st.floats(0, 5),
        steps_left=st.integers(0, 8),
    ),
    unique_by=lambda row: row.id,
    max_size=30,
)


@settings(deadline=None)
@given(rows=rows, now=st.floats(0, 5))
def test_nothing_is_planned_twice_and_no_work_is_left_idle(rows, now):
    todo = plan(rows, FLAT, now)
    planned = [*todo.step, *todo.decode, *todo.refuse]
    assert len({row.id for row in planned}) == len(planned)
    live = [row for row in rows if row.steps_left and row not in todo.refuse]
    assert bool(todo.step) == bool(live)
    assert len({row.group for row in todo.step}) <= 1
    assert {row for row in rows if row.steps_left == 0} == set(todo.decode)


@settings(deadline=None)
@given(rows=rows)
def test_every_row_ends_decoded_or_refused_within_its_deadline(rows):
    """The whole life of a queue under the simulated clock: nothing starves, nothing is lost."""
    now, ended, calls = 0.0, set(), 0
    board = {row.id: row for row in rows}
    while board:
        todo = plan(list(board.values()), FLAT, now)
        for row in (*todo.refuse, *todo.decode):
            ended.add(board.pop(row.id).id)
        for row in todo.step:
            board[row.id] = Row(row.id, row.variant, row.height, row.width, row.deadline, row.steps_left - 1)
        now += FLAT.step_seconds(max(1, len(todo.step)), 128 * 128)
        calls += 1
        assert calls < 2000
    assert ended == {row.id for row in rows}
