"""The judge: a small classifier of real renders. It names object and background, and its features give distances."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill import data
from distill.training import Log, cosine, device, load, save

FEATURES = 64  # few enough that 1,000 images estimate their covariance
UNLABELLED = -100  # cross_entropy's own mark
PATCH = 64  # pixels: the centre crop of "patch" distances, half the width (the paper's is 299 of 1024)


class Judge(nn.Module):
    """(B, 3, H, W) in [-1, 1] to (features (B, 64), object logits, background logits)."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 24, 48, 96, 128)
        self.body = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(a, b, 3, stride=2, padding=1), nn.GroupNorm(8, b), nn.SiLU())
                for a, b in itertools.pairwise(widths)
            ),
            nn.Conv2d(widths[-1], widths[-1], 3, padding=1),
            nn.SiLU(),
        )
        self.features = nn.Linear(2 * widths[-1], FEATURES)
        self.object = nn.Linear(FEATURES, len(data.objects()))
        self.background = nn.Linear(FEATURES, len(data.BACKGROUNDS))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        seen = self.body(pixels)
        seen = self.features(torch.cat([seen.mean((2, 3)), seen.amax((2, 3))], dim=1))
        return seen, self.object(F.silu(seen)), self.background(F.silu(seen))


def to_pixels(pictures: np.ndarray) -> Tensor:
    return torch.from_numpy(pictures).to(device()).permute(0, 3, 1, 2).float() / 127.5 - 1


def soften(pixels: Tensor, chosen: Tensor) -> Tensor:
    """Blur those that are chosen, (B,) bool: a soft picture of a fox is still to be called a fox."""
    soft = F.avg_pool2d(pixels, 3, stride=1, padding=1, count_include_pad=False)
    return torch.where(chosen.view(-1, 1, 1, 1), soft, pixels)


def labels(pairs: list[tuple[int, str]]) -> tuple[Tensor, Tensor]:
    names = list(data.BACKGROUNDS)
    things, backgrounds = [i for i, _ in pairs], [names.index(background) for _, background in pairs]
    return torch.tensor(things).to(device()), torch.tensor(backgrounds).to(device())


def compose(cut: np.ndarray, colours: Tensor) -> Tensor:
    """Cut-outs (B, H, W, 4) over plain colours (B, 3) in [-1, 1]: what distill.data.draw would give."""
    art = torch.from_numpy(cut).to(colours.device).permute(0, 3, 1, 2).float()
    alpha = art[:, 3:] / 255
    return (art[:, :3] / 127.5 - 1) * alpha + colours.view(-1, 3, 1, 1) * (1 - alpha)


def draw_backgrounds(things: list[int], rng: random.Random) -> tuple[Tensor, Tensor]:
    """Colours (B, 3) and labels (B,): half from the list (never a held-out pair), half any colour, unlabelled.

    With the listed pairs alone the judge learned pairs: it named 84 % of real held-out renders.
    """
    names, colours, found = list(data.BACKGROUNDS), [], []
    for i in things:
        allowed = [name for name in names if not data.is_held_out(data.objects()[i].name, name)]
        name = rng.choice(allowed)
        if rng.random() < 0.5:
            colours.append([int(data.BACKGROUNDS[name][k : k + 2], 16) / 127.5 - 1 for k in (1, 3, 5)])
            found.append(names.index(name))
        else:
            colours.append([rng.uniform(-1, 1) for _ in range(3)])
            found.append(UNLABELLED)
    return torch.tensor(colours).to(device()), torch.tensor(found).to(device())


def train(folder: Path, steps: int = 1500, batch: int = 32, jitters: int = 8) -> Judge:
    """On real renders of all objects, never on a held-out pair; from folder/judge.pt where there is one."""
    judge = Judge().to(device())
    optimizer = torch.optim.AdamW(judge.parameters(), lr=3e-3, weight_decay=0.01)
    done = load(folder / "judge.pt", judge=judge, optimizer=optimizer)
    if done < steps:
        things = list(range(len(data.objects()))) * min(jitters, steps)
        rng = random.Random(11)
        pool = np.stack([data.cut_out(data.objects()[i].codepoint, rng) for i in things])
        log = Log(folder / "judge.jsonl", steps, done)
        for step in log.steps():
            rng = random.Random(step)
            rows = [rng.randrange(len(things)) for _ in range(batch)]
            colours, background = draw_backgrounds([things[i] for i in rows], rng)
            pixels = soften(compose(pool[rows], colours), torch.tensor([rng.random() < 0.5 for _ in rows]).to(device()))
            thing = torch.tensor([things[i] for i in rows]).to(device())
            for group in optimizer.param_groups:
                group["lr"] = cosine(step, steps, 3e-3)
            _, said_thing, said_background = judge(pixels)
            loss = F.cross_entropy(said_thing, thing)
            loss = loss + F.cross_entropy(said_background, background, ignore_index=UNLABELLED)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            log.note(step, loss=loss)
            if step % 250 == 0 or step == steps:
                save(folder / "judge.pt", step, judge=judge, optimizer=optimizer)
    return judge.eval().requires_grad_(False)


def look(judge: Judge, pictures: np.ndarray) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(whole features, patch features, objects, backgrounds) of uint8 (B, 128, 128, 3)."""
    edge = (data.SIZE - PATCH) // 2
    parts = []
    for start in range(0, len(pictures), 128):
        pixels = to_pixels(pictures[start : start + 128])
        whole, thing, background = judge(pixels)
        patch = judge(pixels[:, :, edge:-edge, edge:-edge])[0]
        parts.append((whole, patch, thing.argmax(1), background.argmax(1)))
    whole, patch, thing, background = (torch.cat(column) for column in zip(*parts, strict=True))
    return whole, patch, thing, background


def frechet(one: Tensor, two: Tensor) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), from features (N, d): the FID formula on our features."""
    (m1, c1), (m2, c2) = ((x.double().mean(0), x.double().T.cov()) for x in (one, two))
    # C1 C2 has the eigenvalues of the symmetric C1^(1/2) C2 C1^(1/2): no complex square root is needed.
    values, vectors = torch.linalg.eigh(c1)
    root = vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T
    shared = torch.linalg.eigvalsh(root @ c2 @ root).clamp(min=0).sqrt().sum()
    return float((m1 - m2).square().sum() + c1.trace() + c2.trace() - 2 * shared)
