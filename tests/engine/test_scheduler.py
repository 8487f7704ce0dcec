"""The scheduler, with a simulated clock: who is stepped, who is decoded, who is refused."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace as replace_cost

from app.engine.costs import Costs
from app.engine.jobs import Plan, Row
from app.engine.scheduler import IDLE_S, PAUSE_S, Workers, may_change, plan
from models.catalog import Weights

FLAT = Costs(step={1: 0.01, 2: 0.01, 4: 0.01, 8: 0.01}, decode={1: 0.01, 8: 0.02}, encode=0.0, pixels=128 * 128)
LINEAR = Costs(step={1: 0.01, 2: 0.02, 4: 0.04, 8: 0.08}, decode={1: 0.01, 8: 0.08}, encode=0.0, pixels=128 * 128)


def row(id=0, steps_left=4, deadline=10.0, variant="4step-unet", side=128, **more) -> Row:
    return Row(id, Weights(variant), side, side, deadline, steps_left, **more)


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


def test_a_picture_to_draw_over_is_encoded_alone_for_all_its_rows_and_in_its_turn():
    words, over = [row(1, is_encoded=False), row(2, is_encoded=False)], [row(3, is_encoded=False, source=3)]
    over.append(row(4, is_encoded=False, source=3))
    another = row(5, is_encoded=False, source=5)
    assert plan([*over, another, *words], FLAT, now=0.0).encode == tuple(words)
    assert plan([another, *over], FLAT, now=0.0).encode == tuple(over)
    older = [replace(each, deadline=9.0) for each in over]
    assert plan([*words, another, *older], FLAT, now=0.0).encode == tuple(older)


def test_a_picture_to_draw_over_is_priced_once_for_all_its_rows_until_it_is_encoded():
    costs = replace_cost(LINEAR, picture=0.5)
    words, over = [row(id) for id in (1, 2)], [row(id, is_encoded=False, source=1) for id in (1, 2)]
    assert costs.work(over) == pytest.approx(costs.work(words) + 0.5)
    assert costs.alone(over[1]) == pytest.approx(costs.alone(words[1]) + 0.5)  # each waits for it
    assert costs.work([replace(each, is_encoded=True) for each in over]) == pytest.approx(costs.work(words))
    assert costs.scaled(2).work(over) == pytest.approx(2 * costs.work(over))
    larger = replace(over[0], height=256)
    assert costs.work([larger]) == pytest.approx(costs.work([replace(larger, source=None)]) + 1.0)


def test_a_guided_picture_takes_two_rows_of_the_batch():
    rows = [row(id, deadline=id + 1, count=2) for id in range(5)]
    assert plan(rows, FLAT, now=0.0).step == tuple(rows[:4])  # 8 rows are the best batch
    assert LINEAR.work(rows[:1]) > LINEAR.work([row(0)])


def test_styled_weights_are_a_group_of_their_own():
    plain, styled = row(1), Row(2, Weights("4step-unet", (("line", 0.8),)), 128, 128, 10.0, 4)
    assert plan([plain, styled], FLAT, now=0.0).step == (plain,)


def test_new_prompts_are_encoded_all_together_and_step_after_that():
    new, old = [row(id, is_encoded=False) for id in range(3)], row(9)
    todo = plan([*new, old], FLAT, now=0.0)
    assert (todo.encode, todo.step) == (tuple(new), (old,))


def test_finished_rows_of_one_size_share_a_decode_of_the_best_batch():
    done = [row(id, steps_left=0) for id in range(20)]
    large = row(20, steps_left=0, side=256)
    assert plan([*done, large], FLAT, now=0.0).decode == tuple(done[:8])
    assert plan([large, *done], FLAT, now=0.0).decode == (large,)


def test_steps_wait_for_a_decoder_that_is_far_behind():
    done, going = [row(id, steps_left=0) for id in range(17)], row(20)
    assert plan([*done[:16], going], FLAT, now=0.0).step == (going,)
    assert plan([*done, going], FLAT, now=0.0).step == ()


def test_only_what_a_device_can_do_beside_its_calls_is_planned():
    rows = [row(1, is_encoded=False), row(2), row(3, steps_left=0)]
    gpu = Workers(calls=2, steps=1, decodes=1)
    beside_a_step = plan(rows, FLAT, 0.0, gpu, ["denoise"])
    assert (beside_a_step.encode, beside_a_step.step, beside_a_step.decode) == ((), (), (rows[2],))
    beside_a_decode = plan(rows, FLAT, 0.0, gpu, ["decode"])
    assert (beside_a_decode.encode, beside_a_decode.step, beside_a_decode.decode) == ((rows[0],), (rows[1],), ())
    assert plan(rows, FLAT, 0.0, gpu, ["denoise", "decode"]) == Plan()


def test_two_workers_share_the_rows_of_one_group():
    rows = [row(id) for id in range(8)]
    two = Workers(calls=2, steps=2, decodes=2)
    assert len(plan(rows, FLAT, 0.0, two).step) == 4
    assert len(plan([*rows, row(9, variant="8step-unet")], FLAT, 0.0, two).step) == 8


def test_a_change_waits_for_service_or_for_quiet():
    assert may_change(IDLE_S + 0.1, changed=0.0, is_waited_for=False)
    assert not may_change(IDLE_S + 0.1, changed=0.0, is_waited_for=True)
    assert may_change(PAUSE_S + 0.1, changed=0.0, is_waited_for=True)


def test_a_call_has_hung_by_what_was_measured_not_by_a_constant():
    slow = FLAT.scaled(500)  # 5 s a step: SDXL on a CPU
    assert slow.patience("denoise", 1, 128 * 128) == 50
    assert FLAT.patience("denoise", 1, 128 * 128) == 10


def test_with_nothing_to_do_the_plan_is_empty():
    assert plan([], FLAT, now=0.0) == Plan()


rows = st.lists(
    st.builds(
        Row,
        id=st.integers(0, 10**6),
        weights=st.sampled_from([Weights("1step-unet"), Weights("4step-unet"), Weights("4step-unet", (("a", 1.0),))]),
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
    assert len({row.group for row in todo.step}) <= 1
    assert len({row.size for row in todo.decode}) <= 1
    assert bool(todo.decode) == any(row.steps_left == 0 for row in rows)
    assert bool(todo.step) == bool(live) or len(todo.decode) == FLAT.best_decode_batch


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
            board[row.id] = replace(row, steps_left=row.steps_left - 1)
        now += FLAT.step_seconds(max(1, len(todo.step)), 128 * 128)
        calls += 1
        assert calls < 2000
    assert ended == {row.id for row in rows}
