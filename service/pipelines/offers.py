"""What a pipeline really does of what it seems to offer: tried once, before it serves.

Whether diffusers has a class for a task, and whether a call takes a width, says little: some
pipelines cannot do a task with these modules or take what it needs, some make pictures of their own
choice of sizes whatever they are asked for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from service.domain.models import SizeRange
from service.domain.requests import Task
from service.pipelines.load import LoadedModel
from service.pipelines.trials import run_trial, trial_request

logger = logging.getLogger(__name__)

Side = Callable[[Task, int], int]
"""The side of the picture that is made for a task when so many pixels are asked for; may raise."""


@dataclass(frozen=True)
class Offer:
    """Tasks and sizes that hold."""

    tasks: tuple[Task, ...]
    sizes: SizeRange


def tried_offer(model: LoadedModel) -> Offer:
    """Try every task at the smallest size. Run it where the model may run, before it is attached.

    What a model's own file says of its sizes is believed.
    """
    capabilities = model.capabilities

    def side(task: Task, side_px: int) -> int:
        with torch.no_grad():
            request = trial_request(capabilities, task, 0, side_px)
            return int(run_trial(model, request).shape[-1])

    offer = find_offer(capabilities.tasks, capabilities.sizes, side)
    return Offer(offer.tasks, capabilities.sizes) if model.sizes_are_said else offer


def find_offer(tasks: Sequence[Task], sizes: SizeRange, side: Side) -> Offer:
    """Those of the tasks that can be done, and the native size alone where others cannot.

    A model that cannot even make a picture from a prompt will say so when it is warmed up.
    """
    kept = []
    for task in tasks:
        objection = _objection(side, task, sizes.minimum)
        if objection and sizes.minimum < sizes.native:
            at_smallest, objection = objection, _objection(side, task, sizes.native)
            if not objection:
                logger.warning("%s works at the native size only: %s", task, at_smallest)
                sizes = replace(sizes, minimum=sizes.native, maximum=sizes.native)
        if not objection or task is Task.TEXT_TO_IMAGE:
            kept.append(task)
        else:
            logger.warning("%s does not work, so it is not offered: %s", task, objection)
    return Offer(tuple(kept), sizes)


def _objection(side: Side, task: Task, wanted_px: int) -> str:
    """Why a task cannot be done at a size, or nothing."""
    try:
        made_px = side(task, wanted_px)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "" if made_px == wanted_px else f"{made_px} pixels instead of {wanted_px}"
