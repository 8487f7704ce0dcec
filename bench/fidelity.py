"""How far the served pictures are from fp32 diffusers with the same weights and seeds, in dB of PSNR."""

import asyncio
import io
import json
import math
import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

import numpy as np
from PIL import Image

from bench.client import Client
from bench.contenders import Contender
from bench.work import prompts
from models.catalog import CATALOG

MEAN_GATE, MIN_GATE = 38.0, 34.0  # dB
EACH = 10  # pictures a variant
AT_ONCE = 16  # clients, so that the pictures come out of mixed batches
IDENTICAL = 99.0  # dB, where no pixel differs

Asked = tuple[str, str, int]  # variant, prompt, seed


@dataclass(frozen=True)
class Fidelity:
    """PSNR in dB over `pictures` of them, by variant too."""

    contender: str
    pictures: int
    mean: float
    minimum: float
    by_variant: dict[str, float]

    @property
    def passes(self) -> bool:
        """Whether the gate is met."""
        return self.mean >= MEAN_GATE and self.minimum >= MIN_GATE


def requests() -> list[Asked]:
    """EACH pictures of each of the seven variants, shuffled."""
    rng = random.Random("fidelity")
    asked = [
        (name, rng.choice(prompts()), rng.randrange(2**32))
        for name in CATALOG["embedded"].variants
        for _ in range(EACH)
    ]
    rng.shuffle(asked)
    return asked


def reference(asked: list[Asked], threads: int) -> dict[Asked, np.ndarray]:
    """fp32 diffusers' pictures, drawn in a process of its own: the load generator's is to stay small."""
    with ProcessPoolExecutor(1, get_context("spawn")) as apart:
        return dict(zip(asked, apart.submit(_draw, asked, threads).result(), strict=True))


def _draw(asked: list[Asked], threads: int) -> list[np.ndarray]:
    import torch  # nor is torch to be in the load generator's process

    from bench.painter import draw, load

    torch.set_num_threads(threads)
    pipelines, steps = load({name for name, _, _ in asked}, torch.float32), CATALOG["embedded"].variants
    return [draw(pipelines[name], [prompt], steps[name].steps[0], [seed])[0].numpy() for name, prompt, seed in asked]


async def measure(contender: Contender, truth: dict[Asked, np.ndarray]) -> Fidelity:
    """Ask for every picture the contender can draw: peers hold the UNet variants only."""
    asked = [ask for ask in truth if contender.name == "ours" or ask[0].endswith("-unet")]
    limit = asyncio.Semaphore(AT_ONCE)
    async with contender.turn() as client, asyncio.TaskGroup() as group:
        tasks = [group.create_task(_picture(client, contender.name, ask, limit)) for ask in asked]
    found = [(ask[0], psnr(task.result(), truth[ask])) for ask, task in zip(asked, tasks, strict=True)]
    values = [value for _, value in found]
    by_variant = {
        name: min(value for variant, value in found if variant == name) for name in sorted({ask[0] for ask in asked})
    }
    return Fidelity(contender.name, len(values), sum(values) / len(values), min(values), by_variant)


async def _picture(client: Client, contender: str, ask: Asked, limit: asyncio.Semaphore) -> np.ndarray:
    variant, prompt, seed = ask
    body = {"prompt": prompt, "seed": seed, "steps": CATALOG["embedded"].variants[variant].steps[0]}
    if contender == "ours":
        body["variant"] = variant
    async with limit:
        reply = await client.post(json.dumps(body).encode())
    if reply.status != 200:
        raise RuntimeError(f"{contender} answered {reply.status} to {body}: {reply.body[:500]!r}")
    return np.asarray(Image.open(io.BytesIO(reply.body)).convert("RGB"))


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two 8-bit pictures, dB."""
    error = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    return 10 * math.log10(255**2 / error) if error else IDENTICAL
