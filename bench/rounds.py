"""The loads, in interleaved rounds: A B C, A B C, ... so that a drift of the machine hits every contender alike."""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from bench.client import Client
from bench.contenders import Contender
from bench.load import Phase, closed_loop, open_loop
from bench.progress import progress
from bench.tuning import Tuned, describe
from bench.work import EVEN_MIX, FOUR, Work, stream

OPEN_SHARES = (0.5, 0.8, 1.1)  # of our measured capacity
SENSIBLE = 1.15  # times its own capacity: a contender is not sent more than that, its queue would only grow
WARM_S = 1.0
CLIENTS = 16


@dataclass(frozen=True)
class Load:
    """A closed loop: how many clients, and which steps they ask for."""

    name: str
    title: str
    clients: int
    mix: tuple[int, ...]


LOADS = (
    Load("mix", "closed loop, 16 clients, even mix of 1/2/4/8 steps", CLIENTS, EVEN_MIX),
    Load("four", "closed loop, 16 clients, 4 steps", CLIENTS, FOUR),
    Load("single", "closed loop, 1 client, 4 steps", 1, FOUR),
)


@dataclass(frozen=True)
class Row:
    """One contender under one load: medians over the rounds; p50, p95, p99 in ms; the counts are sums."""

    contender: str
    images_per_s: float
    p50: float
    p95: float
    p99: float
    answers: int
    refused: int
    failed: int
    generator_cpu: float
    rounds_images_per_s: list[float]
    settings: str = ""


def summarise(contender: str, phases: Sequence[Phase], settings: str = "") -> Row:
    """The medians."""
    p50, p95, p99 = (statistics.median(phase.percentile(percent) for phase in phases) for percent in (50, 95, 99))
    rates = [phase.images_per_s for phase in phases]
    return Row(
        contender,
        statistics.median(rates),
        p50,
        p95,
        p99,
        sum(phase.answers for phase in phases),
        sum(phase.refused for phase in phases),
        sum(phase.failed for phase in phases),
        statistics.median(phase.generator_cpu for phase in phases),
        [round(rate, 2) for rate in rates],
        settings,
    )


async def in_turns(
    client: Client, title: str, loads: Mapping[str, Callable[[int], Iterator[Work]]], rounds: int, seconds: float
) -> list[Row]:
    """One server under several closed loops of 16 clients, in turns. loads: requests by name, of each round."""
    phases: dict[str, list[Phase]] = {name: [] for name in loads}
    for turn in progress(range(rounds), title):
        for name, works in loads.items():
            phases[name].append(await closed_loop(client, works(turn), CLIENTS, seconds, WARM_S))
    return [summarise(name, each) for name, each in phases.items()]


async def closed(
    contenders: list[Contender], tuned: dict[str, Tuned], load: Load, rounds: int, seconds: float
) -> list[Row]:
    """Every contender under one closed loop, with the same requests in the same order."""
    phases: dict[str, list[Phase]] = {contender.name: [] for contender in contenders}
    for contender in contenders:
        if contender.name in tuned:
            await contender.apply(tuned[contender.name].four if load.mix == FOUR else tuned[contender.name].mix)
    turns = [(index, contender) for index in range(rounds) for contender in contenders]
    for index, contender in progress(turns, load.title):
        async with contender.turn() as client:
            work = stream(f"{load.name} {index}", load.mix)
            phases[contender.name].append(await closed_loop(client, work, load.clients, seconds, WARM_S))
    return [summarise(each.name, phases[each.name], describe(each.settings)) for each in contenders]


async def opened(
    contenders: list[Contender], tuned: dict[str, Tuned], capacity: dict[str, float], seconds: float
) -> dict[float, list[Row]]:
    """Poisson arrivals of the even mix, by rate: 50, 80 and 110 % of our capacity and 80 % of the best peer's, each
    sent to those whose own capacity makes it sensible."""
    rates = [capacity["ours"] * share for share in OPEN_SHARES] if "ours" in capacity else []
    if peers := [capacity[name] for name in capacity if name != "ours"]:
        rates.append(0.8 * max(peers))
    for contender in contenders:
        if contender.name in tuned:
            await contender.apply(tuned[contender.name].mix)
    turns = [
        (rate, contender)
        for rate in sorted(rates)
        for contender in contenders
        if rate <= SENSIBLE * capacity[contender.name]
    ]
    rows: dict[float, list[Row]] = {rate: [] for rate in sorted(rates)}
    for rate, contender in progress(turns, "open loop, even mix"):
        async with contender.turn() as client:
            phase = await open_loop(client, stream(f"open {rate}", EVEN_MIX), rate, seconds, seed=round(rate))
        rows[rate].append(summarise(contender.name, [phase], describe(contender.settings)))
    return rows
