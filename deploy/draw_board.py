"""Asks every query of the board of a real Prometheus that scraped a real load, and draws the answers into one picture.

    python deploy/draw_board.py PICTURE.png [SECONDS]

It starts a server of the embedded model, Prometheus beside it, and a load of all variants. Exits with 1, and the
queries, where one returns no data. The picture is drawn by matplotlib from Prometheus' answers: it is not Grafana.
"""

import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import matplotlib.pyplot as plt

ROOT = Path(__file__).parent.parent
BOARD = json.loads((Path(__file__).parent / "chart" / "files" / "board.json").read_text())
PORT, PROMETHEUS = 8090, 9190
CLIENTS = 12
RATE = "10s"  # of a scrape every second; Grafana takes four scrapes
UNITS = {"s": "seconds", "reqps": "per second", "bytes": "bytes", "percentunit": "share", "short": ""}

Series = list[tuple[str, list[float], list[float]]]


@contextmanager
def started(*command: str | Path) -> Iterator[None]:
    """A program, for as long as the block runs."""
    process = subprocess.Popen([str(part) for part in command], stderr=subprocess.DEVNULL, cwd=ROOT)
    try:
        yield
    finally:
        process.terminate()
        process.wait()


def wait_for(url: str) -> None:
    """Until it answers 200."""
    while True:
        try:
            if httpx.get(url, timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)


def load(until: float, variants: list[str]) -> None:
    """Clients that draw with every variant, most of them in the middle; some ask too soon, some amiss."""

    def client(number: int) -> None:
        chance = random.Random(number)
        time.sleep(number * (until - time.monotonic()) / 3 / CLIENTS)
        end = until - number * 1.0
        with httpx.Client(timeout=60) as http:
            while time.monotonic() < end:
                body: dict[str, Any] = {
                    "prompt": "a red apple on a blue background",
                    "variant": chance.choice(variants),
                }
                if chance.random() < 0.03:
                    body["timeout"] = 0.08
                if chance.random() < 0.03:
                    body["prompt"] = ""
                http.post(f"http://127.0.0.1:{PORT}/generate", json=body)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def ask(query: str, legend: str, start: float, end: float) -> Series:
    """Prometheus' answer over a time, each series with its name."""
    query = query.replace("$__rate_interval", RATE).replace("$instance", ".*")
    url = f"http://127.0.0.1:{PROMETHEUS}/api/v1/query_range"
    answer = httpx.get(url, params={"query": query, "start": start, "end": end, "step": "1s"}).json()
    found = []
    for series in answer["data"]["result"]:
        name = legend
        for label, value in series["metric"].items():
            name = name.replace("{{" + label + "}}", value)
        times, values = zip(*((float(at) - start, float(value)) for at, value in series["values"]), strict=True)
        found.append((name, list(times), list(values)))
    return found


def draw(panels: list[tuple[dict[str, Any], Series]], picture: Path) -> None:
    """All panels in one picture, a stat as its last number."""
    graphs = [each for each in panels if each[0]["type"] != "stat"]
    stats = [each for each in panels if each[0]["type"] == "stat"]
    rows = -(-len(graphs) // 3)
    figure = plt.figure(figsize=(17, 1.3 + 2.9 * rows), facecolor="#f7f8fa")
    grid = figure.add_gridspec(rows + 1, 18, height_ratios=[0.45, *[1] * rows], hspace=0.55, wspace=2.2)
    for number, (panel, series) in enumerate(stats):
        axes = figure.add_subplot(grid[0, 3 * number : 3 * number + 3])
        axes.set_axis_off()
        value = series[0][2][-1] if series else float("nan")
        is_share = panel["fieldConfig"]["defaults"]["unit"] == "percentunit"
        axes.text(0.5, 0.3, f"{value:.1%}" if is_share else f"{value:.3g}", ha="center", fontsize=20, color="#1f60c4")
        axes.text(0.5, 1.0, panel["title"], ha="center", fontsize=9, color="#444")
    for number, (panel, series) in enumerate(graphs):
        axes = figure.add_subplot(grid[1 + number // 3, 6 * (number % 3) : 6 * (number % 3) + 6])
        for name, times, values in series:
            axes.plot(times, values, linewidth=1.2, label=name)
        axes.set_title(panel["title"], fontsize=9, loc="left", color="#444")
        axes.set_ylabel(UNITS[panel["fieldConfig"]["defaults"]["unit"]], fontsize=7)
        axes.tick_params(labelsize=7)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=6, ncol=2, frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, dpi=80, bbox_inches="tight")


def main(picture: Path, seconds: float = 90.0) -> int:
    """Run all of it."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "prometheus.yml"
        target = {"job_name": "sdxl", "static_configs": [{"targets": [f"127.0.0.1:{PORT}"]}]}
        config.write_text(json.dumps({"global": {"scrape_interval": "1s"}, "scrape_configs": [target]}))
        serve = (Path(sys.executable).parent / "sdxl-lightning", "serve", "--port", str(PORT), "--log-level", "error")
        listen = f"--web.listen-address=127.0.0.1:{PROMETHEUS}"
        scrape = ("prometheus", f"--config.file={config}", f"--storage.tsdb.path={folder}", listen)
        with started(*serve), started(*scrape):
            wait_for(f"http://127.0.0.1:{PORT}/ready")
            wait_for(f"http://127.0.0.1:{PROMETHEUS}/-/ready")
            variants = [card["id"] for card in httpx.get(f"http://127.0.0.1:{PORT}/v1/models").json()["data"]]
            start = time.time()
            load(time.monotonic() + seconds, variants)
            panels = []
            for panel in BOARD["panels"]:
                answers = [ask(each["expr"], each["legendFormat"], start, time.time()) for each in panel["targets"]]
                panels.append((panel, [series for answer in answers for series in answer]))
                for target, answer in zip(panel["targets"], answers, strict=True):
                    print(
                        f"{panel['title']}: {sum(len(values) for *_, values in answer)} values of {len(answer)} series"
                    )
                    if not answer:
                        print(f"no data: {target['expr']}")
    draw(panels, picture)
    return int(any(not series for _, series in panels))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *map(float, sys.argv[2:])))
