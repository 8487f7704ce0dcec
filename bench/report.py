"""What is printed and what is kept."""

import json
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench.fidelity import MEAN_GATE, MIN_GATE, Fidelity
from bench.overhead import AIM_MS, Overhead
from bench.rounds import Row
from bench.styles import Switch
from bench.tuning import Tuned, describe

RESULTS = Path(__file__).with_name("results")
HEADER = ("contender", "images/s", "p50 ms", "p95 ms", "p99 ms", "answers", "refused", "failed", "settings")
RULES = """\
Every contender: the same weights, prompts, seeds and order; a seed for each request; PNG by fpng; {threads} torch
threads, in one long-lived inference thread (ours: in two of one each); channels_last, inference_mode, no guidance, no
progress bars; warmed up.
Peers run diffusers' pipeline as it is, not compiled, one in memory for each variant. Loads go round by round from one
contender to the next; medians over {rounds} rounds of {seconds:g} s. The load generator (asyncio, raw HTTP/1.1) shares
the cores with the servers; resting peers are stopped (SIGSTOP). Prompts are drawn from all {prompts} of the vocabulary;
ours may cache the embeddings of 1,024 of them."""


@dataclass
class Results:
    """Everything that one run found."""

    machine: dict[str, Any]
    options: dict[str, Any]
    tuned: dict[str, Tuned] = field(default_factory=dict)
    fidelity: list[Fidelity] = field(default_factory=list)
    closed: dict[str, list[Row]] = field(default_factory=dict)
    opened: dict[float, list[Row]] = field(default_factory=dict)
    overhead: Overhead | None = None
    switch: Switch | None = None
    styles: list[Row] = field(default_factory=list)
    ratio_4step: float | None = None
    ratio: float | None = None
    took_s: float = 0.0

    def save(self, is_whole: bool) -> Path:
        """Write them as JSON; a run that left something out does not replace a whole one."""
        path = RESULTS / ("cpu.json" if is_whole else "partial.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")
        return path


def machine() -> dict[str, Any]:
    """What this ran on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "diffusers", "litserve", "fastapi")},
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }


def show_machine(found: dict[str, Any]) -> None:
    """One line; and a warning where the figures would mean little."""
    print("machine: " + ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in found.items()))
    if found["load_before"] > 0.5:
        print("warning: something else is running here (see the load); the figures below are worth little")


def show_rows(title: str, rows: Sequence[Row]) -> None:
    """One load as a table."""
    cells = [
        (
            row.contender,
            f"{row.images_per_s:.1f}",
            *(f"{ms:.0f}" for ms in (row.p50, row.p95, row.p99)),
            *(str(count) for count in (row.answers, row.refused, row.failed)),
            row.settings,
        )
        for row in rows
    ]
    show_table(title, [HEADER, *cells])
    if rows:
        print(f"(the load generator took {100 * max(row.generator_cpu for row in rows):.1f} % of a core at most)")


def show_table(title: str, lines: Sequence[Sequence[str]]) -> None:
    """Plain columns: the first and last to the left, figures to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print(f"\n{title}")
    for line in lines:
        first, *figures, last = line
        middle = "  ".join(cell.rjust(width) for cell, width in zip(figures, widths[1:-1], strict=True))
        print(f"  {first.ljust(widths[0])}  {middle}  {last}")


def show_tuned(tuned: dict[str, Tuned]) -> None:
    """What each peer was given; every measurement on the way is in the JSON."""
    for name, found in tuned.items():
        print(f"\n{name}, even mix and all else: {describe(found.mix)}")
        if found.four != found.mix:
            print(f"{name}, 4 steps only: {describe(found.four)}")


def show_fidelity(rows: Sequence[Fidelity]) -> None:
    """PSNR from fp32 diffusers, the gate for ours."""
    lines = [(row.contender, str(row.pictures), f"{row.mean:.1f}", f"{row.minimum:.1f}", _lowest(row)) for row in rows]
    header = ("contender", "pictures", "mean dB", "min dB", "lowest by variant")
    show_table(
        f"PSNR from fp32 diffusers, served pictures (gate: mean {MEAN_GATE:g}, min {MIN_GATE:g})", [header, *lines]
    )
    for row in rows:
        if row.contender == "ours":
            print(f"psnr_gate: {'passed' if row.passes else 'FAILED'}")


def _lowest(row: Fidelity) -> str:
    return " ".join(f"{name} {value:.1f}" for name, value in row.by_variant.items())


def show_overhead(found: Overhead) -> None:
    """HTTP and queue over the bare engine."""
    print(
        f"\nHTTP and queue, 1 client, 4 steps, {found.requests} requests each, alternating with a bare in-process call "
        f"of models/: p50 {found.http:.2f} ms over HTTP, {found.bare:.2f} ms bare"
    )
    print(f"added_p50_ms: {found.added:.2f} (aim: {AIM_MS:g} or less)")


def show_styles(switch: Switch, rows: Sequence[Row]) -> None:
    """What a switch costs, and the mix with 20 styles against none."""
    show_rows("closed loop, 16 clients, even mix: without styles, and each request with another of 20", rows)
    added = switch.first - switch.again
    print(
        f"1 client, 4 steps: p50 {switch.again:.1f} ms with a style, {switch.first:.1f} with one whose weights must be "
        f"made first; style_switch_ms: {added:.1f}"
    )


def ratio(rows: Sequence[Row]) -> float | None:
    """Our images/s over the best peer's; None where one of them was not measured."""
    ours = [row.images_per_s for row in rows if row.contender == "ours"]
    peers = [row.images_per_s for row in rows if row.contender != "ours"]
    return round(ours[0] / max(peers), 2) if ours and peers and max(peers) > 0 else None
