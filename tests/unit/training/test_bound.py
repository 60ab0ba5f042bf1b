"""The variational bound for data whose likelihood and best network are known."""

from __future__ import annotations

import math

import pytest
import torch
from stepserve.training.bound import Denoiser, level_nats, variational_bound
from stepserve.training.diffusion import NoiseSchedule, Prediction
from stepserve.training.reverse import Gaussian, ReverseVariance

SCHEDULE = NoiseSchedule(NoiseSchedule.linear(1000).alpha_bar.double())
LEVELS = torch.linspace(-1, 1, 256, dtype=torch.float64)
DEVIATION = 0.25
# A Gaussian of 256 levels: its entropy and its best network are sums over them.
CHANCES = torch.softmax(-((LEVELS / DEVIATION) ** 2) / 2, dim=0)


def best_x_0(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The mean of the levels that x_t may come from, by Bayes' rule over all 256."""
    signal, sigma = SCHEDULE.scales(t, x_t)
    off = x_t.unsqueeze(-1) - signal.unsqueeze(-1) * LEVELS
    logits = CHANCES.log() - off**2 / (2 * sigma.unsqueeze(-1) ** 2)
    return (logits.softmax(dim=-1) * LEVELS).sum(dim=-1)


def denoiser(prediction: Prediction, variance: ReverseVariance, error: float = 0.0) -> Denoiser:
    """The best network, whose x_0 is out by `error`."""

    def network(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        x_0 = best_x_0(x_t, t) + error
        signal, sigma = SCHEDULE.scales(t, x_t)
        return SCHEDULE.target(prediction, x_0, (x_t - signal * x_0) / sigma, t)

    return Denoiser(network, SCHEDULE, prediction, variance)


def images(count: int, size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return LEVELS[torch.multinomial(CHANCES.expand(count, -1), size, True, generator=generator)]


def true_bits(x_0: torch.Tensor) -> torch.Tensor:
    """-log2 p(x_0) per dimension, (batch,)."""
    return -CHANCES.log2()[((x_0 + 1) / 2 * 255).round().long()].mean(dim=1)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


X_0 = images(4, 60)


@pytest.mark.parametrize("prediction", Prediction)
@pytest.mark.parametrize(
    ("variance", "closest"), [(ReverseVariance.BETA, 0.3), (ReverseVariance.POSTERIOR, 1.0)]
)
def test_bound_is_above_the_likelihood_and_close(
    prediction: Prediction, variance: ReverseVariance, closest: float
) -> None:
    bound = variational_bound(denoiser(prediction, variance), X_0, seeded())
    above = float((bound.total - true_bits(X_0)).mean())
    assert 0 < above < closest


def test_the_images_are_of_the_distribution() -> None:
    entropy = float(-(CHANCES * CHANCES.log2()).sum())
    assert float(true_bits(images(4, 10_000)).mean()) == pytest.approx(entropy, abs=0.02)


def test_where_the_reverse_step_is_exact_so_is_the_bound() -> None:
    """Of data of unit variance, steps of variance beta_t are q(x_{t-1} | x_t) itself.

    What they cost is then what the least noisy sample says of x_0: log2(1 / (1 - alpha_bar_0)) / 2.
    """

    def network(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        signal, _ = SCHEDULE.scales(t, x_t)
        return signal * x_t

    x_0 = torch.randn(4, 2000, generator=seeded(), dtype=torch.float64)
    best = Denoiser(network, SCHEDULE, Prediction.SAMPLE, ReverseVariance.BETA)
    bound = variational_bound(best, x_0, seeded())
    expected = -float((1 - SCHEDULE.alpha_bar[0]).log2()) / 2
    assert float((bound.prior + bound.transitions).mean()) == pytest.approx(expected, rel=0.01)


def test_transitions_are_those_of_the_closed_form() -> None:
    """Of a Gaussian, the best network's error is known: (1 - alpha_bar) s^2 / variance of x_t."""
    x_0 = DEVIATION * torch.randn(4, 500, generator=seeded(), dtype=torch.float64)
    left = SCHEDULE.alpha_bar[1:]
    before = SCHEDULE.alpha_bar[:-1]
    beta = 1 - left / before
    error = DEVIATION**2 * (1 - left) / (left * DEVIATION**2 + 1 - left)
    ratio = (1 - before) / (1 - left)
    moved = before * beta**2 / (1 - left) ** 2 * error
    nats = ((ratio - 1 - ratio.log() + moved / beta) / 2).sum()

    def network(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        signal, sigma = SCHEDULE.scales(t, x_t)
        return signal * DEVIATION**2 / (signal**2 * DEVIATION**2 + sigma**2) * x_t

    best = Denoiser(network, SCHEDULE, Prediction.SAMPLE, ReverseVariance.BETA)
    bound = variational_bound(best, x_0, seeded())
    assert float(bound.transitions.mean()) == pytest.approx(float(nats) / math.log(2), rel=0.01)
    signal, sigma = SCHEDULE.scales(torch.tensor([999]), x_0)
    nats = ((signal * x_0) ** 2 + sigma**2 - 1 - (sigma**2).log()).mean() / 2
    assert float(bound.prior.mean()) == pytest.approx(float(nats) / math.log(2), rel=1e-4)


@pytest.mark.parametrize("error", [0.01, -0.05])
def test_a_worse_network_needs_more_bits(error: float) -> None:
    bits = [
        float(
            variational_bound(
                denoiser(Prediction.EPSILON, ReverseVariance.BETA, out), X_0, seeded()
            ).total.mean()
        )
        for out in (0.0, error)
    ]
    assert bits[1] > bits[0] + 0.1


def test_some_transitions_say_about_what_all_do() -> None:
    best = denoiser(Prediction.EPSILON, ReverseVariance.BETA)
    generator = seeded()
    all_of_them = variational_bound(best, X_0, seeded()).transitions.mean()
    some = [
        variational_bound(best, X_0, generator, transitions=100).transitions.mean()
        for _ in range(8)
    ]
    assert float(torch.stack(some).mean()) == pytest.approx(float(all_of_them), rel=0.05)


@pytest.mark.parametrize("mean", [0.0, 0.3, -0.999])
@pytest.mark.parametrize("deviation", [0.001, 0.01, 0.5])
def test_the_chances_of_all_levels_sum_to_one(mean: float, deviation: float) -> None:
    decoder = Gaussian(torch.full((256,), mean), torch.full((256,), deviation**2))
    nats = level_nats(LEVELS, decoder)
    assert float(torch.exp(-nats).sum()) == pytest.approx(1, abs=1e-6)
    assert bool(nats.isfinite().all())
