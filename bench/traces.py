"""What traces cost: our server with OpenTelemetry and without it, in pairs: `python -m bench.traces`."""

import argparse
import asyncio
import statistics
import subprocess
import sys
from collections.abc import Sequence

from bench import report
from bench.contenders import Contender, ours
from bench.load import Phase, closed_loop
from bench.progress import progress
from bench.rounds import LOADS, WARM_S, Load
from bench.start import start
from bench.work import stream

# Takes every span and throws it away, in a process of its own.
COLLECTOR = """
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
class Sink(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()
    def log_message(self, *args): pass
server = ThreadingHTTPServer(("127.0.0.1", 0), Sink)
print(server.server_port, flush=True)
server.serve_forever()
"""


async def pairs(
    plain: Contender, traced: Contender, load: Load, count: int, seconds: float
) -> list[tuple[Phase, Phase]]:
    """Each pair has the same requests; who is first, changes."""
    found = []
    for number in progress(range(count), load.title):
        phases: dict[str, Phase] = {}
        for each in (plain, traced) if number % 2 else (traced, plain):
            async with each.turn() as client:
                work = stream(f"traces {number}", load.mix)
                phases[each.name] = await closed_loop(client, work, load.clients, seconds, WARM_S)
        found.append((phases[plain.name], phases[traced.name]))
    return found


def show(load: Load, found: Sequence[tuple[Phase, Phase]]) -> None:
    """The cost, beside the spread of what costs nothing."""
    rates = [plain.images_per_s for plain, _ in found]
    cost = [100 * (1 - traced.images_per_s / plain.images_per_s) for plain, traced in found]
    later = [traced.percentile(50) - plain.percentile(50) for plain, traced in found]
    middle = statistics.median(rates)
    spread = 100 * statistics.stdev(rates) / middle
    print(
        f"\n{load.title}, {len(found)} pairs: {middle:.1f} images/s without traces, spread {spread:.1f} % (deviation)"
    )
    half = statistics.median(cost)
    print(f"cost of traces: median {half:.1f} % of images/s, from {min(cost):.1f} to {max(cost):.1f};", end=" ")
    print(f"p50 {statistics.median(later):+.2f} ms")
    print(f"traces_within_spread: {half <= spread}")


async def run(plain: Contender, traced: Contender, count: int, seconds: float) -> None:
    """Both loads that differ most: full batches, and one client."""
    for load in LOADS:
        if load.name != "four":
            show(load, await pairs(plain, traced, load, count, seconds))


def main() -> None:
    """Start both, and a collector."""
    parser = argparse.ArgumentParser(prog="bench.traces", description=__doc__)
    parser.add_argument("--seconds", type=float, default=6.0, help="of each measurement")
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    report.show_machine(report.machine())
    with subprocess.Popen([sys.executable, "-c", COLLECTOR], stdout=subprocess.PIPE, text=True) as collector:
        assert collector.stdout is not None
        endpoint = f"http://127.0.0.1:{collector.stdout.readline().strip()}"
        threads = str(options.threads)
        plain, traced = ours("plain", THREADS=threads), ours("traced", THREADS=threads)
        traced.environment["OTEL_EXPORTER_OTLP_ENDPOINT"] = endpoint
        try:
            start([plain, traced])
            asyncio.run(run(plain, traced, options.pairs, options.seconds))
        finally:
            plain.end()
            traced.end()
            collector.terminate()


if __name__ == "__main__":
    main()
