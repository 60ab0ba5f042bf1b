"""Reverse steps against Bayes' rule computed with numbers, and against diffusers' DDPM."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDPMScheduler
from noise_schedules import SCHEDULES, diffusers_settings
from stepserve.training.diffusion import NoiseSchedule, Prediction
from stepserve.training.reverse import ReverseVariance, ancestral_step, posterior, reverse_step


def precise(name: str) -> NoiseSchedule:
    return NoiseSchedule(SCHEDULES[name].alpha_bar.double())


def normal(x: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
    return torch.exp(-((x - mean) ** 2) / (2 * variance)) / (2 * math.pi * variance).sqrt()


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("t", [1, 2, 300, 999])
def test_posterior_is_bayes_rule(name: str, t: int) -> None:
    """q(x_{t-1} | x_t, x_0) is q(x_t | x_{t-1}) q(x_{t-1} | x_0), scaled to 1: on a fine grid."""
    schedule = precise(name)
    left, before = schedule.alpha_bar[t], schedule.alpha_bar[t - 1]
    x_0 = torch.tensor([[0.7]]).double()
    x_t = left.sqrt() * x_0 - 1.5 * (1 - left).sqrt()
    alpha = left / before
    found = posterior(schedule, x_0, x_t, torch.tensor([t]))
    reach = 12 * found.variance.sqrt()
    x = torch.linspace(0, 1, 20_001).double() * 2 * reach[0] - reach[0] + found.mean[0]
    weights = normal(x_t[0], alpha.sqrt() * x, 1 - alpha) * normal(
        x, before.sqrt() * x_0[0], 1 - before
    )
    weights = weights / weights.sum()
    mean = (weights * x).sum()
    variance = (weights * (x - mean) ** 2).sum()
    torch.testing.assert_close(found.mean[0, 0], mean, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(found.variance[0, 0], variance, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
def test_posterior_of_the_first_step_is_x_0(name: str) -> None:
    x_0, x_t = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)).double()
    found = posterior(precise(name), x_0, x_t, torch.zeros(3, dtype=torch.long))
    torch.testing.assert_close(found.mean, x_0)
    assert bool((found.variance == 0).all())


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_posterior_step_leads_to_the_closed_form_of_one_step_less(name: str) -> None:
    """Sampled x_t, then x_{t-1} given both: mean and variance are those of q(x_{t-1} | x_0)."""
    schedule, t = precise(name), torch.tensor([2, 300, 999])
    signal, sigma = schedule.scales(t, t)
    signal_before, sigma_before = schedule.scales(t - 1, t)
    # A mean that is linear in x_t: at 0 and at 1 it says by what.
    x_0 = torch.full((3,), 0.7).double()
    at_0, at_1 = (posterior(schedule, x_0, torch.full((3,), x).double(), t) for x in (0.0, 1.0))
    slope = at_1.mean - at_0.mean
    torch.testing.assert_close(at_0.mean + slope * signal * x_0, signal_before * x_0)
    torch.testing.assert_close(slope**2 * sigma**2 + at_0.variance, sigma_before**2)


@pytest.mark.parametrize("variance", ReverseVariance)
@pytest.mark.parametrize("prediction", Prediction)
@pytest.mark.parametrize("t", [0, 1, 500, 999])
def test_ancestral_steps_are_those_of_diffusers(
    variance: ReverseVariance, prediction: Prediction, t: int
) -> None:
    scheduler = DDPMScheduler(
        **diffusers_settings("linear"),
        prediction_type=prediction.value,
        variance_type=variance.value,
        clip_sample=False,
    )
    generator = torch.Generator().manual_seed(0)
    x_t, output = torch.randn(2, 4, 3, 8, 8, generator=generator)
    seeds = [torch.Generator().manual_seed(1) for _ in range(2)]
    ours = ancestral_step(
        SCHEDULES["linear"], x_t, output, torch.full((4,), t), prediction, seeds[0], variance
    )
    theirs = scheduler.step(output, t, x_t, generator=seeds[1]).prev_sample
    torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-4)


def test_steps_of_one_batch_may_be_at_different_timesteps() -> None:
    schedule = precise("cosine")
    x_t, output = torch.randn(2, 3, 2, generator=torch.Generator().manual_seed(0)).double()
    t = torch.tensor([0, 1, 700])
    together = reverse_step(schedule, x_t, output, t, Prediction.VELOCITY)
    for row in range(3):
        [x, o, time] = (part[row : row + 1] for part in (x_t, output, t))
        apart = reverse_step(schedule, x, o, time, Prediction.VELOCITY)
        torch.testing.assert_close(together.mean[row : row + 1], apart.mean)
        torch.testing.assert_close(together.variance[row : row + 1], apart.variance)
    assert together.variance[0] == together.variance[1] > 0
