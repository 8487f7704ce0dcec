"""Are the pictures right? Against diffusers' own pipeline with the same weights, alone and in mixed batches."""

import os
import random
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from bench.fidelity import psnr
from bench.gpu.ours import Ours
from bench.gpu.peer import Peer
from bench.gpu.timing import Keep, milliseconds
from bench.work import prompts
from models.gpu.graphs import Graphed

GATE = 40.0  # dB, of every picture
FP8_GATE = 30.0  # dB from our own float16, of every picture; below it FP8=1 is not to be used
FLAT = 30.0  # of 255; the standard deviation that each picture must have
SAME = 25.0  # dB; two prompts' or two seeds' pictures must be farther apart than this
JOINS = 3  # rows that join a running batch at a time
ROWS = 8
VARIANTS = ("4step-unet", "1step-unet", "2step-unet")

Pictures = torch.Tensor  # (B, H, W, 3) uint8


def check(ours: Ours, peer: Peer, keep: Keep) -> dict[str, Any]:
    """Figures, and "passed"."""
    rng, pixels = random.Random("gpu"), ours.rig.sizes[0]
    asked, seeds = rng.sample(prompts(), ROWS), [rng.randrange(2**32) for _ in range(ROWS)]
    rows = range(ROWS)
    alone: list[float] = []
    mixed: list[float] = []
    found: dict[str, Any] = {"passed": False}  # until all has been looked at
    found["a_step_waits_for_nothing"] = _waits_for_nothing(ours, asked, seeds, pixels) if ours.on_gpu else None
    keep(found)
    for variant in VARIANTS:
        count = ROWS if variant == VARIANTS[0] else 2
        theirs = [peer.draw(variant, [asked[row]], [seeds[row]], pixels)[0] for row in rows[:count]]
        single = [ours.draw(variant, [asked[row]], [seeds[row]], pixels)[0] for row in rows[:count]]
        alone += [_psnr(mine, other) for mine, other in zip(single, theirs, strict=True)]
        if variant == VARIANTS[0]:
            batch = _joining(ours, variant, asked, seeds, pixels)
            mixed = [_psnr(mine, other) for mine, other in zip(batch, theirs, strict=True)]
            found["pixel_std"] = round(min(float(picture.float().std()) for picture in theirs), 1)
            same_seed = ours.draw(variant, asked[:4], seeds[:1] * 4, pixels)
            same_prompt = ours.draw(variant, asked[:1] * 4, seeds[:4], pixels)
            found["psnr_db_between_prompts"] = _closest(same_seed)
            found["psnr_db_between_seeds"] = _closest(same_prompt)
        found["psnr_db_vs_diffusers"] = round(min(alone + mixed), 2)
        found["psnr_db_vs_diffusers_alone"] = [round(value, 1) for value in alone]
        found["psnr_db_vs_diffusers_mixed"] = [round(value, 1) for value in mixed]
        found["recorded"] = recorded(ours) if ours.on_gpu else None
        keep(found)
    found |= _fp8(ours, asked[:4], seeds[:4], pixels)
    found["passed"] = bool(
        found["psnr_db_vs_diffusers"] >= GATE
        and found["pixel_std"] >= FLAT
        and max(found["psnr_db_between_prompts"], found["psnr_db_between_seeds"]) < SAME
        and found["a_step_waits_for_nothing"] is not False
        and found["recorded"] is not False
    )
    return found


def _psnr(one: torch.Tensor, other: torch.Tensor) -> float:
    return psnr(one.numpy(), other.numpy())


def _closest(pictures: Pictures) -> float:
    return round(max(_psnr(one, other) for one, other in combinations(pictures, 2)), 1)


def _joining(ours: Ours, variant: str, asked: list[str], seeds: list[int], pixels: int) -> list[torch.Tensor]:
    """The pictures of rows that join a running batch, JOINS at each step, and leave it one after another: batches of 1
    to 8 rows at different steps, each row's picture in its place."""
    steps = ours.rig.family.variants[variant].steps[0]
    waiting = list(enumerate(ours.start(variant, asked, seeds, pixels)))
    running: list[tuple[int, int, Any]] = []  # place, step, row
    pictures: dict[int, torch.Tensor] = {}
    while waiting or running:
        running += [(place, 0, row) for place, row in waiting[:JOINS]]
        del waiting[:JOINS]
        stepped = ours.step(variant, [row for _, _, row in running], [step for _, step, _ in running])
        running = [(place, step + 1, row) for (place, step, _), row in zip(running, stepped, strict=True)]
        done = [(place, row) for place, step, row in running if step == steps]
        if done:
            decoded = ours.decode([row for _, row in done])
            pictures.update(zip([place for place, _ in done], decoded, strict=True))
        running = [each for each in running if each[1] < steps]
    return [pictures[place] for place in range(len(asked))]


def recorded(ours: Ours) -> bool:
    """Whether all that ran through CUDA graphs: what CUDA refuses to record is called, with a warning."""
    functions = (ours.pipeline.text, ours.pipeline.decoder, ours.steps)
    replays = [graph.replay for each in functions if isinstance(each, Graphed) for graph in each._graphs.values()]
    return all(isinstance(getattr(replay, "__self__", None), torch.cuda.CUDAGraph) for replay in replays)


def _fp8(ours: Ours, asked: list[str], seeds: list[int], pixels: int) -> dict[str, Any]:
    """How far fp8 pictures are from float16 ones; why not, where there is no fp8. It never fails the check."""
    try:
        other = Ours(ours.rig, Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR", "")), in_fp8=True)
        pairs = [(each.draw(VARIANTS[0], asked, seeds, pixels)) for each in (ours, other)]
        took = {title: _step_ms(each, asked, seeds, pixels) for title, each in (("fp16", ours), ("fp8", other))}
    except Exception as error:
        return {"fp8": str(error)[:300]}
    worst = min(_psnr(one, two) for one, two in zip(*pairs, strict=True))
    verdict = "passes" if worst >= FP8_GATE else "is not good enough"
    return {"psnr_db_fp8_vs_fp16": round(worst, 2), "fp8": verdict, f"step_ms_of_{len(asked)}": took}


def _step_ms(ours: Ours, asked: list[str], seeds: list[int], pixels: int) -> float:
    rows = ours.start(VARIANTS[0], asked, seeds, pixels)
    return milliseconds(lambda: ours.step(VARIANTS[0], rows, [0] * len(rows)), ours.synchronize)


def _waits_for_nothing(ours: Ours, asked: list[str], seeds: list[int], pixels: int) -> bool:
    """Whether a step of 3 rows (2 + 1) runs where CUDA's synchronising calls are errors."""
    rows = ours.start(VARIANTS[0], asked[:3], seeds[:3], pixels)
    ours.step(VARIANTS[0], rows, [0, 1, 2])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours.step(VARIANTS[0], rows, [0, 1, 2])
    except RuntimeError as error:
        print(f"a step waits: {error}")
        return False
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return True
