"""The losses and the moves against numbers worked out by hand, and against diffusers' scheduler."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import EulerDiscreteScheduler

from distill import diffusion, model, nets, stages, teacher
from distill.discriminator import Discriminator
from distill.text import WIDTHS, Text


def test_the_critics_loss_by_hand():
    real, fake = torch.tensor([0.0, 2.0]), torch.tensor([-1.0, 1.0])
    by_hand = (math.log(2) + math.log(1 + math.exp(-2))) / 2 + (math.log(1 + math.exp(-1)) + math.log(1 + math.e)) / 2
    assert stages.critic_loss(real, fake).item() == pytest.approx(by_hand)


def test_the_students_loss_by_hand():
    fake = torch.tensor([-1.0, 1.0])
    by_hand = (math.log(1 + math.e) + math.log(1 + math.exp(-1))) / 2
    assert stages.student_loss(fake).item() == pytest.approx(by_hand)


def test_the_x0_switch_aims_at_what_the_frozen_network_implies():
    t = torch.tensor([999])
    x, epsilon = torch.full((1, 4, 2, 2), 0.5), torch.full((1, 4, 2, 2), 0.25)
    clean = (0.5 - math.sqrt(1 - 0.0046601) * 0.25) / math.sqrt(0.0046601)  # abar_999 of lightning.md section 2
    out = torch.full_like(x, clean + 0.1)
    assert stages.x0_switch_loss(out, x, epsilon, t).item() == pytest.approx(0.01, rel=0.02)


def test_the_teachers_loss_weighs_high_noise_more():
    zero, one = torch.zeros(1, 4, 2, 2), torch.ones(1, 4, 2, 2)
    sigma = 14.61464  # at 999
    assert teacher.epsilon_loss(zero, one, torch.tensor([999])).item() == pytest.approx(1 + 0.1 * sigma**2, rel=1e-4)


@pytest.mark.parametrize("steps", [1, 2, 4, 8, 32])
def test_the_grid_backwards_is_diffusers_trailing_spacing(steps):
    scheduler = EulerDiscreteScheduler.from_config(model.base_scheduler().config, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    assert diffusion.grid(steps).flip(0)[:-1].tolist() == scheduler.timesteps.long().tolist()


def test_a_coarse_grid_is_part_of_the_fine_one():
    assert torch.equal(diffusion.grid(128)[::4], diffusion.grid(32))
    assert torch.equal(diffusion.grid(32)[::4], diffusion.grid(8))


def test_training_starts_from_pure_noise():
    clean, noise = torch.randn(2, 4, 2, 2), torch.randn(2, 4, 2, 2)
    x = diffusion.start_from_pure_noise(clean, noise, torch.tensor([999, 499]))
    assert torch.equal(x[0], noise[0])
    assert not torch.equal(x[1], noise[1])


def test_a_perfect_prediction_walks_to_the_clean_latents():
    clean, noise = torch.randn(2, 4, 2, 2), torch.randn(2, 4, 2, 2)
    times, k = diffusion.grid(4), torch.tensor([4, 2])
    x = diffusion.add_noise(clean, noise, times[k])
    landed = diffusion.walk(lambda *_: noise, x, k, None, times, moves=4, stride=1)  # two moves too many for row 1
    torch.testing.assert_close(landed, clean, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("stage", [stages.MSE, *stages.STAGES.values(), *stages.SKIP.values()])
def test_half_of_the_starts_are_where_sampling_in_so_many_steps_passes(stage):
    scheduler = EulerDiscreteScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(stage.steps)
    passed = [int(stage.times[k]) for k in reversed(stage.visited)]
    assert passed == [round(float(t)) for t in scheduler.timesteps]
    drawn = stages.draw_starts(stage, 4000, torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) == set(stage.starts)
    share = torch.isin(drawn, torch.tensor(stage.visited)).float().mean().item()
    assert share == pytest.approx(0.5 + 0.5 * len(stage.visited) / len(stage.starts), abs=0.04)


@pytest.mark.parametrize("conditional", [True, False])
def test_the_discriminator_gives_one_logit_an_image_and_reads_what_it_should(conditional):
    torch.manual_seed(0)
    unet = nets.build_unet((16, 32, 32), heads=(1, 2, 2))
    critic = Discriminator(unet, conditional)
    text = Text(torch.randn(3, 24, sum(WIDTHS)), torch.randn(3, WIDTHS[1]), torch.full((3, 6), 128.0))
    x_end, x_t = torch.randn(3, 4, 16, 16), torch.randn(3, 4, 16, 16)
    t_end, t = torch.tensor([-1, 249, 499]), torch.tensor([249, 499, 999])
    shapes = [tuple(level.shape) for level in critic.features(x_end, t_end, text)]
    assert shapes == [(3, 16, 16, 16), (3, 32, 8, 8), (3, 32, 4, 4), (3, 32, 4, 4)]
    logits = critic(x_end, t_end, x_t, t, text)
    assert logits.shape == (3,)
    assert logits.dtype == torch.float32
    assert torch.equal(critic(x_end, t_end, x_t + 1, t, text), logits) is not conditional
