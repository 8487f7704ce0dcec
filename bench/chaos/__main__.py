"""N minutes of everything at once: `make chaos`, or `python -m bench.chaos --minutes 30`.

In the first act many kinds of clients draw, leave and send nonsense, and memory is watched; in the second engines are
killed and stopped meanwhile, the log is lost, and more come than can be served. Nothing accepted may be lost: the
clients' ledger and the server's must balance. --plant breaks something, and its line must turn red.
"""

import argparse
import asyncio
import json
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.chaos import figures
from bench.chaos.clients import Books, Crowd, balance
from bench.chaos.faults import HARD, MILD, Fault, Window, inject, lose_log
from bench.chaos.figures import Line
from bench.chaos.inside import PLANTS
from bench.chaos.rig import Rig, until
from bench.client import Client
from bench.load import closed_loop
from bench.report import machine
from bench.work import EVEN_MIX, prompts, stream

RESULTS = Path(__file__).parents[1] / "results" / "chaos.json"
LOAD = 0.4  # of the capacity
GONE_S = 5.0  # for an engine to leave with its server
DRAIN_S = 60.0
BREATH_S, REST_S = 12.0, 3.0  # of load, and of rest
CACHED = 1024  # prompts; of models.prompts


@dataclass(frozen=True)
class Act:
    """A part of the run. share: of the minutes. every: seconds between faults. is_file: see Rig."""

    name: str
    share: float
    faults: Sequence[Fault]
    every: float
    is_file: bool


ACTS = (Act("soak", 0.6, MILD, 40.0, True), Act("chaos", 0.4, HARD, 12.0, False))


async def play(act: Act, seconds: float, plant: str | None, folder: Path) -> list[Line]:
    """One act on a server of its own."""
    rig = Rig(folder, act.is_file, plant)
    try:
        live = await rig.wait_ready()
        async with Client("127.0.0.1", rig.port) as client:
            first = await closed_loop(client, stream("capacity", EVEN_MIX), 16, 6.0, warm_s=2.0)
            await fill(client)
        rate = LOAD * first.images_per_s / 2  # a request is for two pictures
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
        lines = [Line("R17", "/live answers within", live, 5, "s")]
        lines += figures.of_requests(crowd, books, windows) + figures.of_loop(before, after)
        lines.append(Line("R3", "nothing is left in flight after", round(settled, 1), 15, "s"))
        if act.is_file:
            lines += figures.of_memory(rig, begin, end)
            lines += await drain(rig, rate)
        else:
            lines += figures.of_health(rig.looks, windows)
            lost = last["sdxl_log_lines_dropped_total"]
            lines.append(Line("R15", "lines of the log that were lost while nobody read it", lost, 1, "lines", True))
            lines += await bereave(rig)
        counts = {name: sum(window.fault == name for window in windows) for name in {w.fault for w in windows}}
        print("faults:", ", ".join(f"{name} {count}" for name, count in sorted(counts.items())), flush=True)
        return lines
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


async def drain(rig: Rig, rate: float) -> list[Line]:
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


def table(lines: Sequence[tuple[str, Line]]) -> str:
    """All lines, aligned."""
    rows = [
        f"{act:6} {line.id:16} {line.promise:56} {line.figure:>10g} {line.unit:9} "
        f"{'>=' if line.is_share else '<='} {line.aim:<8g} {'holds' if line.holds else 'BROKEN'}"
        for act, line in lines
    ]
    return "\n".join(rows)


def main() -> None:
    """Play all acts; exits with 1 where a promise is broken, or a planted fault was not seen."""
    parser = argparse.ArgumentParser(prog="bench.chaos", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0, help="of all acts together")
    parser.add_argument("--acts", nargs="+", choices=[act.name for act in ACTS], default=[act.name for act in ACTS])
    parser.add_argument("--plant", choices=list(PLANTS), help="break something that must be seen")
    options = parser.parse_args()
    acts = [act for act in ACTS if act.name in options.acts]
    lines: list[tuple[str, Line]] = []
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    for act in acts:
        seconds = 60 * options.minutes * act.share / sum(each.share for each in acts)
        lines += [(act.name, line) for line in asyncio.run(play(act, seconds, options.plant, folder / act.name))]
    print(table(lines))
    found = [{"act": act, **asdict(line), "holds": line.holds} for act, line in lines]
    told = {"machine": machine(), "options": vars(options), "date": time.strftime("%Y-%m-%d"), "lines": found}
    print(json.dumps(told))
    broken = {line.id for _, line in lines if not line.holds}
    if options.plant is None:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(told, indent=1) + "\n")
        sys.exit(f"broken: {', '.join(sorted(broken))}" if broken else 0)
    seen = broken & set(PLANTS[options.plant][1])
    sys.exit(0 if seen else f"{options.plant} was planted, and none of {PLANTS[options.plant][1]} is broken")


if __name__ == "__main__":
    main()
