"""How many steps a model can do: what each of its schedulers can, and what its pipeline takes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import lru_cache, partial

from stepserve.domain.models import ModelCapabilities, StepRange
from stepserve.pipelines.copies.factory import PipelineFactory, copy_scheduler, prototype_of
from stepserve.pipelines.schedulers.probes import can_do, find_steps
from stepserve.pipelines.schedulers.usable import Configured

# Where a model's default count does not work, one of these may.
LIKELY_STEPS = (4, 2, 1)


def probed_schedulers(factory: PipelineFactory, capabilities: ModelCapabilities) -> frozenset[str]:
    """Those of a model's schedulers that can be tried without its network."""
    likely = likely_steps(capabilities)
    return frozenset(
        name
        for name in capabilities.schedulers
        if any(_can_do(factory.configured(name), steps) for steps in likely)
    )


def scheduler_steps(
    factory: PipelineFactory, capabilities: ModelCapabilities, probed: Collection[str]
) -> dict[str, StepRange]:
    """How many steps each scheduler can do; of those that cannot be tried, any number."""
    most, likely = capabilities.max_num_inference_steps, likely_steps(capabilities)
    found = dict.fromkeys(capabilities.schedulers, StepRange(1, most))
    for name in probed:
        works = partial(_can_do, factory.configured(name))
        found[name] = find_steps(works, most, likely)
    return found


@lru_cache(maxsize=1024)
def _can_do(scheduler: Configured, steps: int) -> bool:
    return can_do(partial(copy_scheduler, prototype_of(scheduler)), steps)


def with_scheduler_steps(
    capabilities: ModelCapabilities, steps: Mapping[str, StepRange]
) -> ModelCapabilities:
    """`capabilities` of a model whose schedulers can do these numbers of steps."""
    usual = steps[capabilities.default_scheduler]
    return replace(
        capabilities,
        min_num_inference_steps=usual.minimum,
        max_num_inference_steps=usual.maximum,
        default_num_inference_steps=usual.nearest(capabilities.default_num_inference_steps),
        scheduler_steps={n: own for n, own in sorted(steps.items()) if own != usual},
    )


def within_steps(capabilities: ModelCapabilities, taken: StepRange) -> ModelCapabilities:
    """`capabilities` of a model whose pipeline takes these numbers of steps only.

    Schedulers that can do none of them are not offered.
    """
    limited = {name: capabilities.steps_of(name).within(taken) for name in capabilities.schedulers}
    offered = {name: steps for name, steps in limited.items() if steps.minimum <= steps.maximum}
    if capabilities.default_scheduler not in offered:
        return capabilities
    return with_scheduler_steps(replace(capabilities, schedulers=tuple(offered)), offered)


def likely_steps(capabilities: ModelCapabilities) -> tuple[int, ...]:
    """Numbers of steps of which one should work."""
    return (capabilities.default_num_inference_steps, *LIKELY_STEPS)
