"""python -m bench.guided: what guidance costs. 16 clients ask for 4 steps without, with, and by halves, in turns."""

import argparse
import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bench.contenders import ours
from bench.load import closed_loop
from bench.report import show_rows
from bench.rounds import CLIENTS, WARM_S, Row, in_turns
from bench.start import start
from bench.work import FOUR, Work, stream

CATALOG = Path(__file__).parents[1] / "docs" / "models.example.toml"
LOADS = {"unguided": (1.0,), "half of them": (1.0, 2.0), "guided": (2.0,)}


@dataclass(frozen=True)
class Guided(Work):
    """A request with a guidance scale, as the server wants it."""

    guidance_scale: float = 1.0


async def measure(threads: int, rounds: int, seconds: float) -> list[Row]:
    """Each load, on one server."""
    server = ours(THREADS=str(threads), CATALOG=str(CATALOG), MODEL="example")
    start([server])
    try:
        async with server.turn() as client:
            await closed_loop(client, _stream("warm-up", (1.0, 2.0)), CLIENTS, WARM_S, warm_s=0)
            loads = {name: partial(_stream, scales=scales) for name, scales in LOADS.items()}
            return await in_turns(client, "guided", loads, rounds, seconds)
    finally:
        server.end()


def _stream(name: str | int, scales: tuple[float, ...]) -> Iterator[Work]:
    for number, work in enumerate(stream(f"guided {name}", FOUR)):
        yield Guided(work.prompt, work.steps, work.seed, scales[number % len(scales)])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="bench.guided", description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0)
    options = parser.parse_args()
    rows = asyncio.run(measure(options.threads, options.rounds, options.seconds))
    show_rows("closed loop, 16 clients, 4 steps", rows)


if __name__ == "__main__":
    main()
