"""The closed forms against diffusers' own, and against noising step by step."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from stepserve.training.diffusion import NoiseSchedule, spread_timesteps
from stepserve.training.stages.denoiser import DenoiserConfig, build_scheduler

CONFIG = DenoiserConfig()


@pytest.fixture
def schedule() -> NoiseSchedule:
    return NoiseSchedule.scaled_linear(CONFIG.timesteps, CONFIG.beta_start, CONFIG.beta_end)


@pytest.fixture
def ddpm() -> DDPMScheduler:
    return DDPMScheduler(
        beta_start=CONFIG.beta_start,
        beta_end=CONFIG.beta_end,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
    )


@pytest.fixture
def sample() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x_0 = torch.randn(6, 4, 8, 8, generator=generator)
    noise = torch.randn(6, 4, 8, 8, generator=generator)
    return x_0, noise, torch.tensor([0, 1, 250, 500, 998, 999])


Sample = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def test_noising_equals_diffusers(
    schedule: NoiseSchedule, ddpm: DDPMScheduler, sample: Sample
) -> None:
    x_0, noise, t = sample
    torch.testing.assert_close(
        schedule.add_noise(x_0, noise, t), ddpm.add_noise(x_0, noise, t), rtol=0, atol=1e-6
    )


def test_velocity_equals_diffusers(
    schedule: NoiseSchedule, ddpm: DDPMScheduler, sample: Sample
) -> None:
    x_0, noise, t = sample
    torch.testing.assert_close(
        schedule.velocity(x_0, noise, t), ddpm.get_velocity(x_0, noise, t), rtol=0, atol=1e-6
    )


def test_saved_scheduler_has_the_training_schedule(schedule: NoiseSchedule) -> None:
    torch.testing.assert_close(build_scheduler(CONFIG).alphas_cumprod, schedule.alpha_bar)


def test_predictions_invert_noising(schedule: NoiseSchedule, sample: Sample) -> None:
    x_0, noise, t = sample
    x_t, velocity = schedule.add_noise(x_0, noise, t), schedule.velocity(x_0, noise, t)
    torch.testing.assert_close(schedule.predict_x_0(x_t, velocity, t), x_0, rtol=0, atol=1e-5)
    torch.testing.assert_close(schedule.predict_noise(x_t, velocity, t), noise, rtol=0, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 4, 50])
def test_ddim_steps_equal_diffusers(schedule: NoiseSchedule, sample: Sample, steps: int) -> None:
    scheduler: DDIMScheduler = build_scheduler(CONFIG)
    scheduler.set_timesteps(steps)
    x_t, velocity, _ = sample
    for t in scheduler.timesteps:
        earlier = int(t) - CONFIG.timesteps // steps
        ours = schedule.ddim_step(
            x_t, velocity, t.expand(6), torch.tensor([earlier]).expand(6) if earlier >= 0 else None
        )
        x_t = scheduler.step(velocity, t, x_t).prev_sample
        torch.testing.assert_close(ours, x_t, rtol=1e-5, atol=1e-5)


def test_one_jump_has_the_statistics_of_many_small_steps(schedule: NoiseSchedule) -> None:
    generator = torch.Generator().manual_seed(0)
    t = 300
    alpha_bar = schedule.alpha_bar.double()
    alphas = alpha_bar / torch.cat([torch.ones(1).double(), alpha_bar[:-1]])
    x = torch.full((40_000,), 2.0)
    for alpha in alphas[: t + 1].float():
        x = alpha.sqrt() * x + (1 - alpha).sqrt() * torch.randn(x.shape, generator=generator)
    signal, sigma = schedule.scales(torch.tensor([t]), torch.zeros(1))
    assert x.mean().item() == pytest.approx(2 * signal.item(), abs=0.02)
    assert x.std().item() == pytest.approx(sigma.item(), abs=0.02)


def test_schedule_goes_from_image_to_noise(schedule: NoiseSchedule) -> None:
    assert schedule.timesteps == CONFIG.timesteps
    assert bool((schedule.alpha_bar.diff() < 0).all())
    assert schedule.alpha_bar[0] > 0.999
    assert schedule.alpha_bar[-1] < 0.001


def test_loss_weights_are_capped_by_gamma(schedule: NoiseSchedule) -> None:
    t = torch.arange(schedule.timesteps)
    weight = schedule.loss_weight(t, gamma=5.0)
    snr = schedule.alpha_bar / (1 - schedule.alpha_bar)
    torch.testing.assert_close(weight * (snr + 1), snr.clamp(max=5.0))
    assert weight.max() <= 5 / 6 + 1e-6


@pytest.mark.parametrize("batch", [1, 7, 64, 1500])
def test_timesteps_cover_every_slice_once(batch: int) -> None:
    t = spread_timesteps(batch, 1000, torch.Generator().manual_seed(0))
    assert t.min() >= 0
    assert t.max() <= 999
    slices = (t.double() * batch / 1000).floor()
    assert (slices.sort().values - torch.arange(batch)).abs().max() <= max(1, batch / 1000)
