"""What a pipeline really does of what it seems to offer: tried once, before it serves.

Whether diffusers has a class for a task, and whether a call takes a width, says little: some
pipelines cannot do a task with these modules or take what it needs, some make images of their own
choice of sizes whatever they are asked for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from stepserve.domain.models import SizeRange, StepRange
from stepserve.domain.tasks import Task
from stepserve.pipelines.facts.pipeline_tasks import with_hires
from stepserve.pipelines.loading.folders import LoadedModel
from stepserve.pipelines.loading.step_limits import likely_steps, within_steps
from stepserve.pipelines.modules.parking import parkable_methods
from stepserve.pipelines.probing.probe_requests import probe_request, run_probe
from stepserve.pipelines.schedulers.probes import find_steps

logger = logging.getLogger(__name__)

Side = Callable[[Task, int], int]
"""The side of the image that is made for a task when so many pixels are asked for; may raise."""


def with_probed_tasks(model: LoadedModel) -> LoadedModel:
    """Try every task at the smallest size. Run it where the model may run, before it is attached.

    What a model's own file says of its sizes is believed.
    """
    capabilities = model.capabilities

    def side(task: Task, side_px: int) -> int:
        with torch.no_grad():
            made_px = int(run_probe(model, probe_request(model, task, 0, side_px)).shape[-1])
            return side_px if model.factory.tasks[task].chooses_size else made_px

    kept, sizes = find_offer(tuple(capabilities.tasks), capabilities.sizes, side)
    tasks = with_hires({task: capabilities.tasks[task] for task in kept})
    sizes = capabilities.sizes if model.sizes_are_said else sizes
    return replace(model, capabilities=replace(capabilities, tasks=tasks, sizes=sizes))


def find_offer(
    tasks: Sequence[Task], sizes: SizeRange, side: Side
) -> tuple[tuple[Task, ...], SizeRange]:
    """Those of the tasks that can be done, and the native size alone where others cannot.

    Of a model that can do none its own is left, the first: warming it up will say what is wrong.
    """
    kept = []
    for task in tasks:
        objection = _objection(side, task, sizes.minimum)
        if objection and sizes.minimum < sizes.native:
            at_smallest, objection = objection, _objection(side, task, sizes.native)
            if not objection:
                logger.warning("%s works at the native size only: %s", task, at_smallest)
                sizes = replace(sizes, minimum=sizes.native, maximum=sizes.native)
        if objection:
            logger.warning("%s does not work, so it is not offered: %s", task, objection)
        else:
            kept.append(task)
    return tuple(kept or tasks[:1]), sizes


def with_probed_steps(model: LoadedModel) -> LoadedModel:
    """The model without the numbers of steps that its pipeline itself refuses.

    A probe request goes no further than to the first call of a denoiser: by then all is checked.
    Run it where the model may run, before its calls park.
    """
    capabilities = model.capabilities
    most = capabilities.max_num_inference_steps
    taken = find_steps(partial(_reaches_denoiser, model), most, likely_steps(capabilities))
    if taken == StepRange(1, most):
        return model
    return replace(model, capabilities=within_steps(capabilities, taken))


class _ReachedError(Exception):
    """A denoiser was called: the pipeline has nothing against the request."""


def _reaches_denoiser(model: LoadedModel, steps: int) -> bool:
    capabilities = model.capabilities
    request = probe_request(model, capabilities.usual_task, 0, capabilities.sizes.minimum)
    try:
        with torch.no_grad(), ExitStack() as stack:
            for _, module, rule in parkable_methods(model.pipeline):
                if rule.shared:
                    stack.enter_context(module.register_forward_pre_hook(_reach))
            run_probe(model, replace(request, num_inference_steps=steps))
    except _ReachedError:
        return True
    except Exception:
        return False
    return True


def _reach(*_: Any) -> None:
    raise _ReachedError


def _objection(side: Side, task: Task, wanted_px: int) -> str:
    """Why a task cannot be done at a size, or nothing."""
    try:
        made_px = side(task, wanted_px)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "" if made_px == wanted_px else f"{made_px} pixels instead of {wanted_px}"
