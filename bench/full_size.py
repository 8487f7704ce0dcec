"""SDXL at full size on a CPU: does the server draw what diffusers draws, and how long does a picture take?

`make check-full-size`: 12.3 GB of disk for random weights (bench/gpu/rig.py), 20 GB of memory, a quarter of an hour.
With --single-file the server has them from one file in Stability AI's layout, of 6.9 GB more, as a family of a user's.
"""

import argparse
import io
import json
import math
import os
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from bench import ldm
from bench.contenders import HOST, ours
from bench.fidelity import psnr
from bench.gpu.peer import Peer
from bench.gpu.rig import Rig, build
from bench.start import LOGS

RESULTS = Path(__file__).with_name("results")
PIXELS, READY_S, GATE_DB = 512, 120.0, 40.0
PROMPT = "a lighthouse at dusk"
ASKED = (("1step-unet", 1), ("4step-unet", 2), ("1step-unet", 3), ("1step-unet", 4))  # the last two at once
ONE = "4step-unet"  # whose UNet is in the single file
OWN = f"""
[family.own]
like = "sdxl"
file = "own.safetensors"
default = "{ONE}"

[[family.own.variant]]
name = "{ONE}"
kind = "unet"
steps = 4
"""


@dataclass(frozen=True)
class Seen:
    """A picture of the server's beside diffusers'."""

    variant: str
    seed: int
    at_once: int
    seconds: float
    db: float = math.nan
    diffusers_seconds: float = math.nan


def single_file(rig: Rig) -> dict[str, str]:
    """Make the file; the server's settings to serve it."""
    if not (path := rig.directory / "own.safetensors").exists():
        ldm.write(rig.directory, rig.directory / rig.family.variants[ONE].file, path)
    catalog = rig.directory / "models.toml"
    catalog.write_text(OWN)
    return {**rig.settings, "CATALOG": str(catalog), "MODEL": "own"}


@contextmanager
def server(settings: dict[str, str]) -> Iterator[tuple[str, float]]:
    """Our server with these settings. Yields where it draws, and the seconds until it was ready."""
    served, start = ours(**settings, MAX_TIMEOUT_S="3600"), time.monotonic()
    served.start(LOGS)
    try:
        if not served.wait_ready(limit=READY_S):
            raise SystemExit(f"the server is not ready after {READY_S:.0f} s: {served.last_words()}")
        yield f"http://{HOST}:{served.port}/generate", time.monotonic() - start
    finally:
        served.end()


def ask(url: str, variant: str, seed: int) -> tuple[np.ndarray, float]:
    """One picture over HTTP, and the seconds it took."""
    body = {"prompt": PROMPT, "variant": variant, "seed": seed, "size": f"{PIXELS}x{PIXELS}", "timeout": 1800}
    headers = {"content-type": "application/json", "accept": "image/png"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    start = time.monotonic()
    while True:
        try:
            with urllib.request.urlopen(request, timeout=3600) as answer:
                file = answer.read()
            return np.asarray(Image.open(io.BytesIO(file))), time.monotonic() - start
        except urllib.error.HTTPError as refused:
            if refused.code != 503:
                raise SystemExit(f"{variant}: {refused.read().decode()}") from None
            time.sleep(int(refused.headers["Retry-After"]))  # the variant is being loaded


def measure(rig: Rig, settings: dict[str, str], asked: Sequence[tuple[str, int]]) -> dict[str, Any]:
    """Draw over HTTP, alone and two at once; then the same by diffusers' own pipeline."""
    with server(settings) as (url, ready):
        alone = [(*ask(url, variant, seed), 1) for variant, seed in asked[:2]]
        again = ask(url, *asked[0])[1]  # with its weights in memory
        with ThreadPoolExecutor(2) as pool:
            both = [(*drawn, 2) for drawn in pool.map(lambda each: ask(url, *each), asked[2:])]
    peer = Peer(rig)
    seen = []
    for (variant, seed), (picture, seconds, at_once) in zip(asked, [*alone, *both], strict=True):
        peer.use(variant)
        start = time.monotonic()
        theirs = peer.draw(variant, [PROMPT], [seed], PIXELS)[0].numpy()
        took = time.monotonic() - start
        seen.append(Seen(variant, seed, at_once, round(seconds, 1), round(psnr(picture, theirs), 1), round(took, 1)))
        print(seen[-1], flush=True)
    return {
        "cores": len(os.sched_getaffinity(0)), "dtype": rig.settings["DTYPE"], "pixels": PIXELS,
        "ready_s": round(ready, 1), "again_s": round(again, 1), "torch": torch.__version__,
        "pictures": [asdict(each) for each in seen],
    }  # fmt: skip


def main() -> None:
    """Build the rig, measure, say whether the gate is met."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--rig", type=Path, default=Path(tempfile.gettempdir()) / "sdxl-random-cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--single-file", action="store_true")
    options = parser.parse_args()
    start = time.monotonic()
    built = build(options.rig, tiny=False, device="cpu", dtype=torch.float16)
    print(f"rig in {options.rig}: {time.monotonic() - start:.0f} s", flush=True)
    rig = replace(built, dtype=getattr(torch, options.dtype))
    if options.single_file:
        name, result = "single-file", measure(rig, single_file(rig), [(ONE, seed) for _, seed in ASKED])
    else:
        name, result = "full-size", measure(rig, rig.settings, ASKED)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    worst = min(each["db"] for each in result["pictures"])
    print(f"ready after {result['ready_s']} s; worst {worst} dB from diffusers (gate {GATE_DB})")
    sys.exit(worst < GATE_DB)


if __name__ == "__main__":
    main()
