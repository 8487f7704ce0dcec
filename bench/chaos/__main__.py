"""N minutes of everything at once: `make chaos`, or `python -m bench.chaos --minutes 30`.

In the first act many kinds of clients draw, leave and send nonsense, and memory is watched; in the second the engine is
killed and stopped meanwhile, the log is lost, and more come than can be served; in the third one of two engines is.
Nothing accepted may be lost: the clients' ledger and the server's must balance. Prints rows for docs/reliability.md.
--plant breaks something, and its lines must turn red; with `all`, every line must, by one plant or another.
"""

import argparse
import asyncio
import json
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.chaos import figures
from bench.chaos.clients import Books, Crowd, balance
from bench.chaos.faults import HARD, MILD, OF_ONE, Fault, Window, inject, lose_log
from bench.chaos.figures import Line
from bench.chaos.inside import PLANTS
from bench.chaos.rig import Rig, until
from bench.client import Client
from bench.load import closed_loop
from bench.report import machine
from bench.work import EVEN_MIX, prompts, stream

RESULTS = Path(__file__).parents[1] / "results" / "chaos.json"
GONE_S = 5.0  # for an engine to leave with its server
DRAIN_S = 60.0
BREATH_S, REST_S = 12.0, 3.0  # of load, and of rest
CACHED = 1024  # prompts; of models.prompts
HEAD = "| id | act | promise | figure | aim | |\n|---|---|---|---|---|---|"


@dataclass(frozen=True)
class Act:
    """A part of the run. share: of the minutes. load: of the capacity. every: seconds between faults."""

    name: str
    share: float
    load: float
    faults: Sequence[Fault]
    every: float
    engines: int = 1
    is_file: bool = False


ACTS = (
    Act("soak", 0.5, 0.4, MILD, 40.0, is_file=True),
    Act("chaos", 0.3, 0.4, HARD, 12.0),
    Act("fleet", 0.2, 0.2, OF_ONE, 12.0, engines=2),
)
PLANT_S = 60.0


async def play(act: Act, seconds: float, plant: str, folder: Path) -> list[Line]:
    """One act on a server of its own."""
    rig = Rig(folder, act.engines, act.is_file, plant)
    try:
        live = await rig.wait_ready()
        async with Client("127.0.0.1", rig.port) as client:
            first = await closed_loop(client, stream("capacity", EVEN_MIX), 16, 6.0, warm_s=2.0)
            await fill(client)
        rate = act.load * first.images_per_s / 2  # a request is for two pictures
        print(f"{act.name}: {first.images_per_s:.1f} images/s; {rate:.1f} requests/s for {seconds:.0f} s", flush=True)
        crowd, windows, begin = Crowd(rig.port, seed=1), list[Window](), time.monotonic()
        watching, before = asyncio.create_task(rig.watch()), await rig.metrics()
        end = begin + seconds
        async with asyncio.TaskGroup() as group:
            load = breathe(rig, crowd, rate, end) if act.is_file else crowd.run(rate, seconds)
            group.create_task(load)
            group.create_task(inject(rig, crowd, rate, act.faults, act.every, end, windows))
        settled = await rig.rest()
        after = await rig.metrics()
        if not act.is_file:
            await lose_log(rig, crowd, rate)
            await crowd.run(rate, 5)
            await rig.rest()
        last = await rig.metrics()
        watching.cancel()
        books = balance(crowd.attempts, before, last)
        print(ledger(books), flush=True)
        counts = Counter(window.fault for window in windows)
        print("faults:", ", ".join(f"{name} {count}" for name, count in sorted(counts.items())), flush=True)
        lines = [Line("R17", "/live answers within", live, 5, "s")]
        lines += figures.of_requests(crowd, books, windows) + figures.of_loop(before, after)
        lines.append(Line("R3", "nothing is left in flight after", round(settled, 1), 15, "s"))
        if act.is_file:
            return lines + figures.of_memory(rig, begin, end) + await drain(rig)
        if act.engines > 1:
            lines.append(
                Line("R5 lost", "requests that failed with one of two engines", books.ours["failed"], 0, "requests")
            )
        lost = last["sdxl_log_lines_dropped_total"]
        lines += figures.of_health(rig.looks, windows, act.engines)
        lines.append(Line("R15", "lines of the log that were lost while nobody read it", lost, 1, "lines", True))
        return lines + await bereave(rig)
    finally:
        rig.end()


async def fill(client: Client) -> None:
    """Ask for more prompts than are cached, so that every cache has its size before memory is watched."""
    bodies = iter([json.dumps({"prompt": prompt, "steps": 1}).encode() for prompt in prompts()[: CACHED + CACHED // 8]])

    async def ask() -> None:
        for body in bodies:
            await client.post(body)

    await asyncio.gather(*(ask() for _ in range(16)))


async def breathe(rig: Rig, crowd: Crowd, rate: float, end: float) -> None:
    """The load, with moments of rest: what is in use then is not what is in flight."""
    while time.monotonic() < end:
        await crowd.run(rate, min(BREATH_S, max(1.0, end - time.monotonic())))
        await rig.rest()
        begin = time.monotonic()
        await asyncio.sleep(REST_S)
        rig.rests.append((begin, time.monotonic()))


async def drain(rig: Rig) -> list[Line]:
    """SIGTERM while clients draw: who was accepted is served, and nothing stays."""
    crowd = Crowd(rig.port, seed=2)
    accepted = [asyncio.create_task(crowd.draw()) for _ in range(16)]
    await asyncio.sleep(0.5)  # some are drawn, and the others are accepted
    begin = time.monotonic()
    rig.process.send_signal(signal.SIGTERM)
    outcomes = [attempt.outcome for attempt in await asyncio.gather(*accepted)]
    await until(lambda: rig.process.poll() is not None, DRAIN_S)
    took = time.monotonic() - begin if rig.process.poll() == 0 else float("inf")
    await asyncio.sleep(1)
    return [
        Line("R12 failed", "accepted requests that a drain failed", 16 - outcomes.count("ok"), 0, "requests"),
        Line("R12", "a drain ends, with exit code 0, within", round(took, 1), DRAIN_S, "s"),
        Line("R12 left", "processes that are left behind", len(rig.family()), 0, "processes"),
    ]


async def bereave(rig: Rig) -> list[Line]:
    """The HTTP process is killed: its engine goes, too."""
    rig.process.kill()
    rig.process.wait()
    begin = time.monotonic()
    is_gone = await until(lambda: not rig.family(), 2 * GONE_S)
    took = round(time.monotonic() - begin, 2) if is_gone else float("inf")
    return [Line("R5b", "an engine leaves with a killed server within", took, GONE_S, "s")]


def ledger(books: Books) -> str:
    """Both sides."""
    return f"clients: {dict(books.ours)}; server: received {books.received}, {dict(books.theirs)}"


def told(act: str, line: Line) -> str:
    """A row of docs/reliability.md."""
    aim = f"{'>=' if line.is_share else '<='} {line.aim:g}"
    return f"| {line.id} | {act} | {line.promise} | {line.figure:g} {line.unit} | {aim} {line.unit} | {line.verdict} |"


def run(acts: Sequence[Act], seconds: float, plant: str, folder: Path) -> list[tuple[str, Line]]:
    """All of these acts, and their rows on stdout."""
    lines: list[tuple[str, Line]] = []
    for act in acts:
        share = act.share / sum(each.share for each in acts)
        lines += [(act.name, line) for line in asyncio.run(play(act, share * seconds, plant, folder / act.name))]
    print(HEAD, *(told(act, line) for act, line in lines), sep="\n", flush=True)
    return lines


def sow(plants: Sequence[str], seconds: float, folder: Path) -> list[str]:
    """Plant one after the other; what should have turned red and did not."""
    green, seen, ids = list[str](), set[str](), set[str]()
    for plant in plants:
        print(f"planted: {plant}", flush=True)
        wanted = PLANTS[plant]
        acts = [act for act in ACTS if act.name == wanted.act]
        lines = run(acts, seconds, plant, folder / plant.replace(" ", "-"))
        red = {line.id for _, line in lines if line.verdict == "BROKEN"}
        green += [f"{plant}: {id} holds" for id in wanted.lines if id not in red]
        ids |= {line.id for _, line in lines}
        seen |= red & set(wanted.lines)
    if len(plants) == len(PLANTS):
        green += [f"nothing turned {id} red" for id in sorted(ids - seen)]
    return green


def main() -> None:
    """Play all acts; exits with 1 where a promise is broken, or a planted fault was not seen."""
    parser = argparse.ArgumentParser(prog="bench.chaos", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0, help="of all acts together")
    parser.add_argument("--acts", nargs="+", choices=[act.name for act in ACTS], default=[act.name for act in ACTS])
    parser.add_argument("--plant", choices=[*PLANTS, "all"], help=f"break something, for {PLANT_S:.0f} s each")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    if options.plant is not None:
        plants = list(PLANTS) if options.plant == "all" else [options.plant]
        sys.exit("\n".join(sow(plants, PLANT_S, folder)) or 0)
    lines = run([act for act in ACTS if act.name in options.acts], 60 * options.minutes, "", folder)
    found = [{"act": act, **asdict(line), "verdict": line.verdict} for act, line in lines]
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"machine": machine(), "minutes": options.minutes, "lines": found}, indent=1) + "\n")
    broken = {line.id for _, line in lines if line.verdict == "BROKEN"}
    sys.exit(f"broken: {', '.join(sorted(broken))}" if broken else 0)


if __name__ == "__main__":
    main()
