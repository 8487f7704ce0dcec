"""SDXL at full size on a CPU: does the server draw what diffusers draws, and how long does a picture take?

`make check-full-size`: 12.3 GB of disk for random weights (bench/gpu/rig.py), 20 GB of memory, a quarter of an hour.
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
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from bench.contenders import HOST, ours
from bench.fidelity import psnr
from bench.gpu.peer import Peer
from bench.gpu.rig import Rig, build
from bench.start import LOGS

RESULT = Path(__file__).with_name("results") / "full-size.json"
PIXELS, READY_S, GATE_DB = 512, 120.0, 40.0
PROMPT = "a lighthouse at dusk"
ASKED = (("1step-unet", 1), ("4step-unet", 2), ("1step-unet", 3), ("1step-unet", 4))  # the last two at once


@dataclass(frozen=True)
class Seen:
    """A picture of the server's beside diffusers'."""

    variant: str
    seed: int
    at_once: int
    seconds: float
    db: float = math.nan
    diffusers_seconds: float = math.nan


@contextmanager
def server(rig: Rig) -> Iterator[tuple[str, float]]:
    """Our server with the rig. Yields where it draws, and the seconds until it was ready."""
    served, start = ours(**rig.settings, MAX_TIMEOUT_S="3600"), time.monotonic()
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


def measure(rig: Rig) -> dict[str, Any]:
    """Draw over HTTP, alone and two at once; then the same by diffusers' own pipeline."""
    with server(rig) as (url, ready):
        alone = [(*ask(url, variant, seed), 1) for variant, seed in ASKED[:2]]
        again = ask(url, *ASKED[0])[1]  # with its weights in memory
        with ThreadPoolExecutor(2) as pool:
            both = [(*drawn, 2) for drawn in pool.map(lambda asked: ask(url, *asked), ASKED[2:])]
    peer = Peer(rig)
    seen = []
    for (variant, seed), (picture, seconds, at_once) in zip(ASKED, [*alone, *both], strict=True):
        peer.use(variant)
        start = time.monotonic()
        theirs = peer.draw(variant, [PROMPT], [seed], PIXELS)[0].numpy()
        took = time.monotonic() - start
        seen.append(Seen(variant, seed, at_once, round(seconds, 1), round(psnr(picture, theirs), 1), round(took, 1)))
        print(seen[-1], flush=True)
    return {
        "cores": len(os.sched_getaffinity(0)), "dtype": rig.settings["DTYPE"], "pixels": PIXELS,
        "ready_s": round(ready, 1), "one_step_s": round(again, 1), "torch": torch.__version__,
        "pictures": [asdict(each) for each in seen],
    }  # fmt: skip


def main() -> None:
    """Build the rig, measure, say whether the gate is met."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--rig", type=Path, default=Path(tempfile.gettempdir()) / "sdxl-random-cpu")
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    start = time.monotonic()
    built = build(options.rig, tiny=False, device="cpu", dtype=torch.float16)
    print(f"rig in {options.rig}: {time.monotonic() - start:.0f} s", flush=True)
    result = measure(replace(built, dtype=getattr(torch, options.dtype)))
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    worst = min(each["db"] for each in result["pictures"])
    print(f"ready after {result['ready_s']} s; worst {worst} dB from diffusers (gate {GATE_DB})")
    sys.exit(worst < GATE_DB)


if __name__ == "__main__":
    main()
