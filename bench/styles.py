"""Style LoRAs: what a switch costs one client, and a mix in which every request names another of 20 styles, in turns
with the same mix without."""

import itertools
import shutil
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.client import Client
from bench.contenders import ours
from bench.load import closed_loop
from bench.overhead import timed
from bench.rounds import CLIENTS, WARM_S, Row, in_turns
from bench.start import start
from bench.work import EVEN_MIX, FOUR, WEIGHTS, Work, stream

STYLES = 20
SWITCHES = 50


@dataclass(frozen=True)
class Styled(Work):
    """A request with styles, as the server wants them."""

    loras: tuple[dict[str, object], ...] = ()


@dataclass(frozen=True)
class Switch:
    """One client, 4 steps, p50 in ms: with weights that must be made first, and with the same again."""

    first: float
    again: float


async def measure(threads: int, rounds: int, seconds: float) -> tuple[Switch, list[Row]]:
    """On a server of its own, whose styles are copies of the one that ships: each file is a style."""
    with tempfile.TemporaryDirectory() as folder:
        for number in range(STYLES):
            shutil.copy(WEIGHTS / "loras" / "line.safetensors", Path(folder) / f"style-{number}.safetensors")
        server = ours(THREADS=str(threads), LORA_DIR=folder)
        start([server])
        try:
            async with server.turn() as client:
                await closed_loop(client, _styled("warm-up"), CLIENTS, WARM_S, warm_s=0)  # graphs for more rows come
                switch = await _switch(client)
                loads = {
                    "plain": lambda turn: stream(f"styles {turn}", EVEN_MIX),
                    "styled": lambda turn: _styled(str(turn)),
                }
                rows = await in_turns(client, "styles", loads, rounds, seconds)
        finally:
            server.end()
    return switch, rows


def _styled(name: str) -> Iterator[Work]:
    numbers = itertools.cycle(range(STYLES))
    for work in stream(f"styles {name}", EVEN_MIX):
        yield _with(work, f"style-{next(numbers)}", 1.0)


async def _switch(client: Client) -> Switch:
    """Scales that nobody asked for before: each is a set to be made."""
    first, again = list[float](), list[float]()
    for number, work in zip(range(SWITCHES), stream("switch", FOUR), strict=False):
        ask = _with(work, f"style-{number % STYLES}", 0.5 + number / 100)
        first.append(await timed(client, ask))
        again.append(await timed(client, ask))
    return Switch(statistics.median(first), statistics.median(again))


def _with(work: Work, style: str, scale: float) -> Styled:
    return Styled(work.prompt, work.steps, work.seed, ({"name": style, "scale": scale},))
