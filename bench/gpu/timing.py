"""What the parts share: how calls are timed, which variant draws, the clock they watch, who keeps what they find."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

Clock = Callable[[], float]  # seconds left
Keep = Callable[[dict[str, Any]], None]  # takes what there is so far, in case the rest fails

VARIANT = "4step-unet"
REPEATS = 5


def milliseconds(
    call: Callable[[], object], wait: Callable[[], object] = lambda: None, repeats: int = REPEATS
) -> float:
    """The median of some calls, each waited for, after one that does not count; on a CPU, of one. wait: for what the
    call does not wait for itself."""
    call()
    wait()
    times = []
    for _ in range(repeats if torch.cuda.is_available() else 1):
        start = time.perf_counter()
        call()
        wait()
        times.append(1e3 * (time.perf_counter() - start))
    return round(statistics.median(times), 3)
