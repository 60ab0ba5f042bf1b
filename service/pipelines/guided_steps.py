"""What guidance costs a pipeline: how often a step calls the denoiser, and with how many rows.

Most pipelines stack the rows with and without the prompt in one call. FLUX takes the scale as an
input and has one row a picture; CogView 4 and Lumina 2 call the denoiser twice.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch

from service.domain.requests import GenerationRequest, Task
from service.engine.call import NO_RULES, ParkableMethod, make_call
from service.engine.parking import parameter_names
from service.pipelines.attach import ARGUMENT_RULES
from service.pipelines.capabilities import denoiser_of
from service.pipelines.load import LoadedModel
from service.pipelines.tasks import denoiser_calls
from service.pipelines.trials import run_trial, trial_request

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GuidedStep:
    """One step of a guided request for one picture.

    Args:
        rows: of each call of the denoiser.
        calls: of the denoiser.
    """

    rows: int = 2
    calls: int = 1

    def rows_of(self, request: GenerationRequest) -> int:
        """Rows of each denoiser call of a request, unless it is narrowed."""
        return request.n * (self.rows if request.rows > request.n else 1)

    def calls_of(self, request: GenerationRequest, timesteps: int) -> int:
        """Denoiser calls of a request that goes through so many timesteps."""
        return timesteps * (self.calls if request.rows > request.n else 1)


CLASSIC = GuidedStep()


def measure_guided_step(model: LoadedModel) -> GuidedStep:
    """Look at a small guided request; as most pipelines have it where that cannot be seen.

    Run it where the model may run, before it is attached.
    """
    sizes = model.capabilities.sizes
    request = trial_request(model.capabilities, Task.TEXT_TO_IMAGE, 0, sizes.minimum)
    denoiser = denoiser_of(model.pipeline)
    if denoiser is None or request.rows == request.n:
        return CLASSIC
    try:
        rows = _rows_of_calls(model, request, denoiser)
    except Exception as error:
        logger.info("what guidance costs could not be seen: %s: %s", type(error).__name__, error)
        return CLASSIC
    if not rows:
        return CLASSIC
    timesteps = denoiser_calls(model, request)
    return GuidedStep(max(rows) // request.n, max(round(len(rows) / timesteps), 1))


def _rows_of_calls(model: LoadedModel, request: GenerationRequest, denoiser: Any) -> list[int]:
    rules = ARGUMENT_RULES.get(type(denoiser).__name__, NO_RULES)
    parameters = parameter_names(denoiser.forward)
    method = ParkableMethod("", "", denoiser.forward, parameters=parameters, rules=rules)
    rows: list[int] = []

    def see(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rows.append(make_call(method, args, kwargs).rows)

    handle = denoiser.register_forward_pre_hook(see, with_kwargs=True)
    try:
        with torch.no_grad():
            run_trial(model, request)
    finally:
        handle.remove()
    return rows
