"""What a model's capabilities say of its controls."""

from __future__ import annotations

from dataclasses import replace

from stepserve.domain.models import OWN_CONTROL, Control, ControlKind, ModelCapabilities
from stepserve.domain.tasks import Count, Role
from stepserve.pipelines.controls.cache import ControlCache
from stepserve.pipelines.controls.preprocessors import available_preprocessors
from stepserve.pipelines.copies.factory import PipelineFactory

SCALES = ("controlnet_conditioning_scale", "adapter_conditioning_scale")


def own_controls(factory: PipelineFactory) -> tuple[Control, ...]:
    """The control that pipelines take by themselves, if they do."""
    for task, done in factory.tasks.items():
        if Role.CONTROL in done.arguments:
            signature = factory.signature(task)
            own = Control(
                OWN_CONTROL,
                ControlKind.OWN,
                loaded=True,
                takes_scale=any(map(signature.accepts, SCALES)),
                takes_interval=signature.accepts("control_guidance_start"),
            )
            return (own,)
    return ()


def with_controls(
    capabilities: ModelCapabilities, factory: PipelineFactory, controls: ControlCache
) -> ModelCapabilities:
    """The capabilities with the controls that an operator lists, and how many a task takes."""
    taken = {Role.CONTROL: Count(0, controls.options.max_loaded)}
    tasks = {
        task: {**inputs, **taken} if task in controls.tasks else inputs
        for task, inputs in capabilities.tasks.items()
    }
    listed = own_controls(factory) + controls.listed()
    preprocessors = available_preprocessors() if listed else ()
    return replace(capabilities, tasks=tasks, controls=listed, preprocessors=preprocessors)
