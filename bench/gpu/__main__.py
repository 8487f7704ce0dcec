"""Our GPU path against diffusers on this machine's GPU, with full-size SDXL of RANDOM weights. Three parts, each under
nine minutes on a bare machine; each merges its figures into one file."""

import argparse
import gc
import json
import os
import platform
import shlex
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

from bench.gpu.check import check
from bench.gpu.ours import Ours
from bench.gpu.peer import Peer
from bench.gpu.report import headline, show
from bench.gpu.rig import Rig, build
from bench.gpu.served import served
from bench.gpu.stages import stages
from bench.gpu.timing import Clock, Keep
from models.gpu.graphs import COMPILE_MODE

RESULTS = Path(__file__).parents[1] / "results" / "gpu.json"
PARTS = ("check", "stages", "server")
PART_S = 510.0  # of a part, from the start of this process
LATE_S = 20.0  # after which a part that does not end is ended


def parse() -> argparse.Namespace:
    """The options; PART, OUT, RIG and TINY in the environment are their defaults."""
    parser = argparse.ArgumentParser(prog="bench.gpu", description=__doc__)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=os.environ.get("PART", "").split() or list(PARTS))
    parser.add_argument("--out", type=Path, default=os.environ.get("OUT"), help="a .json, or a folder for gpu.json")
    parser.add_argument("--rig", type=Path, default=os.environ.get("RIG"), help="where the random weights go, 12.3 GB")
    parser.add_argument(
        "--cache", type=Path, help="of torch.compile, in the rig if absent; given, `server` serves compiled code too"
    )
    parser.add_argument("--seconds", type=float, default=12.0, help="of each load on the server")
    parser.add_argument("--mode", default=COMPILE_MODE, help="of torch.compile in `stages`; none: graphs of eager code")
    parser.add_argument(
        "--tiny", action="store_true", default=os.environ.get("TINY", "") not in ("", "0"),
        help="a toy, on a CPU too, to try the script; its figures mean nothing and go to a temporary folder",
    )  # fmt: skip
    options = parser.parse_args()
    if unknown := set(options.part) - set(PARTS):
        parser.error(f"no such part: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    return options


def main() -> None:
    """Run the parts asked for."""
    options, began = parse(), time.monotonic()
    if not options.tiny and not torch.cuda.is_available():
        sys.exit(
            "bench-gpu needs a CUDA GPU, and torch finds none here; TINY=1 tries the script on the CPU at toy size"
        )
    scratch = Path(tempfile.mkdtemp(prefix="bench-gpu-"))
    out = scratch / "gpu.json" if options.tiny else _result_file(options.out)
    rig = build(
        options.rig or (scratch if options.tiny else Path(tempfile.gettempdir())) / "sdxl-random",
        options.tiny,
        "cuda" if torch.cuda.is_available() else "cpu",
    )
    print(f"the rig, of RANDOM weights, is in {rig.directory} after {time.monotonic() - began:.0f} s", flush=True)
    about = _about(options.tiny)
    results = {**_earlier(out, about, options.tiny), **about}
    for part in options.part:
        _measure(part, rig, options, scratch, results, out, began)
        began = time.monotonic()
    show(results, out.with_suffix(".md"))
    print(f"written to {out} and {out.with_suffix('.md')}")
    if _has_failed(options, results):
        sys.exit("check FAILED: the pictures are not right, so the figures are worth nothing")


def _measure(
    part: str,
    rig: Rig,
    options: argparse.Namespace,
    scratch: Path,
    results: dict[str, Any],
    out: Path,
    began: float,
) -> None:
    """Fill in and write one part's figures, in the time it has."""
    end = began + PART_S

    def keep(found: dict[str, Any]) -> None:
        """Write what there is, in case the time ends."""
        results[part] = {**found, "took_s": round(time.monotonic() - began, 1), "command": _command()}
        results.update(headline(results))
        out.write_text(json.dumps(results, indent=1) + "\n")

    watch = threading.Timer(end + LATE_S - time.monotonic(), _give_up, (part, options, results, out))
    watch.daemon = True
    watch.start()
    gc.collect()  # the next part, or the server, is to find the GPU's memory empty
    torch.cuda.empty_cache()
    keep(run(part, rig, options, scratch, lambda: end - time.monotonic(), keep, results.get(part, {})))
    watch.cancel()


def _give_up(part: str, options: argparse.Namespace, results: dict[str, Any], out: Path) -> None:
    """End the process. What is kept is kept; a compiler or a capture cannot be asked to stop."""
    try:
        show(results, out.with_suffix(".md"))
        not_run = options.part[options.part.index(part) + 1 :]
        print(f"{part} ran out of time; what it had measured is in {out}; not run: {not_run}", flush=True)
    finally:
        for child in psutil.Process().children(recursive=True):
            child.kill()  # a server, compilers
        os._exit(_has_failed(options, results))


def _command() -> str:
    variables = "".join(f" {name}={os.environ[name]}" for name in ("PART", "TINY") if os.environ.get(name))
    return shlex.join(["python", "-m", "bench.gpu", *sys.argv[1:]]) + variables


def _has_failed(options: argparse.Namespace, results: dict[str, Any]) -> bool:
    return "check" in options.part and not results.get("check", {}).get("passed")


def run(
    part: str, rig: Rig, options: argparse.Namespace, scratch: Path, left: Clock, keep: Keep, earlier: dict[str, Any]
) -> dict[str, Any]:
    """One part's figures. earlier: what it found in an earlier run."""
    cache = options.cache or rig.directory / "cache"
    if part == "server":
        return served(rig, scratch, cache, options.cache is not None, options.seconds, left, keep, earlier)
    ours, peer = Ours(rig, cache), Peer(rig)
    if part == "check":
        return check(ours, peer, keep)
    return stages(ours, peer, left, keep, options.mode)


def _result_file(out: Path | None) -> Path:
    path = Path(out) if out else RESULTS
    path = path if path.suffix == ".json" else path / "gpu.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _earlier(out: Path, about: dict[str, Any], tiny: bool) -> dict[str, Any]:
    """What other parts found on the same kind of GPU with the same software; it is merged with."""
    for path in (out,) if tiny else (out, RESULTS):
        if path.exists():
            found: dict[str, Any] = json.loads(path.read_text())
            if all(found.get(key) == about[key] for key in ("gpu", "torch", "diffusers", "weights")):
                return found
            print(f"{path} is of {found.get('gpu')} with torch {found.get('torch')}: not merged with", flush=True)
    return {}


def _about(tiny: bool) -> dict[str, Any]:
    gpu: Any = None if tiny else torch.cuda.get_device_properties(0)
    return {
        "weights": "RANDOM, of the embedded model's size (a toy)" if tiny else "RANDOM, at SDXL's full size",
        "gpu": "none that counts: a toy" if tiny else gpu.name,
        "gpu_memory_gib": None if tiny else round(gpu.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "diffusers", "transformers")},
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }


if __name__ == "__main__":
    main()
