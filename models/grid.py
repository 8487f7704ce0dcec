"""The trained grid: where a picture may begin, and the steps it takes from there. Pure.

The 1- and 2-step students were trained at t = 250, 500, 750 and 1000 (SDXL-Lightning, arXiv 2402.13929, 3.7.1), so they
begin at a quarter, too; the others at their own steps. From anywhere else they draw blurred.
"""

import math
from functools import cache

# Timesteps of the paths that trailing spacing does not have, by step count: each goes down by 1000 / N.
BESIDE: dict[int, tuple[tuple[int, ...], ...]] = {1: ((749,), (499,), (249,)), 2: ((749, 249),)}

MOST_SPELLED = 8


@cache
def starts(steps: int) -> dict[float, range]:
    """The strengths that a picture may be drawn over with, from 1 down, each with the rows of its variant's
    models.schedule.Schedule.table that it steps through: BESIDE's come behind the schedule's own."""
    if steps == 1:
        return {1.0: range(1), 0.75: range(1, 2), 0.5: range(2, 3), 0.25: range(3, 4)}
    if steps == 2:
        return {1.0: range(2), 0.75: range(2, 4), 0.5: range(1, 2), 0.25: range(3, 4)}
    return {count / steps: range(steps - count, steps) for count in range(steps, 0, -1)}


def snap(strength: float, steps: int) -> float | None:
    """The largest strength of the grid that is not above this one, as diffusers rounds; None below the least."""
    return next((each for each in starts(steps) if each <= strength + 1e-9), None)


def spelled(steps: int) -> str:
    """The strengths there are, in words; rounded up where they must be, so that each means itself."""
    if steps > MOST_SPELLED:
        return f"k/{steps} for k = 1 to {steps}"
    return ", ".join(f"{math.ceil(each * 1e4) / 1e4:g}" for each in reversed(starts(steps)))
