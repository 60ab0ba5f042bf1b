"""Every scheduler that a request may name, with a network that is known to be right.

A network that knows x_0 must be led to x_0. The best network for a mixture of Gaussians must be
led to samples of the mixture, and a scheduler with a fault must not pass for one without.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch
from gaussian_mixture import GaussianMixture
from samplers import DIFFUSION, FLOW_MATCHING, Denoise, Sampler, of_model, trained_with
from stepserve.pipelines.schedulers.usable import Configured
from stepserve.training.diffusion import Prediction

MIXTURE = GaussianMixture(
    weights=torch.tensor([0.3, 0.7], dtype=torch.float64),
    means=torch.tensor([-1.2, 0.8], dtype=torch.float64),
    deviations=torch.tensor([0.2, 0.4], dtype=torch.float64),
)
SAMPLES = 10_000
STEPS = 100
# Kolmogorov's bound: samples of the mixture itself are further away once in 10,000 seeds.
CHANCE = math.sqrt(math.log(2 / 1e-4) / 2 / SAMPLES)
# What so few steps of a correct scheduler may add: most solvers none, those of first order this.
DISCRETISATION = 0.006
BOUND = CHANCE + DISCRETISATION

CLEAN = torch.linspace(-2, 2, 64).view(-1, 1, 1, 1)
EXACT = 1e-5


def knowing(x_0: torch.Tensor) -> Denoise:
    return lambda x_t, signal, sigma: x_0.double()


def what_is_left(sampler: Sampler, steps: int) -> float:
    """How far from x_0 a scheduler ends that is told x_0 at every step."""
    return float((sampler.draw(knowing(CLEAN), steps, len(CLEAN)) - CLEAN).abs().max())


def tolerance(sampler: Sampler, steps: int) -> float:
    """Of what is left: rounding, and what two classes of diffusers and whole timesteps leave."""
    name, config = sampler.scheduler.cls.__name__, sampler.scheduler.config
    largest_noise = 4.0
    if name == "DEISMultistepScheduler":
        # It ends at the noise of its last step, not at none.
        ratio = 0.011 if sampler.prediction else config.get("flow_shift", 1.0) * 1.1 / steps
        return ratio * largest_noise
    if name == "PNDMScheduler" and sampler.prediction is Prediction.VELOCITY:
        # It averages velocities of several timesteps as if they were of one.
        return 10 / steps**2
    if sampler.prediction is None and config.get("use_flow_sigmas", False):
        # Timesteps are rounded to whole ones, noise levels are not.
        return largest_noise / 1000
    return EXACT


@pytest.mark.parametrize("steps", [10, 50])
@pytest.mark.parametrize("sampler", DIFFUSION + FLOW_MATCHING, ids=lambda sampler: sampler.name)
@pytest.mark.filterwarnings("ignore")
def test_a_network_that_knows_x_0_is_led_to_it(sampler: Sampler, steps: int) -> None:
    assert what_is_left(sampler, steps) <= tolerance(sampler, steps)


def test_schedulers_are_many_and_nearly_all_exact() -> None:
    """Tolerances of the test above are exceptions."""
    for prediction in (Prediction.EPSILON, Prediction.VELOCITY):
        samplers = [sampler for sampler in DIFFUSION if sampler.prediction is prediction]
        assert len(samplers) >= 13
    exact = [s for s in DIFFUSION + FLOW_MATCHING if tolerance(s, 10) == EXACT]
    assert len(exact) >= 33


@pytest.mark.parametrize("sampler", DIFFUSION + FLOW_MATCHING, ids=lambda sampler: sampler.name)
@pytest.mark.filterwarnings("ignore")
def test_samples_are_of_the_distribution(sampler: Sampler) -> None:
    samples = sampler.draw(MIXTURE.denoise, STEPS, SAMPLES)
    assert MIXTURE.distance(samples) <= BOUND


class WithoutNoise(diffusers.DDPMScheduler):
    """Forgets the fresh noise of an ancestral step."""

    def _get_variance(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.zeros(())


class WithHalfTheVariance(diffusers.DDPMScheduler):
    def _get_variance(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return super()._get_variance(*args, **kwargs) / 2


class WithTwiceTheVariance(diffusers.DDPMScheduler):
    def _get_variance(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return super()._get_variance(*args, **kwargs) * 2


class WithTheWrongSign(diffusers.DDIMScheduler):
    def step(self, model_output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().step(-model_output, *args, **kwargs)


@pytest.mark.parametrize(
    "broken", [WithoutNoise, WithHalfTheVariance, WithTwiceTheVariance, WithTheWrongSign]
)
def test_a_broken_scheduler_is_found_out(broken: type) -> None:
    right = Configured.of(broken, trained_with(Prediction.EPSILON).config)
    samples = Sampler(right, Prediction.EPSILON).draw(MIXTURE.denoise, STEPS, SAMPLES)
    assert MIXTURE.distance(samples) > 2 * BOUND


def test_a_network_that_takes_the_noise_for_more_is_found_out() -> None:
    """A tenth more: as if timesteps were counted from another end, or by another schedule."""

    def late(x_t: torch.Tensor, signal: float, sigma: float) -> torch.Tensor:
        more = min(1.1 * sigma, 0.99999)
        return MIXTURE.denoise(x_t, math.sqrt(1 - more**2), more)

    [ddim] = [s for s in DIFFUSION if s.name == "DDIMScheduler-epsilon"]
    assert MIXTURE.distance(ddim.draw(late, STEPS, SAMPLES)) > 2 * BOUND


def test_what_is_made_for_distilled_models_is_found_out() -> None:
    """It goes all the way to x_0 at each step, which a network of averages makes too narrow."""
    [sampler] = of_model(diffusers.FlowMatchLCMScheduler(), None)
    assert what_is_left(sampler, 10) <= EXACT
    assert MIXTURE.distance(sampler.draw(MIXTURE.denoise, STEPS, SAMPLES)) > 2 * BOUND


def test_the_bound_holds_samples_of_the_mixture_and_no_other() -> None:
    generator = torch.Generator().manual_seed(0)
    chosen = (torch.rand(SAMPLES, generator=generator) > MIXTURE.weights[0]).long()
    noise = torch.randn(SAMPLES, generator=generator)
    samples = MIXTURE.means[chosen] + MIXTURE.deviations[chosen] * noise
    assert MIXTURE.distance(samples) <= CHANCE
    other = replace(MIXTURE, weights=torch.tensor([0.35, 0.65], dtype=torch.float64))
    assert other.distance(samples) > BOUND


def test_the_best_denoiser_is_the_score_of_the_closed_form() -> None:
    """Tweedie's formula, with the score from autograd."""
    signal, sigma = 0.8, 0.6
    x_t = torch.linspace(-3, 3, 61, dtype=torch.float64, requires_grad=True)
    deviations = (signal**2 * MIXTURE.deviations**2 + sigma**2).sqrt()
    scaled = (x_t.unsqueeze(-1) - signal * MIXTURE.means) / deviations
    density = (MIXTURE.weights / deviations * torch.exp(-(scaled**2) / 2)).sum(dim=-1)
    [score] = torch.autograd.grad(density.log().sum(), x_t)
    expected = (x_t.detach() + sigma**2 * score) / signal
    torch.testing.assert_close(MIXTURE.denoise(x_t.detach(), signal, sigma), expected)
