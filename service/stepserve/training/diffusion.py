"""The forward process of a diffusion model in closed form, its reverse, and what networks learn.

Notation of DDPM (Ho et al. 2020, arXiv:2006.11239): x_0 is clean, x_t is x_0 after t + 1 small
noising steps, alpha_bar_t is the share of x_0's variance that is left:

    x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise

A network is asked for the noise, for x_0, or for the velocity (Salimans and Ho 2022,
arXiv:2202.00512)

    v = sqrt(alpha_bar_t) noise - sqrt(1 - alpha_bar_t) x_0

which equals noise prediction at t = 0 and -x_0 prediction at the noisiest t, so that the loss stays
meaningful at every noise level. With x_t, each of the three gives the other two.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

import torch

MAX_BETA = 0.999
"""The cosine schedule's limit, short of which its last step would leave no signal."""


class Prediction(StrEnum):
    """What a network predicts, in the words of diffusers' `prediction_type`."""

    EPSILON = "epsilon"
    SAMPLE = "sample"
    VELOCITY = "v_prediction"


@dataclass(frozen=True)
class NoiseSchedule:
    """`alpha_bar` has shape (timesteps,), falling from almost 1 to almost 0."""

    alpha_bar: torch.Tensor

    @classmethod
    def from_betas(cls, betas: torch.Tensor) -> NoiseSchedule:
        """Of the variances (timesteps,) that the noising steps add."""
        return cls(torch.cumprod(1 - betas, dim=0))

    @classmethod
    def linear(
        cls, timesteps: int, beta_start: float = 1e-4, beta_end: float = 0.02
    ) -> NoiseSchedule:
        """Evenly spaced betas, as in DDPM."""
        return cls.from_betas(torch.linspace(beta_start, beta_end, timesteps))

    @classmethod
    def scaled_linear(cls, timesteps: int, beta_start: float, beta_end: float) -> NoiseSchedule:
        """Betas whose square roots are evenly spaced, as in latent diffusion."""
        return cls.from_betas(torch.linspace(beta_start**0.5, beta_end**0.5, timesteps) ** 2)

    @classmethod
    def cosine(cls, timesteps: int) -> NoiseSchedule:
        """A squared cosine (Nichol and Dhariwal 2021, arXiv:2102.09672).

        It is diffusers' `squaredcos_cap_v2`.
        """

        def signal_variance(time: float) -> float:
            return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2

        betas = [
            min(1 - signal_variance((t + 1) / timesteps) / signal_variance(t / timesteps), MAX_BETA)
            for t in range(timesteps)
        ]
        return cls.from_betas(torch.tensor(betas, dtype=torch.float32))

    def with_zero_terminal_snr(self) -> NoiseSchedule:
        """Rescaled so that the last x_t is noise alone (Lin et al. 2023, arXiv:2305.08891).

        sqrt(alpha_bar) is shifted and scaled: its last value becomes 0, its first stays. It does
        not go with epsilon prediction: where x_t is noise alone, its noise does not tell x_0.
        """
        signal = self.alpha_bar.sqrt()
        first, last = signal[0], signal[-1]
        return NoiseSchedule(((signal - last) * first / (first - last)) ** 2)

    @property
    def timesteps(self) -> int:
        """Number of noising steps."""
        return len(self.alpha_bar)

    def snr(self, t: torch.Tensor) -> torch.Tensor:
        """Signal-to-noise ratio of the variances at timesteps t (batch,), in their shape."""
        alpha_bar = self.alpha_bar[t]
        return alpha_bar / (1 - alpha_bar)

    def scales(self, t: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(signal, noise) factors at timesteps t (batch,), shaped to multiply `like`."""
        alpha_bar = beside(self.alpha_bar[t], like)
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def add_noise(self, x_0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Jump from x_0 (batch, ...) straight to x_t."""
        signal, sigma = self.scales(t, x_0)
        return signal * x_0 + sigma * noise

    def velocity(self, x_0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """What a velocity-predicting network should give for x_t, in the shape of x_0."""
        signal, sigma = self.scales(t, x_0)
        return signal * noise - sigma * x_0

    def target(
        self, prediction: Prediction, x_0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor
    ) -> torch.Tensor:
        """What a network of that prediction should give for x_t, in the shape of x_0."""
        match prediction:
            case Prediction.EPSILON:
                return noise
            case Prediction.SAMPLE:
                return x_0
            case Prediction.VELOCITY:
                return self.velocity(x_0, noise, t)

    def predict_x_0(
        self,
        x_t: torch.Tensor,
        output: torch.Tensor,
        t: torch.Tensor,
        prediction: Prediction = Prediction.VELOCITY,
    ) -> torch.Tensor:
        """The clean sample that x_t and a network's output imply, in their shape."""
        signal, sigma = self.scales(t, x_t)
        match prediction:
            case Prediction.EPSILON:
                return (x_t - sigma * output) / signal
            case Prediction.SAMPLE:
                return output
            case Prediction.VELOCITY:
                return signal * x_t - sigma * output

    def predict_noise(
        self,
        x_t: torch.Tensor,
        output: torch.Tensor,
        t: torch.Tensor,
        prediction: Prediction = Prediction.VELOCITY,
    ) -> torch.Tensor:
        """The noise that x_t and a network's output imply, in their shape."""
        signal, sigma = self.scales(t, x_t)
        match prediction:
            case Prediction.EPSILON:
                return output
            case Prediction.SAMPLE:
                return (x_t - signal * output) / sigma
            case Prediction.VELOCITY:
                return sigma * x_t + signal * output

    def ddim_step(
        self,
        x_t: torch.Tensor,
        output: torch.Tensor,
        t: torch.Tensor,
        earlier: torch.Tensor | None = None,
        prediction: Prediction = Prediction.VELOCITY,
    ) -> torch.Tensor:
        """One reverse step without randomness (Song et al. 2021, arXiv:2010.02502).

        Noise the predicted x_0 again with the predicted noise, but only up to the timesteps
        `earlier` (batch,); None means all the way to x_0.
        """
        x_0 = self.predict_x_0(x_t, output, t, prediction)
        if earlier is None:
            return x_0
        return self.add_noise(x_0, self.predict_noise(x_t, output, t, prediction), earlier)

    def loss_weight(
        self, t: torch.Tensor, gamma: float, prediction: Prediction = Prediction.VELOCITY
    ) -> torch.Tensor:
        """Min-SNR weights for a squared error (Hang et al. 2023, arXiv:2303.09556), (batch,).

        Whatever the network predicts, the error of x_0 that it implies gets min(SNR, gamma).
        """
        snr = self.snr(t)
        match prediction:
            case Prediction.EPSILON:
                # min(SNR, gamma) / SNR, also where SNR is 0.
                return (gamma / snr).clamp(max=1)
            case Prediction.SAMPLE:
                return snr.clamp(max=gamma)
            case Prediction.VELOCITY:
                return snr.clamp(max=gamma) / (snr + 1)


def beside(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Values (batch,) shaped to multiply `like` (batch, ...)."""
    return values.view(-1, *[1] * (like.dim() - 1))


def spread_timesteps(batch: int, timesteps: int, generator: torch.Generator) -> torch.Tensor:
    """Timesteps (batch,), one from each of `batch` equal slices of the schedule, in random order.

    Every timestep is equally likely, and the loss of a batch varies less than with independent
    draws.
    """
    slots = torch.randperm(batch, generator=generator)
    offsets = torch.rand(batch, generator=generator)
    return ((slots + offsets) / batch * timesteps).long().clamp(max=timesteps - 1)
