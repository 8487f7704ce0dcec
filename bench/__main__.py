"""Our server against a plain FastAPI app and a tuned LitServe, over HTTP, side by side in one run."""

import argparse
import asyncio
import signal
import sys
import time

from bench import fidelity, overhead, report, styles
from bench.contenders import NAMES, Contender, contender
from bench.load import closed_loop
from bench.progress import progress
from bench.rounds import LOADS, closed, opened
from bench.start import start
from bench.tuning import UNTUNED, Tuned, tune
from bench.work import EVEN_MIX, prompts, stream

PARTS = ("fidelity", *(load.name for load in LOADS), "open", "overhead", "styles")
WARM_UP_S = 3.0


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3, help="of each closed loop")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=" ".join(PARTS))
    parser.add_argument("--contenders", nargs="+", choices=NAMES, default=list(NAMES), metavar="NAME")
    parser.add_argument("--threads", type=int, default=2, help="torch threads of every contender")
    parser.add_argument("--no-sweep", action="store_true", help="peers in bfloat16, LitServe at batch 16, 5 ms")
    return parser.parse_args()


def is_whole(options: argparse.Namespace) -> bool:
    """Whether nothing is left out."""
    return set(options.only) == set(PARTS) and set(options.contenders) == set(NAMES) and not options.no_sweep


async def warm_up(contenders: list[Contender]) -> None:
    """A short load for everyone, not counted."""
    for each in progress(contenders, "warming up"):
        async with each.turn() as client:
            await closed_loop(client, stream("warm-up", EVEN_MIX), 16, WARM_UP_S, warm_s=0)


async def run(contenders: list[Contender], options: argparse.Namespace, results: report.Results) -> None:
    """All parts, in order; fills and prints the results."""
    await warm_up(contenders)
    for peer in contenders:
        if peer.name != "ours":
            untuned = Tuned(UNTUNED[peer.name], UNTUNED[peer.name])
            results.tuned[peer.name] = untuned if options.no_sweep else await tune(peer, options.seconds / 4)
            await peer.apply(results.tuned[peer.name].mix)
    if not options.no_sweep:
        report.show_tuned(results.tuned)
    if "fidelity" in options.only:
        truth = fidelity.reference(fidelity.requests(), options.threads)
        results.fidelity = [await fidelity.measure(each, truth) for each in progress(contenders, "fidelity")]
        report.show_fidelity(results.fidelity)
    for load in LOADS:
        if load.name in options.only:
            results.closed[load.name] = await closed(contenders, results.tuned, load, options.rounds, options.seconds)
            report.show_rows(load.title, results.closed[load.name])
    if "open" in options.only and "mix" in results.closed:
        capacity = {row.contender: row.images_per_s for row in results.closed["mix"]}
        results.opened = await opened(contenders, results.tuned, capacity, options.seconds)
        for rate, rows in results.opened.items():
            report.show_rows(f"open loop, even mix, {rate:.1f} requests/s", rows)
    ours = [each for each in contenders if each.name == "ours"]
    if "overhead" in options.only and ours:
        results.overhead = await overhead.measure(ours[0], max(2, round(3 * options.seconds)), options.threads)
        report.show_overhead(results.overhead)
    if "styles" in options.only and ours:
        results.switch, results.styles = await styles.measure(options.threads, options.rounds, options.seconds)
        report.show_styles(results.switch, results.styles)


def main() -> None:
    """Run it; the servers are ended whatever happens."""
    options, began = parse(), time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    results = report.Results(report.machine(), vars(options))
    report.show_machine(results.machine)
    rules = {"threads": options.threads, "rounds": options.rounds, "seconds": options.seconds}
    print(report.RULES.format(**rules, prompts=f"{len(prompts()):,}"))
    contenders = [contender(name, options.threads) for name in options.contenders]
    try:
        start(contenders)
        asyncio.run(run(contenders, options, results))
    finally:
        for each in contenders:
            each.end()
    results.ratio_4step = report.ratio(results.closed.get("four", []))
    results.ratio = report.ratio(results.closed.get("mix", []))
    results.took_s = round(time.monotonic() - began)
    print(f"\ntook {results.took_s:.0f} s; written to {results.save(is_whole(options))}")
    print(f"ratio_to_best_peer_4step: {results.ratio_4step if results.ratio_4step is not None else 'not measured'}")
    print(f"ratio_to_best_peer: {results.ratio if results.ratio is not None else 'not measured'}")


if __name__ == "__main__":
    main()
