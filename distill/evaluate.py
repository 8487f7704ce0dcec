"""`make evaluate`: the paper's table in miniature, on held-out pairs. Writes docs/evaluation.json and .md, and sheets.

All rows draw the same prompts from the same seeds.
"""

import json
import math
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from distill import data, judge, model, sheets
from distill.diffusion import CLEAN, STEPS
from distill.distill import GUIDANCE
from distill.nearest import Nearest
from distill.training import device

SEEDS = 4  # pictures a prompt: what diversity is measured over
RESAMPLES = 100  # bootstrap, for the Frechet distances' intervals


@dataclass(frozen=True)
class Row:
    model: str
    steps: int

    @property
    def predicts(self) -> str:
        ours = self.model in ("unet", "mse_only", "leading")
        return "sample" if self.steps == 1 and ours else "epsilon"


ROWS = [
    Row("teacher", 32),
    *(Row(name, n) for n in model.STEPS for name in ("unet", "lora", "mse_only", "teacher_undistilled", "leading")),
]
ROWS.remove(Row("lora", 1))  # there is none, as in the release
SHOWN = ["real", "teacher-32", *(f"unet-{n}" for n in model.STEPS), "lora-8", "lora-4", "lora-2"]
SHOWN += [f"teacher_undistilled-{n}" for n in model.STEPS]
COLUMNS = {  # of the Markdown table: title, and key of a row
    "model": "model",
    "steps": "steps",
    "object": "object_accuracy",
    "background": "background_accuracy",
    "object, CNN": "object_accuracy_cnn",
    "Fréchet": "frechet",
    "patch Fréchet": "patch_frechet",
    "nearest, pixels": "nearest_render",
    "nearest, features": "nearest_features",
    "diversity": "diversity",
    "n": "n",
}


def prompts_of(pairs: list[tuple[int, str]]) -> list[str]:
    return [data.caption(data.objects()[i].name, background) for i, background in pairs]


def leading(steps: int) -> Tensor:
    """Ascending grid of diffusers' leading spacing with offset 1, which never visits T (for the ablation)."""
    return torch.tensor([CLEAN, *(k * (STEPS // steps) + 1 for k in range(steps))])


def with_lora(base: UNet2DConditionModel, path: Path) -> UNet2DConditionModel:
    """The base plus alpha / rank * up @ down."""
    low = {key: value.float() for key, value in load_file(path).items()}
    weights = dict(base.state_dict())
    for name in base.state_dict():
        key = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        if name.endswith(".weight") and f"{key}.alpha" in low:
            up, down = low[f"{key}.lora_up.weight"], low[f"{key}.lora_down.weight"]
            delta = low[f"{key}.alpha"] / len(down) * up.flatten(1) @ down.flatten(1)
            weights[name] = weights[name] + delta.view_as(weights[name]).to(weights[name])
    unet = UNet2DConditionModel.from_config(base.config)
    unet.load_state_dict(weights)
    return unet


def unet_of(row: Row, made: model.Model, embedded: Path, mse: Path) -> UNet2DConditionModel:
    if row.model.startswith("teacher"):
        return made.unet
    if row.model == "lora":
        return with_lora(made.unet, model.lora_file(embedded, row.steps))
    return model.load_unet(made.unet, model.unet_file(mse if row.model == "mse_only" else embedded, row.steps))


def draw_row(row: Row, made: model.Model, unet: UNet2DConditionModel, prompts: list[str]) -> np.ndarray:
    """uint8 (N, 128, 128, 3): prompt i with seed i."""
    unet = unet.to(device(), memory_format=torch.channels_last).eval()
    guidance = GUIDANCE if row.model == "teacher" else 1.0
    times = leading(row.steps) if row.model == "leading" else None
    parts = []
    for start in tqdm(range(0, len(prompts), 50), desc=f"{row.model} {row.steps}"):
        some = prompts[start : start + 50]
        noise = sheets.noise_for(len(some), first_seed=start)
        how = {"guidance": guidance, "unet": unet, "predicts": row.predicts, "times": times}
        parts.append(sheets.draw(made, some, noise, row.steps, **how))
    return np.concatenate(parts)


def small(pictures: np.ndarray) -> Tensor:
    """(N, 3, 64, 64) in 0 .. 1: where pictures are compared pixel by pixel."""
    return torch.nn.functional.avg_pool2d(torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255, 2)


def flat(pictures: np.ndarray) -> Tensor:
    """(N, 12288): Euclidean distances between rows are root-mean-square distances of pixels in 0 .. 1."""
    rows = small(pictures).flatten(1)
    return rows / math.sqrt(rows.shape[1])


class Renders:
    """Real pictures of the measured pairs: one jittered for each drawn one, and a bank of jitters for the nearest."""

    def __init__(self, who: judge.Judge, pairs: list[tuple[int, str]]) -> None:
        self.pairs = pairs
        self.real = data.draw_batch(pairs, random.Random(21))
        self.whole, self.patch, thing, _ = judge.look(who, self.real)
        self.wanted = tuple(labels.cpu() for labels in judge.labels(pairs))
        self.named = thing.cpu()
        self.namer = Nearest()
        rng, names = random.Random(22), list(dict.fromkeys(pairs))
        bank = [data.draw_batch([pair] * 24, rng) for pair in names]
        self.pixels = dict(zip(names, (flat(part) for part in bank), strict=True))
        self.features = dict(zip(names, judge.look(who, np.concatenate(bank))[0].split(24), strict=True))

    def about(self, who: judge.Judge) -> dict[str, Any]:
        """The same measures of the real renders themselves: what a perfect model would get."""
        thing, background = self.namer.name(self.real)
        again = judge.look(who, data.draw_batch(self.pairs, random.Random(77)))
        return {
            "object_accuracy": share(thing, self.wanted[0]),
            "background_accuracy": share(background, self.wanted[1]),
            "object_accuracy_cnn": share(self.named, self.wanted[0]),
            "frechet": judge.frechet(again[0], self.whole),
            "patch_frechet": judge.frechet(again[1], self.patch),
            "diversity": diversity(self.real),
            "nearest_render": self.nearest(self.pixels, flat(self.real)),
            "nearest_features": self.nearest(self.features, self.whole),
            "n": len(self.pairs),
        }

    def nearest(self, bank: dict[tuple[int, str], Tensor], drawn: Tensor) -> float:
        """Mean distance to the nearest of 24 jittered renders of the same pair: in pixels, or in the judge's features.

        In pixels a blurred mean of all possible pictures is nearer than any of them; in features it is not.
        """
        apart = [torch.cdist(one[None], bank[pair]).min() for pair, one in zip(self.pairs, drawn, strict=True)]
        return torch.stack(apart).mean().item()


def diversity(pictures: np.ndarray) -> float:
    """Mean root-mean-square distance between two pictures of one prompt from different seeds."""
    groups = small(pictures).view(-1, SEEDS, 3, 64, 64)
    apart = [(groups[:, i] - groups[:, j]).square().mean((1, 2, 3)).sqrt() for i in range(SEEDS) for j in range(i)]
    return torch.stack(apart).mean().item()


def share(said: Tensor, wanted: Tensor) -> float:
    return (said == wanted).float().mean().item()


def interval(right: float, n: int) -> list[float]:
    """95 %, Wilson."""
    z = 1.96
    middle, half = right + z * z / (2 * n), z * math.sqrt(right * (1 - right) / n + z * z / (4 * n * n))
    return [round((middle - half) / (1 + z * z / n), 4), round((middle + half) / (1 + z * z / n), 4)]


def bootstrap(measured: Callable[[Tensor], float], count: int) -> list[float]:
    """95 % of what is measured on these rows of `count`, resampled, moved to be about the estimate (resampling biases
    a Fréchet distance upwards)."""
    generator = torch.Generator().manual_seed(0)
    found = sorted(measured(torch.randint(0, count, (count,), generator=generator)) for _ in range(RESAMPLES))
    shift = measured(torch.arange(count)) - found[RESAMPLES // 2]
    return [round(found[int(RESAMPLES * q)] + shift, 3) for q in (0.025, 0.975)]


def claims() -> list[tuple[Row, Row]]:
    """(ours, the other): what the table is read for, that ours has the smaller Fréchet distance."""
    ours = [Row(name, n) for n in model.STEPS for name in ("unet", "lora") if Row(name, n) in ROWS]
    return [
        *((row, Row("teacher", 32)) for row in ours if row.steps in (8, 4)),
        *((row, Row("teacher_undistilled", row.steps)) for row in ours),
        *((row, Row("mse_only", row.steps)) for row in ours),
    ]


def compare(one: Tensor, other: Tensor, real: Tensor) -> dict[str, Any]:
    """Fréchet distance of `one` less that of `other`, with a 95 % interval: both are resampled alike, since both drew
    the same prompts from the same seeds, so what is common to them does not widen it."""

    def difference(rows: Tensor) -> float:
        return judge.frechet(one[rows], real) - judge.frechet(other[rows], real)

    interval_95 = bootstrap(difference, len(one))
    return {"difference": round(difference(torch.arange(len(one))), 3), "interval_95": interval_95}


def comparisons(features: Path, real: Tensor) -> list[dict[str, Any]]:
    """Every claim whose two rows were measured."""
    found = []
    for rows in claims():
        names = [f"{row.model}-{row.steps}" for row in rows]
        files = [features / f"{name}.pt" for name in names]
        if all(file.exists() for file in files):
            one, other = (torch.load(file, weights_only=True, map_location=real.device) for file in files)
            found.append({"ours": names[0], "other": names[1], **compare(one, other, real)})
    return found


def measure(row: Row, pictures: np.ndarray, who: judge.Judge, real: Renders, features: Path) -> dict[str, Any]:
    """One row of the table: distill.nearest names, the CNN gives features (and names too, for comparison)."""
    whole, patch, named, _ = judge.look(who, pictures)
    features.mkdir(exist_ok=True)
    torch.save(whole, features / f"{row.model}-{row.steps}.pt")
    thing, background = real.namer.name(pictures)
    wanted_thing, wanted_background = real.wanted
    n, right, behind = len(pictures), share(thing, wanted_thing), share(background, wanted_background)
    return {
        "model": row.model,
        "steps": row.steps,
        "object_accuracy": round(right, 4),
        "background_accuracy": round(behind, 4),
        "object_accuracy_cnn": round(share(named.cpu(), wanted_thing), 4),
        "frechet": round(judge.frechet(whole, real.whole), 3),
        "patch_frechet": round(judge.frechet(patch, real.patch), 3),
        "diversity": round(diversity(pictures), 4),
        "nearest_render": round(real.nearest(real.pixels, flat(pictures)), 4),
        "nearest_features": round(real.nearest(real.features, whole), 3),
        "n": n,
        "interval_95": {
            "object_accuracy": interval(right, n),
            "background_accuracy": interval(behind, n),
            "frechet": bootstrap(lambda rows: judge.frechet(whole[rows], real.whole), n),
            "patch_frechet": bootstrap(lambda rows: judge.frechet(patch[rows], real.patch), n),
        },
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    lines += ["| " + " | ".join(str(row[key]) for key in COLUMNS.values()) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def main(
    runs: Path = Path("runs"),
    docs: Path = Path("docs"),
    count: int = 1000,
    only: tuple[str, ...] = (),
    judging: int = 3000,
) -> None:
    """Measure every row (or the models named in `only`, keeping the other rows of an earlier run)."""
    torch.manual_seed(0)
    docs.mkdir(exist_ok=True)
    embedded = runs / "embedded"
    made = model.load_base(embedded)
    for part in (made.unet, made.encoders, made.vae):
        part.to(device()).eval().requires_grad_(False)
    made.vae.to(memory_format=torch.channels_last)
    who = judge.train(runs, judging)
    held_out = data.pairs(held_out=True)
    chosen = random.Random(5).sample(held_out, min(count // SEEDS, len(held_out)))
    pairs = [pair for pair in chosen for _ in range(SEEDS)]
    real, path = Renders(who, pairs), docs / "evaluation.json"
    about_real = real.about(who)
    rows = json.loads(path.read_text())["rows"] if only and path.exists() else []
    for row in [row for row in ROWS if not only or row.model in only]:
        if row.model == "mse_only" and not model.unet_file(runs / "distill_mse", row.steps).exists():
            continue  # the ablation was not run
        unet = unet_of(row, made, embedded, runs / "distill_mse")
        pictures = draw_row(row, made, unet, prompts_of(pairs))
        rows = [old for old in rows if (old["model"], old["steps"]) != (row.model, row.steps)]
        rows.append(measure(row, pictures, who, real, runs / "features"))
        rows.sort(key=lambda found: ROWS.index(Row(found["model"], found["steps"])))
        keep_strip(pictures, runs / "strips" / f"{row.model}-{row.steps}.png")
        write(docs, rows, about_real, [])
    write(docs, rows, about_real, comparisons(runs / "features", real.whole))
    keep_strip(real.real, runs / "strips" / "real.png")
    write_samples(runs / "strips", docs / "samples.jpg")


def write(docs: Path, rows: list[dict[str, Any]], about_real: dict[str, Any], compared: list[dict[str, Any]]) -> None:
    found = {"rows": rows, "comparisons": compared, "real_renders": about_real}
    (docs / "evaluation.json").write_text(json.dumps(found, indent=1) + "\n")
    paired = ["| ours | other | difference | 95 % |", "| --- | --- | --- | --- |"]
    for row in compared:
        low, high = row["interval_95"]
        paired.append(f"| {row['ours']} | {row['other']} | {row['difference']} | {low} to {high} |")
    title = "\nFréchet distance of ours less the other's, paired by prompt and seed:\n\n"
    (docs / "evaluation.md").write_text(table(rows) + title + "\n".join(paired) + "\n")


def keep_strip(pictures: np.ndarray, path: Path, count: int = 12) -> None:
    """The first seed of the first prompts, side by side."""
    path.parent.mkdir(exist_ok=True)
    sheets.montage([pictures[::SEEDS][:count]]).save(path)


def write_samples(strips: Path, path: Path) -> None:
    """All strips that there are, in the order of SHOWN: the same prompts and seeds in each column."""
    found = [strips / f"{name}.png" for name in SHOWN if (strips / f"{name}.png").exists()]
    sheets.montage([[np.asarray(Image.open(strip))] for strip in found]).save(path, quality=88)


if __name__ == "__main__":
    main(only=tuple(sys.argv[1:]))
