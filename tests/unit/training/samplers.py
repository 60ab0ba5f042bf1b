"""Schedulers as requests get them, run over numbers with a network that is a formula."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)
from stepserve.pipelines.schedulers.probes import set_steps
from stepserve.pipelines.schedulers.usable import Configured, usable_schedulers
from stepserve.training.diffusion import Prediction

TIMESTEPS = 1000

Denoise = Callable[[torch.Tensor, float, float], torch.Tensor]
"""What a network thinks x_0 is, of x_t = signal x_0 + sigma noise and the two factors."""


def trained_with(prediction: Prediction) -> DDIMScheduler:
    """The scheduler of a model that we train in pixels, from whose settings others are made."""
    return DDIMScheduler(
        beta_schedule="linear",
        beta_start=1e-4,
        beta_end=0.02,
        prediction_type=prediction.value,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )


@dataclass(frozen=True)
class Sampler:
    """A scheduler that a request may name, of a model with these settings."""

    scheduler: Configured
    prediction: Prediction | None
    """None: the velocity of flow matching."""

    @property
    def name(self) -> str:
        predicted = "flow" if self.prediction is None else self.prediction.value
        shift = self.scheduler.config.get("shift", self.scheduler.config.get("flow_shift", 1.0))
        shifted = "" if shift in (None, 1.0) else f"-shift-{shift:g}"
        return f"{self.scheduler.cls.__name__}-{predicted}{shifted}"

    def draw(self, denoise: Denoise, steps: int, count: int) -> torch.Tensor:
        """Samples (count, 1, 1, 1), always from the same noise."""
        generator = torch.Generator().manual_seed(0)
        scheduler = self.scheduler.build()
        set_steps(scheduler, steps)
        x_t = torch.randn(count, 1, 1, 1, generator=generator)
        x_t = x_t * getattr(scheduler, "init_noise_sigma", 1.0)
        takes_generator = "generator" in inspect.signature(scheduler.step).parameters
        options: dict[str, Any] = {"generator": generator} if takes_generator else {}
        for t in scheduler.timesteps:
            output = self._network(scheduler, denoise, x_t, t)
            x_t = scheduler.step(output, t, x_t, **options).prev_sample
        return x_t

    def _network(
        self, scheduler: Any, denoise: Denoise, x_t: torch.Tensor, t: torch.Tensor
    ) -> torch.Tensor:
        if self.prediction is None:
            sigma = float(t) / TIMESTEPS
            x_0 = denoise(x_t, 1 - sigma, sigma)
            return ((x_t - (1 - sigma) * x_0) / sigma - x_0).to(x_t.dtype)
        scaled = scheduler.scale_model_input(x_t, t)
        alpha_bar = _alpha_bar(scheduler, float(t))
        signal, sigma = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
        x_0 = denoise(scaled, signal, sigma)
        noise = (scaled - signal * x_0) / sigma
        outputs = {
            Prediction.EPSILON: noise,
            Prediction.SAMPLE: x_0,
            Prediction.VELOCITY: signal * noise - sigma * x_0,
        }
        return outputs[self.prediction].to(x_t.dtype)


def _alpha_bar(scheduler: Any, t: float) -> float:
    """Also between two timesteps, where second-order schedulers look too."""
    below = min(int(t), TIMESTEPS - 2)
    alpha_bar = scheduler.alphas_cumprod[below : below + 2].double()
    ratios = ((1 - alpha_bar) / alpha_bar).sqrt()
    ratio = float(torch.lerp(ratios[0], ratios[1], t - below))
    return 1 / (1 + ratio**2)


def of_model(own: Any, prediction: Prediction | None) -> list[Sampler]:
    """All schedulers that requests to a model may name, sorted by name.

    Args:
        own: the model's scheduler.
        prediction: what its network predicts.
    """
    # This runs while tests are collected, where the suite's filters do not hold yet.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        usable = usable_schedulers(own).values()
    return [Sampler(Configured.of(cls, own.config), prediction) for cls in usable]


def _solvers_of_flows(**settings: Any) -> list[Sampler]:
    own = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, **settings
    )
    return of_model(own, None)


DIFFUSION = [sampler for kind in Prediction for sampler in of_model(trained_with(kind), kind)]
FLOW_MATCHING = [
    *of_model(FlowMatchEulerDiscreteScheduler(), None),
    *of_model(FlowMatchEulerDiscreteScheduler(shift=3.0), None),
    *of_model(FlowMatchHeunDiscreteScheduler(shift=3.0), None),
    *_solvers_of_flows(),
    *_solvers_of_flows(flow_shift=3.0),
]
