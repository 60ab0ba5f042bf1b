"""Every noise schedule and every prediction type, against diffusers and against each other."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler
from noise_schedules import SCHEDULES, diffusers_settings
from stepserve.training.diffusion import NoiseSchedule, Prediction

T = torch.tensor([0, 1, 250, 500, 998, 999])
# From noise alone, no noise that is predicted says what x_0 was.
ENDLESS = [name for name in SCHEDULES if not name.startswith("zero")]


@pytest.fixture
def noised() -> tuple[torch.Tensor, torch.Tensor]:
    """x_0 and noise, in float64 so that errors of rounding do not hide those of a formula."""
    generator = torch.Generator().manual_seed(0)
    x_0, noise = torch.randn(2, 6, 3, 8, 8, generator=generator, dtype=torch.float64)
    return x_0, noise


Noised = tuple[torch.Tensor, torch.Tensor]


def precise(schedule: NoiseSchedule) -> NoiseSchedule:
    return NoiseSchedule(schedule.alpha_bar.double())


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_are_those_of_diffusers(name: str) -> None:
    theirs = DDPMScheduler(**diffusers_settings(name)).alphas_cumprod
    ours = SCHEDULES[name].alpha_bar
    if name.startswith("zero"):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)
    else:
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_only_ever_add_noise(name: str) -> None:
    alpha_bar = SCHEDULES[name].alpha_bar
    assert bool((alpha_bar.diff() < 0).all())
    assert alpha_bar[0] > 0.999
    assert (alpha_bar[-1] == 0) == name.startswith("zero")


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "cosine"])
def test_rescaling_changes_only_how_much_is_left(name: str) -> None:
    """The first value stays, and what remains of the signal falls in the same way."""
    before, after = (SCHEDULES[n].alpha_bar.sqrt() for n in (name, f"zero_{name}"))
    torch.testing.assert_close(after[0], before[0])
    torch.testing.assert_close(
        after.diff() / after.diff().sum(), before.diff() / before.diff().sum(), rtol=2e-3, atol=1e-6
    )


@pytest.mark.parametrize("name", SCHEDULES)
def test_variance_is_preserved(name: str) -> None:
    """Data of unit variance keeps it at every timestep: once by the factors, once by numbers."""
    schedule = SCHEDULES[name]
    t = torch.arange(schedule.timesteps)
    signal, sigma = schedule.scales(t, t)
    torch.testing.assert_close(signal**2 + sigma**2, torch.ones(schedule.timesteps))
    generator = torch.Generator().manual_seed(0)
    x_0 = torch.randn(len(T), 40_000, generator=generator)
    noise = torch.randn(x_0.shape, generator=generator)
    x_t = schedule.add_noise(x_0, noise, T)
    # Of 40,000 normal numbers the variance is out by less than 5 sqrt(2 / 40,000).
    torch.testing.assert_close(x_t.var(dim=1), torch.ones(len(T)), rtol=0, atol=0.036)


@pytest.mark.parametrize("name", ENDLESS)
@pytest.mark.parametrize("prediction", Prediction)
def test_what_is_predicted_gives_back_both(
    name: str, prediction: Prediction, noised: Noised
) -> None:
    schedule, (x_0, noise) = precise(SCHEDULES[name]), noised
    x_t, output = schedule.add_noise(x_0, noise, T), schedule.target(prediction, x_0, noise, T)
    found_x_0 = schedule.predict_x_0(x_t, output, T, prediction)
    found_noise = schedule.predict_noise(x_t, output, T, prediction)
    torch.testing.assert_close(found_x_0, x_0, rtol=0, atol=1e-9)
    torch.testing.assert_close(found_noise, noise, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", sorted(set(SCHEDULES) - set(ENDLESS)))
@pytest.mark.parametrize("prediction", [Prediction.SAMPLE, Prediction.VELOCITY])
def test_from_noise_alone_two_of_three_give_back_both(
    name: str, prediction: Prediction, noised: Noised
) -> None:
    schedule, (x_0, noise) = precise(SCHEDULES[name]), noised
    x_t, output = schedule.add_noise(x_0, noise, T), schedule.target(prediction, x_0, noise, T)
    assert torch.equal(x_t[-1], noise[-1])
    found_x_0 = schedule.predict_x_0(x_t, output, T, prediction)
    found_noise = schedule.predict_noise(x_t, output, T, prediction)
    torch.testing.assert_close(found_x_0, x_0, rtol=0, atol=1e-9)
    torch.testing.assert_close(found_noise, noise, rtol=0, atol=1e-9)


@pytest.mark.parametrize("prediction", Prediction)
def test_ddim_steps_are_the_same_whatever_is_predicted(
    prediction: Prediction, noised: Noised
) -> None:
    schedule, (x_0, noise) = precise(SCHEDULES["linear"]), noised
    earlier = (T - 1).clamp(min=0)
    x_t, output = schedule.add_noise(x_0, noise, T), schedule.target(prediction, x_0, noise, T)
    made = schedule.ddim_step(x_t, output, T, earlier, prediction)
    torch.testing.assert_close(made, schedule.add_noise(x_0, noise, earlier), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ENDLESS)
@pytest.mark.parametrize("prediction", Prediction)
def test_min_snr_weights_the_error_of_x_0_alike(
    name: str, prediction: Prediction, noised: Noised
) -> None:
    """However a network's output is out, its weighted error is min(SNR, gamma) of that of x_0."""
    schedule, (x_0, noise) = precise(SCHEDULES[name]), noised
    x_t, right = schedule.add_noise(x_0, noise, T), schedule.target(prediction, x_0, noise, T)
    output = right + 0.1
    weighted = (output - right) ** 2 * schedule.loss_weight(T, 5.0, prediction).view(-1, 1, 1, 1)
    error = (schedule.predict_x_0(x_t, output, T, prediction) - x_0) ** 2
    alpha_bar = schedule.alpha_bar[T]
    expected = error * (alpha_bar / (1 - alpha_bar)).clamp(max=5.0).view(-1, 1, 1, 1)
    torch.testing.assert_close(weighted, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("prediction", Prediction)
def test_weights_of_noise_alone_are_numbers(prediction: Prediction) -> None:
    weight = SCHEDULES["zero_linear"].loss_weight(T, 5.0, prediction)
    assert bool(weight.isfinite().all())
    assert weight[-1] == (1 if prediction is Prediction.EPSILON else 0)
