"""Single steps of the reverse process as distributions (DDPM, Ho et al. 2020, arXiv:2006.11239)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch

from stepserve.training.diffusion import NoiseSchedule, Prediction, beside


class ReverseVariance(StrEnum):
    """The fixed variance of a reverse step (section 3.2), in the words of `variance_type`.

    The posterior's is best for data that is a single image, beta_t for data of unit variance.
    """

    POSTERIOR = "fixed_small"
    BETA = "fixed_large"


@dataclass(frozen=True)
class Gaussian:
    """Independent normal numbers: `mean` (batch, ...), and `variance`, shaped to multiply it."""

    mean: torch.Tensor
    variance: torch.Tensor


def posterior(
    schedule: NoiseSchedule, x_0: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor
) -> Gaussian:
    """q(x_{t-1} | x_t, x_0) at timesteps t (batch,): equations 6 and 7.

    At timestep 0 it is x_0 itself, without variance.
    """
    left, left_before, beta = _variances(schedule, t)
    of_x_0 = left_before.sqrt() * beta / (1 - left)
    of_x_t = (1 - beta).sqrt() * (1 - left_before) / (1 - left)
    return Gaussian(
        _factor(of_x_0, x_t) * x_0 + _factor(of_x_t, x_t) * x_t,
        _factor(beta * (1 - left_before) / (1 - left), x_t),
    )


def reverse_step(
    schedule: NoiseSchedule,
    x_t: torch.Tensor,
    output: torch.Tensor,
    t: torch.Tensor,
    prediction: Prediction,
    variance: ReverseVariance = ReverseVariance.POSTERIOR,
) -> Gaussian:
    """p(x_{t-1} | x_t) at timesteps t (batch,): the posterior of the x_0 that `output` implies.

    At timestep 0, where the posterior has no variance, it has that of timestep 1, as in the
    paper's code.
    """
    x_0 = schedule.predict_x_0(x_t, output, t, prediction)
    left, left_before, beta = _variances(schedule, t.clamp(min=1))
    smallest = beta * (1 - left_before) / (1 - left)
    is_smallest = (t == 0) | (variance is ReverseVariance.POSTERIOR)
    fixed = torch.where(is_smallest, smallest, beta)
    return Gaussian(posterior(schedule, x_0, x_t, t).mean, _factor(fixed, x_t))


def ancestral_step(
    schedule: NoiseSchedule,
    x_t: torch.Tensor,
    output: torch.Tensor,
    t: torch.Tensor,
    prediction: Prediction,
    generator: torch.Generator,
    variance: ReverseVariance = ReverseVariance.POSTERIOR,
) -> torch.Tensor:
    """A sample of x_{t-1}, in the shape of x_t: algorithm 2. At timestep 0 no noise is added."""
    step = reverse_step(schedule, x_t, output, t, prediction, variance)
    noise = torch.randn(x_t.shape, generator=generator, dtype=x_t.dtype)
    return step.mean + _factor(t > 0, x_t) * step.variance.sqrt() * noise


def _variances(
    schedule: NoiseSchedule, t: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """alpha_bar_t, alpha_bar_{t-1} and beta_t (batch,), in float64: 1 - alpha_bar is small."""
    alpha_bar = schedule.alpha_bar.double()
    left, before = alpha_bar[t], alpha_bar[(t - 1).clamp(min=0)]
    left_before = torch.where(t > 0, before, torch.ones_like(before))
    return left, left_before, 1 - left / left_before


def _factor(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Values (batch,) shaped to multiply `like` (batch, ...), in its type."""
    return beside(values, like).to(like.dtype)
