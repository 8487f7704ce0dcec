"""Which rows take the next UNet call. A pure function: no torch, no clock, no state."""

import math
from collections.abc import Sequence

from app.engine.costs import Costs
from app.engine.jobs import Plan, Row


def plan(rows: Sequence[Row], costs: Costs, now: float, lanes: int = 1) -> Plan:
    """Choose the rows of the next UNet call, all of one (variant, size), oldest deadline first.

    Every row stands at a step of its own, so a new row joins at any call and a finished one leaves at any. The row with
    the oldest deadline is always in the call, so none starves; the rest of the batch are rows that can share its call.
    What is finished is decoded; what can no longer meet its deadline is part of the answer.
    lanes: calls that may start now. Where no other group would fill the others, one shares its rows among them.
    """
    done = tuple(row for row in rows if row.steps_left == 0)
    late = tuple(row for row in rows if row.steps_left > 0 and now + costs.alone(row) > row.deadline)
    refused = {row.id for row in late}
    live = [row for row in rows if row.steps_left > 0 and row.id not in refused]
    if not live or lanes < 1:
        return Plan(decode=done, refuse=late)
    oldest = min(live, key=lambda row: (row.deadline, row.id))
    group = sorted((row for row in live if row.group == oldest.group), key=lambda row: (row.deadline, row.id))
    others = len({row.group for row in live}) - 1
    share = math.ceil(len(group) / max(1, lanes - others))
    return Plan(step=tuple(group[: min(share, costs.best_batch)]), decode=done, refuse=late)
