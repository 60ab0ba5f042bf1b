"""The noise schedules that training knows, and diffusers' settings for the same."""

from __future__ import annotations

from typing import Any

from stepserve.training.diffusion import NoiseSchedule

TIMESTEPS = 1000
_PLAIN = {
    "linear": NoiseSchedule.linear(TIMESTEPS),
    "scaled_linear": NoiseSchedule.scaled_linear(TIMESTEPS, 0.00085, 0.02),
    "cosine": NoiseSchedule.cosine(TIMESTEPS),
}
SCHEDULES = _PLAIN | {
    f"zero_{name}": schedule.with_zero_terminal_snr() for name, schedule in _PLAIN.items()
}
_SETTINGS: dict[str, dict[str, Any]] = {
    "linear": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.02},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
}


def diffusers_settings(name: str) -> dict[str, Any]:
    """What any scheduler of diffusers is given for the schedule of that name."""
    is_rescaled = name.startswith("zero_")
    plain = _SETTINGS[name.removeprefix("zero_")]
    return {
        **plain,
        "num_train_timesteps": TIMESTEPS,
        **({"rescale_betas_zero_snr": True} if is_rescaled else {}),
    }
