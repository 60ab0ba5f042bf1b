"""How many bits a diffusion model needs for an image, at most: the variational bound of DDPM.

Ho et al. 2020 (arXiv:2006.11239), sections 2 and 3.3. An image is sent as x_T, then as what is new
in each x_{t-1}, then as what of x_0 the last one left open:

    -log p(x_0) <= L_T + L_{T-1} + ... + L_1 + L_0

Each L_{t-1} is the divergence of the posterior from the model's reverse step, L_T that of x_T from
pure noise, and L_0 the negative log-likelihood of 8-bit levels, to which the last Gaussian gives
the probability of their interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from stepserve.training.diffusion import NoiseSchedule, Prediction, spread_timesteps
from stepserve.training.reverse import Gaussian, ReverseVariance, posterior, reverse_step

Network = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""What is predicted, in the shape of x_t (batch, ...), of x_t and timesteps (batch,)."""

HALF_LEVEL = 1 / 255
"""Half the distance of two neighbours of 256 levels from -1 to 1."""


@dataclass(frozen=True)
class VariationalBound:
    """The parts of the bound in bits per dimension, each (batch,)."""

    prior: torch.Tensor
    """L_T, which no network can change."""
    transitions: torch.Tensor
    """L_1 to L_{T-1} together."""
    decoder: torch.Tensor
    """L_0."""

    @property
    def total(self) -> torch.Tensor:
        """An upper bound of -log2 p(x_0) per dimension, (batch,)."""
        return self.prior + self.transitions + self.decoder


@dataclass(frozen=True)
class Denoiser:
    """A network, and how its output is to be read."""

    network: Network
    schedule: NoiseSchedule
    prediction: Prediction
    variance: ReverseVariance = ReverseVariance.POSTERIOR

    @torch.no_grad()
    def step(self, x_t: torch.Tensor, t: torch.Tensor) -> Gaussian:
        """The model's p(x_{t-1} | x_t)."""
        output = self.network(x_t, t)
        return reverse_step(self.schedule, x_t, output, t, self.prediction, self.variance)


def variational_bound(
    denoiser: Denoiser,
    x_0: torch.Tensor,
    generator: torch.Generator,
    transitions: int | None = None,
) -> VariationalBound:
    """The bound of each image, an unbiased estimate from one noise for each timestep.

    Args:
        denoiser: of the model.
        x_0: images (batch, ...) of 256 levels from -1 to 1.
        generator: what noise and timesteps are drawn from.
        transitions: how many of L_1 to L_{T-1} are computed, spread evenly; the others are taken
            to be like them on average. None: all. The network is called once for each, and once
            for L_0.
    """
    schedule = denoiser.schedule
    chosen = _transitions(schedule, transitions, generator)
    share = (schedule.timesteps - 1) / len(chosen)
    between = sum(
        (_transition(denoiser, x_0, t, generator) for t in chosen), start=torch.zeros(len(x_0))
    )
    return VariationalBound(
        _prior(schedule, x_0), between * share, _decoder(denoiser, x_0, generator)
    )


def level_nats(x_0: torch.Tensor, decoder: Gaussian) -> torch.Tensor:
    """Negative log-likelihood of 8-bit levels under a Gaussian, in the shape of x_0.

    A level is given the probability of the interval that is nearer to it than to its neighbours;
    the intervals of the first and the last go on for ever.
    """
    off, deviation = (x_0 - decoder.mean).double(), decoder.variance.double().sqrt()
    edge = 1 - HALF_LEVEL
    low = torch.where(x_0 < -edge, -math.inf, (off - HALF_LEVEL) / deviation)
    high = torch.where(x_0 > edge, math.inf, (off + HALF_LEVEL) / deviation)
    # The upper tail is mirrored: probabilities near 1 have no digits left for a difference.
    is_above = low + high > 0
    low, high = torch.where(is_above, -high, low), torch.where(is_above, -low, high)
    log_low, log_high = torch.special.log_ndtr(low), torch.special.log_ndtr(high)
    return -(log_high + torch.log1p(-torch.exp(log_low - log_high)))


def _transitions(
    schedule: NoiseSchedule, count: int | None, generator: torch.Generator
) -> list[int]:
    if count is None:
        return list(range(1, schedule.timesteps))
    return [1 + int(t) for t in spread_timesteps(count, schedule.timesteps - 1, generator)]


def _transition(
    denoiser: Denoiser, x_0: torch.Tensor, timestep: int, generator: torch.Generator
) -> torch.Tensor:
    t = torch.full((len(x_0),), timestep)
    x_t = denoiser.schedule.add_noise(x_0, _noise_like(x_0, generator), t)
    true = posterior(denoiser.schedule, x_0, x_t, t)
    return _bits_per_dimension(_divergence(true, denoiser.step(x_t, t)))


def _decoder(denoiser: Denoiser, x_0: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    t = torch.zeros(len(x_0), dtype=torch.long)
    x_t = denoiser.schedule.add_noise(x_0, _noise_like(x_0, generator), t)
    return _bits_per_dimension(level_nats(x_0, denoiser.step(x_t, t)))


def _prior(schedule: NoiseSchedule, x_0: torch.Tensor) -> torch.Tensor:
    signal, sigma = schedule.scales(torch.full((len(x_0),), schedule.timesteps - 1), x_0)
    noise = Gaussian(torch.zeros_like(x_0), torch.ones_like(sigma))
    return _bits_per_dimension(_divergence(Gaussian(signal * x_0, sigma**2), noise))


def _noise_like(x_0: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(x_0.shape, generator=generator, dtype=x_0.dtype)


def _divergence(true: Gaussian, model: Gaussian) -> torch.Tensor:
    """Kullback and Leibler's, in nats, in the shape of the means."""
    ratio = true.variance / model.variance
    return (ratio - 1 - ratio.log() + (true.mean - model.mean) ** 2 / model.variance) / 2


def _bits_per_dimension(nats: torch.Tensor) -> torch.Tensor:
    """The mean of each row (batch, ...), (batch,)."""
    return nats.flatten(1).mean(dim=1).float() / math.log(2)
