"""What diffusers must not do in copies of a pipeline whose modules they share."""

from __future__ import annotations

from typing import Any

from stepserve.pipelines.modules.third_party.pinned_noise import with_pinned_noise


def copy_class(pipeline: Any, keeps_on_host: bool = False) -> type:
    """A subclass of a pipeline's class, of the same name, for copies that share its modules.

    - `_execution_device` walks through all modules at each use, which takes longer than a step of
      a small model, for a device that never changes.
    - `maybe_free_model_hooks` takes the offloading hooks off at the end of a call and puts new
      ones on: other requests are in the middle of theirs, and what makes calls park would go too.

    Args:
        pipeline: the resident one.
        keeps_on_host: whether noise is drawn into pinned memory.
    """
    device = pipeline._execution_device
    cls = type(pipeline)
    if keeps_on_host:
        cls = with_pinned_noise(cls)
    overrides = {
        "_execution_device": property(lambda self: device),
        "maybe_free_model_hooks": lambda self: None,
    }
    return type(cls.__name__, (cls,), overrides)
