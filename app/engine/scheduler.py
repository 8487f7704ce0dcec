"""All policy: which calls start next, what is refused, when a change may happen. Pure: no torch, no clock, no state."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from app.engine.costs import Costs
from app.engine.jobs import Plan, Row, age

DECODES_BEHIND = 2  # steps wait where more finished rows than so many decodes take wait for the decoder
PAUSE_S, IDLE_S = 2.0, 0.5  # before a change: of service where somebody waits, of quiet where nobody does


@dataclass(frozen=True)
class Workers:
    """Calls that a device makes at a time. calls: in all. steps: of the UNet and the text encoders. decodes: of the
    VAE. There is one encode at a time, since all share one cache of prompts."""

    calls: int = 1
    steps: int = 1
    decodes: int = 1

    def room(self, stage: str, flying: Sequence[str]) -> int:
        """How many more calls of a stage may start now. flying: the stages of the calls that are being made."""
        free = self.calls - len(flying)
        if stage == "decode":
            return min(free, self.decodes - flying.count("decode"))
        if stage == "encode" and "encode" in flying:
            return 0
        return min(free, self.steps - flying.count("encode") - flying.count("denoise"))


def plan(
    rows: Sequence[Row], costs: Costs, now: float, workers: Workers = Workers(), flying: Sequence[str] = ()
) -> Plan:
    """Choose the next calls. rows: those that no call has now. flying: the stages of the calls that are being made.

    Every row stands at a step of its own, so a new row joins at any call and a finished one leaves at any. The row with
    the oldest deadline is always in the next step, so none starves; the rest of the batch are rows that can share it.
    Prompts are encoded all together, since a call costs more than a prompt; a picture to draw over alone, since it
    costs more than a call. Where no other group would fill the other
    workers, a group shares its rows among them. What can no longer meet its deadline is part of the answer.
    """
    late = tuple(row for row in rows if row.steps_left > 0 and now + costs.alone(row) > row.deadline)
    refused = {row.id for row in late}
    done = [row for row in rows if row.steps_left == 0]
    live = [row for row in rows if row.steps_left > 0 and row.id not in refused]
    ready = [row for row in live if row.is_encoded]
    room = {stage: workers.room(stage, flying) for stage in ("encode", "decode", "denoise")}
    is_behind = len(done) > DECODES_BEHIND * costs.best_decode_batch
    return Plan(
        encode=_encode([row for row in live if not row.is_encoded]) if room["encode"] > 0 else (),
        decode=_decode(done, costs) if room["decode"] > 0 else (),
        step=_step(ready, costs, room["denoise"]) if room["denoise"] > 0 and not is_behind else (),
        refuse=late,
    )


def may_change(now: float, changed: float, is_waited_for: bool) -> bool:
    """Whether a change that wants the device for itself may be made. changed: when the last one was."""
    return now - changed > (PAUSE_S if is_waited_for else IDLE_S)


def _encode(new: Sequence[Row]) -> tuple[Row, ...]:
    source = min(new, key=age).source if new else None
    return tuple(row for row in new if row.source == source)


def _decode(done: Sequence[Row], costs: Costs) -> tuple[Row, ...]:
    alike = [row for row in done if row.size == done[0].size]
    return tuple(alike[: costs.best_decode_batch])


def _step(ready: Sequence[Row], costs: Costs, free: int) -> tuple[Row, ...]:
    if not ready:
        return ()
    oldest = min(ready, key=age)
    group = sorted((row for row in ready if row.group == oldest.group), key=age)
    others = len({row.group for row in ready}) - 1
    share = math.ceil(sum(row.count for row in group) / max(1, free - others))
    room, taken = min(share, costs.best_batch), [group[0]]
    for row in group[1:]:
        if sum(each.count for each in taken) + row.count > room:
            break
        taken.append(row)
    return tuple(taken)
