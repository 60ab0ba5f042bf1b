"""A distribution of numbers for which the best network is known, and whether samples are of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class GaussianMixture:
    """Each parameter has shape (components,), in float64."""

    weights: torch.Tensor
    means: torch.Tensor
    deviations: torch.Tensor

    def cdf(self, x: torch.Tensor) -> torch.Tensor:
        """The share of the distribution that is at most x, in its shape."""
        scaled = (x.double().unsqueeze(-1) - self.means) / self.deviations
        return (self.weights * torch.special.ndtr(scaled)).sum(dim=-1)

    def denoise(self, x_t: torch.Tensor, signal: float, sigma: float) -> torch.Tensor:
        """The mean of all x_0 that x_t = signal x_0 + sigma noise may come from, by Bayes' rule.

        By Tweedie's formula it is the score of x_t in other units:
        (x_t + sigma^2 score) / signal.
        """
        x = x_t.double().unsqueeze(-1)
        variances = (signal * self.deviations) ** 2 + sigma**2
        off = x - signal * self.means
        logits = self.weights.log() - variances.log() / 2 - off**2 / (2 * variances)
        means = self.means + signal * self.deviations**2 / variances * off
        return (logits.softmax(dim=-1) * means).sum(dim=-1)

    def distance(self, samples: torch.Tensor) -> float:
        """Kolmogorov and Smirnov's: the largest difference between the two shares below a number.

        Args:
            samples: of any shape.
        """
        found = self.cdf(samples.flatten().sort().values)
        steps = torch.arange(len(found) + 1, dtype=torch.float64) / len(found)
        above, below = (steps[1:] - found).max(), (found - steps[:-1]).max()
        return float(torch.maximum(above, below))
