"""The forward process of a diffusion model in closed form, and the targets a network learns.

Notation of DDPM (Ho et al. 2020, arXiv:2006.11239): x_0 is clean, x_t is x_0 after t + 1 small
noising steps, alpha_bar_t is the share of x_0's variance that is left:

    x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise

Velocity prediction (Salimans and Ho 2022, arXiv:2202.00512) asks the network for

    v = sqrt(alpha_bar_t) noise - sqrt(1 - alpha_bar_t) x_0

which equals noise prediction at t = 0 and -x_0 prediction at the noisiest t, so that the loss stays
meaningful at every noise level.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class NoiseSchedule:
    """`alpha_bar` has shape (timesteps,), falling from almost 1 to almost 0."""

    alpha_bar: torch.Tensor

    @classmethod
    def scaled_linear(cls, timesteps: int, beta_start: float, beta_end: float) -> NoiseSchedule:
        """Betas whose square roots are evenly spaced, as in latent diffusion."""
        betas = torch.linspace(beta_start**0.5, beta_end**0.5, timesteps) ** 2
        return cls(torch.cumprod(1 - betas, dim=0))

    @property
    def timesteps(self) -> int:
        """Number of noising steps."""
        return len(self.alpha_bar)

    def scales(self, t: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(signal, noise) factors at timesteps t (batch,), shaped to multiply `like`."""
        alpha_bar = self.alpha_bar[t].view(-1, *[1] * (like.dim() - 1))
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def add_noise(self, x_0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Jump from x_0 (batch, ...) straight to x_t."""
        signal, sigma = self.scales(t, x_0)
        return signal * x_0 + sigma * noise

    def velocity(self, x_0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """What a velocity-predicting network should give for x_t, in the shape of x_0."""
        signal, sigma = self.scales(t, x_0)
        return signal * noise - sigma * x_0

    def predict_x_0(
        self, x_t: torch.Tensor, velocity: torch.Tensor, t: torch.Tensor
    ) -> torch.Tensor:
        """The clean sample that x_t and a predicted velocity imply, in their shape."""
        signal, sigma = self.scales(t, x_t)
        return signal * x_t - sigma * velocity

    def predict_noise(
        self, x_t: torch.Tensor, velocity: torch.Tensor, t: torch.Tensor
    ) -> torch.Tensor:
        """The noise that x_t and a predicted velocity imply, in their shape."""
        signal, sigma = self.scales(t, x_t)
        return sigma * x_t + signal * velocity

    def ddim_step(
        self,
        x_t: torch.Tensor,
        velocity: torch.Tensor,
        t: torch.Tensor,
        earlier: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One reverse step without randomness (Song et al. 2021, arXiv:2010.02502).

        Noise the predicted x_0 again with the predicted noise, but only up to the timesteps
        `earlier` (batch,); None means all the way to x_0.
        """
        x_0 = self.predict_x_0(x_t, velocity, t)
        if earlier is None:
            return x_0
        return self.add_noise(x_0, self.predict_noise(x_t, velocity, t), earlier)

    def loss_weight(self, t: torch.Tensor, gamma: float) -> torch.Tensor:
        """Min-SNR weights for a velocity loss (Hang et al. 2023, arXiv:2303.09556), (batch,)."""
        alpha_bar = self.alpha_bar[t]
        snr = alpha_bar / (1 - alpha_bar)
        return snr.clamp(max=gamma) / (snr + 1)


def spread_timesteps(batch: int, timesteps: int, generator: torch.Generator) -> torch.Tensor:
    """Timesteps (batch,), one from each of `batch` equal slices of the schedule, in random order.

    Every timestep is equally likely, and the loss of a batch varies less than with independent
    draws.
    """
    slots = torch.randperm(batch, generator=generator)
    offsets = torch.rand(batch, generator=generator)
    return ((slots + offsets) / batch * timesteps).long().clamp(max=timesteps - 1)
