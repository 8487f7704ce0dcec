"""Each peer's best settings, found by a short sweep under the loads it will be judged by."""

from dataclasses import dataclass, field
from itertools import product
from typing import Any

from bench.contenders import Contender
from bench.load import closed_loop
from bench.progress import progress
from bench.work import EVEN_MIX, FOUR, stream

DTYPES = ("float32", "bfloat16")
BATCHES = (4, 8, 16)
WINDOWS_MS = (1, 5, 20)
CLIENTS = 16
FINALISTS = 3  # of a sweep; they are measured again, longer, since the best of many short measurements is partly luck

Settings = dict[str, Any]
UNTUNED: dict[str, Settings] = {  # of a quick run without the sweep
    "fastapi": {"dtype": "bfloat16"},
    "litserve": {"dtype": "bfloat16", "max_batch_size": 16, "batch_timeout_ms": 5},
}


@dataclass
class Tuned:
    """The settings kept for the even mix (and all else) and for four steps only, and every measurement on the way."""

    mix: Settings
    four: Settings
    sweep: list[dict[str, Any]] = field(default_factory=list)


def choices(name: str) -> list[Settings]:
    """What there is to choose from; one dtype after the other, since a change of dtype loads the weights again."""
    if name == "fastapi":
        return [{"dtype": dtype} for dtype in DTYPES]
    return [
        {"dtype": dtype, "max_batch_size": batch, "batch_timeout_ms": window}
        for dtype, batch, window in product(DTYPES, BATCHES, WINDOWS_MS)
    ]


async def tune(contender: Contender, seconds: float) -> Tuned:
    """Sweep the even mix, then four steps only among the settings of the better dtype."""
    sweep: list[dict[str, Any]] = []

    async def best(of: list[Settings], mix: tuple[int, ...], title: str) -> Settings:
        short = await _rank(contender, of, mix, seconds, title, sweep)
        long = await _rank(contender, short[:FINALISTS], mix, 3 * seconds, f"{title}, finalists", sweep)
        return long[0]

    all_of_them = choices(contender.name)
    for_mix = await best(all_of_them, EVEN_MIX, f"tuning {contender.name}, even mix")
    same_dtype = [settings for settings in all_of_them if settings["dtype"] == for_mix["dtype"]]
    for_four = await best(same_dtype, FOUR, f"tuning {contender.name}, 4 steps") if len(same_dtype) > 1 else for_mix
    return Tuned(for_mix, for_four, sweep)


async def _rank(
    contender: Contender,
    of: list[Settings],
    mix: tuple[int, ...],
    seconds: float,
    title: str,
    sweep: list[dict[str, Any]],
) -> list[Settings]:
    """The settings by images/s, best first; every measurement goes into `sweep`."""
    found: list[tuple[float, Settings]] = []
    for settings in progress(of, title):
        await contender.apply(settings)
        async with contender.turn() as client:
            work = stream(f"tuning {mix}", mix)
            phase = await closed_loop(client, work, CLIENTS, seconds, warm_s=min(1.0, seconds / 2))
        found.append((phase.images_per_s, settings))
        sweep.append({"mix": mix, "seconds": seconds, "images_per_s": round(phase.images_per_s, 2), **settings})
    return [settings for _, settings in sorted(found, key=lambda pair: -pair[0])]


def describe(settings: Settings) -> str:
    """Settings in words."""
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in settings.items()) or "its defaults"
