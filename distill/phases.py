"""One phase of a stage: a training loop over the losses of distill/stages.py, resumable, logged."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from distill import data, lora, predictors
from distill import stages as paper
from distill.diffusion import Predictor, start_from_pure_noise
from distill.discriminator import Discriminator
from distill.latents import Latents
from distill.model import Model
from distill.stages import Batch, Stage
from distill.text import Text, token_ids
from distill.training import Log, average_gradients, cosine, device, join_group, load, save


@dataclass(frozen=True)
class Rates:
    """Learning rates at our size and batch (the paper's: Adam 1e-5, then 1e-6 with LoRA and 5e-7, at batch 512)."""

    lora: float = 4e-4
    switch: float = 1e-3  # to x0 is far: at 5e-4, 100 iterations had learned nothing (MSE 1.2 where the variance is 1)
    critic: float = 1e-3


# Learning rate of the full network by the student's steps, for both objectives. Many steps are next to right as they
# are, and a high rate only shakes the weights: at 5e-4 for 220 iterations MSE alone lost 20 points of Frechet distance.
FULL = {32: 2e-4, 8: 5e-5, 4: 1e-4, 2: 2e-4, 1: 2e-4}

# Adam's, in the adversarial phases. The paper has (0, 0.99) for both, at batch 512; at 32 the noise of single batches
# drove a full network to twice its error, and the discriminator learned less.
BETAS, CRITIC_BETAS = (0.9, 0.99), (0.5, 0.99)

# Weight of an MSE term beside the adversarial loss, by the student's steps; the paper has none. At 2 and 1 steps it is
# about as strong as the adversarial gradient once the student has learned (their norms over 8 batches: 3.7 and 0.04 at
# 2, 6.6 and 0.06 at 1), at 8 and 4 it decides: there is next to nothing to tell apart.
ANCHOR = {8: 300.0, 4: 200.0, 2: 100.0, 1: 100.0}


@dataclass
class Workshop:
    """What every phase needs: the base model (frozen), the latents, where to write, how large a batch."""

    made: Model
    cache: Latents
    folder: Path
    batch: int = 32
    rates: Rates = field(default_factory=Rates)

    @torch.no_grad()
    def text(self, prompts: list[str]) -> Text:
        text: Text = self.made.encoders(token_ids(self.made.tokenizer, prompts).to(device()))
        return text

    def rate(self, stage: Stage, student: UNet2DConditionModel) -> float:
        return self.rates.lora if lora.parameters(student) else FULL[stage.steps]

    def draw(self, stage: Stage, name: str, step: int) -> Batch:
        """The batch of one step: the same for the same phase and step, so a resumed run repeats nothing."""
        return self.draw_with_target(stage, name, step)[0]

    def draw_with_target(self, stage: Stage, name: str, step: int) -> tuple[Batch, Tensor, Tensor]:
        """The same, with the latents and the noise that it is made of."""
        rank, processes = join_group()
        size, rng = self.batch // processes, random.Random(f"{name} {step} {rank}")
        generator = torch.Generator().manual_seed(rng.randrange(2**62))
        rows = [rng.randrange(len(self.cache.pairs)) for _ in range(size)]
        said = [data.paraphrase(data.objects()[self.cache.pairs[i][0]], self.cache.pairs[i][1], rng) for i in rows]
        x0 = self.cache.x0[rows]
        noise = torch.randn(x0.shape, generator=generator).to(x0)
        k = paper.draw_starts(stage, size, generator).to(x0.device)
        return Batch(start_from_pure_noise(x0, noise, stage.times.to(k.device)[k]), k, self.text(said)), x0, noise


def trainable(unet: UNet2DConditionModel) -> list[torch.nn.Parameter]:
    return [p for p in unet.parameters() if p.requires_grad]


def new_critic(unet: UNet2DConditionModel) -> Discriminator:
    """The conditional one, from the base UNet at every stage; the relaxed phases go on with its relaxed()."""
    torch.manual_seed(0)  # the heads' start: alike in every process
    return Discriminator(unet, conditional=True).to(device())


def match(
    shop: Workshop, name: str, stage: Stage, student: UNet2DConditionModel, teacher: Predictor, steps: int
) -> None:
    """|| student's move - teacher's moves ||^2: stage 0 (section 3.6), and the MSE-only ablation."""
    predict = predictors.of(student)

    def loss(batch: Batch) -> Tensor:
        return paper.mse_loss(paper.follow(stage, predict, batch), paper.teach(stage, teacher, batch))

    _fit(shop, name, stage, student, loss, shop.rate(stage, student), steps)


def switch_to_x0(
    shop: Workshop, name: str, stage: Stage, student: UNet2DConditionModel, frozen: UNet2DConditionModel, steps: int
) -> None:
    """Make the student say x0 where its frozen copy says epsilon (section 3.7.3)."""
    online, offline = predictors.of(student), predictors.of(frozen)

    def loss(batch: Batch) -> Tensor:
        t = stage.times.to(batch.k.device)[batch.k]
        with torch.no_grad():
            epsilon = offline(batch.x_t, t, batch.text)
        return paper.x0_switch_loss(online(batch.x_t, t, batch.text), batch.x_t, epsilon, t)

    _fit(shop, name, stage, student, loss, shop.rates.switch, steps)


def _fit(
    shop: Workshop,
    name: str,
    stage: Stage,
    student: UNet2DConditionModel,
    loss_of: Callable[[Batch], Tensor],
    rate: float,
    steps: int,
) -> None:
    params, path = trainable(student), shop.folder / f"{name}.pt"
    optimizer = torch.optim.Adam(params, lr=rate, betas=(0.9, 0.999), fused=True)
    log = Log(path.with_suffix(".jsonl"), steps, load(path, student=student, optimizer=optimizer))
    for step in log.steps():
        loss = loss_of(shop.draw(stage, name, step))
        _descend(optimizer, params, loss, cosine(step, steps, rate, warmup=20))
        log.note(step, mse=loss)
        if step % 100 == 0 or step == steps:
            save(path, step, student=student, optimizer=optimizer)


def fight(
    shop: Workshop,
    name: str,
    stage: Stage,
    student: UNet2DConditionModel,
    teacher: Predictor,
    steps: int,
    critic: Discriminator,
    alone: int = 0,
) -> None:
    """Alternate a discriminator step and a student step, after `alone` steps of the discriminator.

    It learns slowly at first: its logits of the two landings grow apart by a factor of three in 100 steps, and its loss
    leaves chance after some 500 (docs/distillation.md).
    """
    rate = shop.rate(stage, student)
    params, critic_params, predict = trainable(student), list(critic.parameters()), predictors.of(student)
    optimizer = torch.optim.Adam(params, lr=rate, betas=BETAS, fused=True)
    critic_optimizer = torch.optim.Adam(critic_params, lr=shop.rates.critic, betas=CRITIC_BETAS, fused=True)
    path = shop.folder / f"{name}.pt"
    parts = {"student": student, "critic": critic, "optimizer": optimizer, "critic_optimizer": critic_optimizer}
    log = Log(path.with_suffix(".jsonl"), alone + steps, load(path, **parts))
    for step in log.steps():
        batch = shop.draw(stage, name, step)
        generator = torch.Generator().manual_seed(step * 64 + join_group()[0])
        noise = torch.randn(batch.x_t.shape, generator=generator).to(batch.x_t)
        detail = not critic.conditional
        t_star = paper.draw_noised_times(stage, len(noise), detail, generator).to(noise.device)
        judge = partial(paper.judge, stage, critic, batch, t_star, noise)

        with torch.set_grad_enabled(step > alone):
            real, fake = paper.teach(stage, teacher, batch), paper.follow(stage, predict, batch)
        against = paper.critic_loss(judge(real), judge(fake.detach()))
        _descend(critic_optimizer, critic_params, against, shop.rates.critic * min(1.0, step / 20))
        mse = paper.mse_loss(fake, real)
        seen = {"critic": against, "mse": mse}
        if step > alone:
            seen["student"] = for_it = paper.student_loss(judge(fake))
            loss = for_it + ANCHOR[stage.steps] * mse
            _descend(optimizer, params, loss, cosine(step - alone, steps, rate, warmup=20))
        log.note(step, **seen)
        if step % 100 == 0 or step == alone + steps:
            save(path, step, **parts)


def _descend(optimizer: torch.optim.Optimizer, params: Sequence[Tensor], loss: Tensor, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad()
    gradients = torch.autograd.grad(loss, params)  # of these only: a student step leaves the discriminator alone
    for parameter, gradient in zip(params, gradients, strict=True):
        parameter.grad = gradient
    average_gradients(params)
    torch.nn.utils.clip_grad_norm_(params, 1.0)
    optimizer.step()
