"""`make distill`: progressive adversarial distillation (arXiv 2402.13929) of runs/embedded into its step files.

The stages in the paper's order; each phase goes on from its own checkpoint in runs/distill.
"""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from distill import data, latents, lora, model, phases, predictors, sheets
from distill import stages as paper
from distill.phases import Workshop
from distill.training import begin, device, is_writer

# Folded in at stage 0 and never again. The paper's is 6, for SDXL. The teacher's Frechet distance on 400 held-out
# pictures at 32 steps: 31.2 without, 18.5 at 1.25, 14.7 at 1.5, 13.9 at 1.75, 14.5 at 2 (the autoencoder alone: 11.9).
GUIDANCE = 1.75


@dataclass(frozen=True)
class Counts:
    """Iterations of a stage's phases, in their order. At 1 step there is no LoRA: all are of the full network."""

    critic: int  # the discriminator alone, on the student as the stage finds it
    conditional: int  # LoRA
    relaxed: int  # LoRA
    full: int  # relaxed

    @property
    def updates(self) -> int:
        """Of the student: what the MSE-only ablation gets, too."""
        return self.conditional + self.relaxed + self.full


@dataclass(frozen=True)
class Plan:
    """Iterations of everything; of the adversarial stages by the student's steps."""

    many: tuple[int, int] = (500, 600)  # stage 0: LoRA, full
    adversarial: tuple[tuple[int, Counts], ...] = (
        (8, Counts(0, 60, 60, 100)),
        (4, Counts(100, 80, 80, 160)),
        (2, Counts(250, 120, 150, 400)),
        (1, Counts(200, 250, 0, 700)),
    )
    switch: int = 600  # iterations of the epsilon to x0 switch
    batch: int = 32


def stage_0(shop: Workshop, plan: Plan) -> tuple[UNet2DConditionModel, UNet2DConditionModel]:
    """Many steps to 32 by MSE, guidance folded in. Returns the student as a LoRA on the base, and in full."""
    teacher = predictors.guided(predictors.of(shop.made.unet), shop.text([""]), GUIDANCE)
    low = lora.attach(shop.made.unet)
    phases.match(shop, "32-lora", paper.MSE, low, teacher, plan.many[0])
    full = lora.merged(low)
    phases.match(shop, "32-full", paper.MSE, full, teacher, plan.many[1])
    return low, full


def adversarial_stage(
    shop: Workshop, steps: int, low: UNet2DConditionModel, teachers: dict[int, UNet2DConditionModel], counts: Counts
) -> UNet2DConditionModel:
    """LoRA conditional, LoRA relaxed, merge, full relaxed. `low` goes on from the stage before: it carries them all."""
    stage = paper.STAGES[steps]
    relaxed = paper.SKIP.get(steps, stage)
    teach, skip = predictors.of(teachers[stage.teacher]), predictors.of(teachers[relaxed.teacher])
    critic = phases.new_critic(shop.made.unet)
    phases.fight(shop, f"{steps}-lora-conditional", stage, low, teach, counts.conditional, critic, counts.critic)
    critic = critic.relaxed()
    phases.fight(shop, f"{steps}-lora-relaxed", relaxed, low, skip, counts.relaxed, critic)
    full = lora.merged(low)
    phases.fight(shop, f"{steps}-full-relaxed", relaxed, full, skip, counts.full, critic)
    return full


def one_step_stage(
    shop: Workshop, teachers: dict[int, UNet2DConditionModel], counts: Counts, switch: int
) -> UNet2DConditionModel:
    """From the 2-step network: switch to x0, then the two objectives. "Substantial formulation change": no LoRA."""
    stage, relaxed = paper.STAGES[1], paper.SKIP[1]
    teach, skip = predictors.of(teachers[stage.teacher]), predictors.of(teachers[relaxed.teacher])
    full = copy.deepcopy(teachers[2]).requires_grad_(True)
    phases.switch_to_x0(shop, "1-switch", stage, full, teachers[2], switch)
    critic = phases.new_critic(shop.made.unet)
    phases.fight(shop, "1-conditional", stage, full, teach, counts.conditional, critic, counts.critic)
    critic = critic.relaxed()
    phases.fight(shop, "1-relaxed", relaxed, full, skip, counts.full, critic)
    return full


def distill(shop: Workshop, plan: Plan, out: Path) -> None:
    """Every stage; each result teaches the next one and is written in the released names."""
    low, full = stage_0(shop, plan)
    teachers = {32: frozen(full)}
    look(shop, teachers[32], 32)
    for steps, counts in plan.adversarial:
        if steps > 1:
            full = adversarial_stage(shop, steps, low, teachers, counts)
            if is_writer():
                lora.save(low, model.lora_file(out, steps))
        else:
            full = one_step_stage(shop, teachers, counts, plan.switch)
        teachers[steps] = frozen(full)
        if is_writer():
            model.save_unet(full, model.unet_file(out, steps))
        look(shop, teachers[steps], steps)


def distill_by_mse(shop: Workshop, plan: Plan, out: Path) -> None:
    """The paper's ablation: the same start, as many updates, MSE alone."""
    _, full = stage_0(shop, plan)
    teachers = {32: frozen(full)}
    for steps, counts in plan.adversarial:
        stage = paper.STAGES[steps]
        full = copy.deepcopy(teachers[stage.teacher]).requires_grad_(True)
        if steps == 1:
            phases.switch_to_x0(shop, "1-mse-switch", stage, full, teachers[2], plan.switch)
        phases.match(shop, f"{steps}-mse", stage, full, predictors.of(teachers[stage.teacher]), counts.updates)
        teachers[steps] = frozen(full)
        if is_writer():
            model.save_unet(full, model.unet_file(out, steps))


def frozen(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    return copy.deepcopy(unet).eval().requires_grad_(False)


def look(shop: Workshop, unet: UNet2DConditionModel, steps: int) -> None:
    """Held-out pairs, drawn and real, as a PNG."""
    if not is_writer():
        return
    predicts = "sample" if steps == 1 else "epsilon"
    pairs = data.pairs(held_out=True)[::20][:24]
    sheets.write_grid(shop.made, pairs, shop.folder / f"{steps}.png", steps=steps, unet=unet, predicts=predicts)


def open_workshop(runs: Path, plan: Plan, name: str) -> Workshop:
    made = model.load_base(runs / "embedded")
    for part in (made.unet, made.encoders, made.vae):
        part.to(device()).eval().requires_grad_(False)
    made.unet.to(memory_format=torch.channels_last)
    cache = latents.cached(made.vae, runs / "latents.pt")
    (runs / name).mkdir(parents=True, exist_ok=True)
    return Workshop(made, cache, runs / name, plan.batch)


def main(runs: Path = Path("runs"), plan: Plan = Plan(), only: str = "") -> None:
    begin()
    if only != "mse":
        distill(open_workshop(runs, plan, "distill"), plan, runs / "embedded")
    if only != "adversarial":
        distill_by_mse(open_workshop(runs, plan, "distill_mse"), plan, runs / "distill_mse")


if __name__ == "__main__":
    main(only=sys.argv[1] if len(sys.argv) > 1 else "")
