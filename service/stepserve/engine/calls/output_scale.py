"""Numbers that a module multiplies its output with at the very end, such as a ControlNet's scale.

The forward runs with 1, and the output is multiplied where it comes back. A number times 1 is that
number, so no bit changes, and calls with different scales share the forward.
"""

from __future__ import annotations

from typing import Any

from stepserve.engine.calls.call import ParkableMethod
from stepserve.engine.calls.stacking import map_tensors

NEUTRAL = 1.0


def take_output_scale(
    method: ParkableMethod, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any], float]:
    """The arguments with a neutral scale, and the scale that was there.

    What is no number stays where it is: a list of scales belongs to several inputs.
    """
    name = method.rules.output_scale
    scale = method.named(args, kwargs).get(name, NEUTRAL)
    if not isinstance(scale, int | float):
        return args, kwargs, NEUTRAL
    args, kwargs = method.with_named(args, kwargs, {name: NEUTRAL})
    return args, kwargs, scale


def scaled(output: Any, scale: float) -> Any:
    """An output of a forward, all of its tensors times the scale."""
    return output if scale == NEUTRAL else map_tensors(lambda tensor: tensor * scale, output)
