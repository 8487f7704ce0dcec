"""What every training loop needs: a device, a learning rate, a checkpoint, a log that plots."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def begin() -> None:
    """Seed, and on a CPU attention as plain matrix products: its flash kernel's backward took 30 % of an iteration."""
    torch.manual_seed(0)
    torch.backends.cuda.enable_flash_sdp(device().type == "cuda")  # the switch is the CPU's too, whatever its name


def join_group() -> tuple[int, int]:
    """(rank, processes). Under torchrun, each process trains on its part of every batch; else (0, 1).

    On a shared CPU two processes of one thread waste less than one of two: they meet once an iteration.
    """
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def is_writer() -> bool:
    return join_group()[0] == 0


def average_gradients(params: Sequence[Tensor]) -> None:
    """The mean over all processes, in place."""
    _, count = join_group()
    if count == 1:
        return
    flat = torch.cat([p.grad.flatten() for p in params if p.grad is not None])
    dist.all_reduce(flat)
    flat /= count
    for p in params:
        if p.grad is not None:
            p.grad.copy_(flat[: p.numel()].view_as(p))
            flat = flat[p.numel() :]


def cosine(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    """The learning rate: up over `warmup` steps, then a half cosine to nearly 0."""
    return peak * min(1.0, step / warmup) * (0.5 + 0.5 * math.cos(math.pi * step / (steps + 1)))


def save(path: Path, step: int, **parts: Any) -> None:
    """Write a checkpoint; a crash leaves the old one or the new one, never half of one."""
    if not is_writer():
        return  # one process writes
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"step": step} | {name: part.state_dict() for name, part in parts.items()}, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def load(path: Path, **parts: Any) -> int:
    """Put a checkpoint's parts back; the step it was written at, 0 without one."""
    if not path.exists():
        return 0
    stored = torch.load(path, map_location=device(), weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(stored[name])
    return int(stored["step"])


class Log:
    """A progress bar and a file of JSON lines, {"step": n, name: value}."""

    def __init__(self, path: Path, total: int, done: int, every: int = 25) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.total, self.done, self.every = path, total, done, every
        self.sums: dict[str, list[float]] = {}
        self.silent = not is_writer()
        if not done and not self.silent:
            path.unlink(missing_ok=True)

    def steps(self) -> Iterator[int]:
        """1 .. total, from where the checkpoint ended."""
        steps = range(self.done + 1, self.total + 1)
        self.bar = tqdm(steps, initial=self.done, total=self.total, desc=self.path.stem, disable=self.silent)
        yield from self.bar

    def note(self, step: int, **values: float | Tensor) -> None:
        """Average each value over `every` steps, then write it."""
        for name, value in values.items():
            self.sums.setdefault(name, []).append(float(torch.as_tensor(value).detach()))
        if self.silent or (step % self.every and step != self.total):
            return
        means = {name: sum(kept) / len(kept) for name, kept in self.sums.items()}
        self.sums.clear()
        self.bar.set_postfix({name: f"{value:.4g}" for name, value in means.items()})
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step} | means) + "\n")


class Ema:
    """A running mean of the weights: what is sampled from and distilled, as in SDXL's training."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay, self.module = decay, module
        self.shadow = {name: value.detach().clone() for name, value in module.state_dict().items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, step / (step + 10))  # young weights are forgotten fast
        for name, value in self.module.state_dict().items():
            self.shadow[name].lerp_(value, 1 - decay)

    def state_dict(self) -> dict[str, Tensor]:
        return self.shadow

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.shadow = {name: value.clone() for name, value in state.items()}
