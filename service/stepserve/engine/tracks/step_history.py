"""What calls of one request were given, and what they gave, the last times that they ran.

All arithmetic is in float32, or in the tensors' own dtype where that is more precise. None of it
waits for the device.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from optree import PyTreeSpec
from torch import Tensor

from stepserve.engine.calls.arguments import ArgumentKind, flatten
from stepserve.engine.calls.call import Call
from stepserve.engine.calls.objects import UnsplittableError, flatten_output
from stepserve.engine.calls.stacking import duplicate

# What modules call the argument that says where in the noise schedule they are.
TIMESTEPS = ("timestep", "timesteps", "timestep_ratio", "t")
PRECISE = (torch.float32, torch.float64)

Timestep = float | Tensor
"""A number; a tensor without dimensions where the number is on a device."""


def sample_of(call: Call) -> list[Tensor]:
    """What a call is to denoise: its first argument that has rows; empty if there is none."""
    for (kind, _), leaf in zip(call.key.arguments, call.leaves, strict=True):
        if kind is ArgumentKind.BATCHED:
            return [leaf]
        if kind is ArgumentKind.ROW_LIST:
            return [part for part in flatten(leaf)[0] if isinstance(part, Tensor)]
    return []


def timestep_of(call: Call, number: int) -> Timestep:
    """The timestep of a call, or its number where it has none."""
    named = call.method.named(call.args, call.kwargs)
    value = next((named[name] for name in TIMESTEPS if named.get(name) is not None), number)
    if not isinstance(value, Tensor):
        return float(value)
    # Rows of one request are at one timestep. Only tokens of images that are given are at none.
    last = value.max() if value.numel() > 1 else value.reshape(())
    return float(last) if last.device.type == "cpu" else last.double()


def mean_size(tensors: Sequence[Tensor]) -> Tensor:
    """The mean absolute value of tensors of one size; without dimensions."""
    means = [_precise(tensor).abs().mean() for tensor in tensors]
    return means[0] if len(means) == 1 else torch.stack(means).mean()


def mean_change(tensors: Sequence[Tensor], before: Sequence[Tensor]) -> Tensor:
    """The mean absolute difference of tensors of one size; without dimensions."""
    pairs = zip(tensors, before, strict=True)
    return mean_size([_precise(tensor) - _precise(other) for tensor, other in pairs])


@dataclass
class Inputs:
    """What a call was given when it last ran.

    Args:
        sample: that it had to denoise.
        change: mean absolute difference between that and the one before; None: there was none.
    """

    sample: list[Tensor]
    change: Tensor | None = None

    def fits(self, sample: Sequence[Tensor]) -> bool:
        """Whether it can be compared with this one."""
        return list(map(_form, self.sample)) == list(map(_form, sample))


@dataclass(frozen=True)
class Output:
    """What a call gave at a timestep: the values in it, and how they stand in it."""

    timestep: Timestep
    leaves: Sequence[Any]
    structure: PyTreeSpec

    @classmethod
    def read(cls, timestep: Timestep, output: Any) -> Output | None:
        """A copy of an output; None where it cannot be looked into."""
        try:
            # A pipeline may write into its own, which is a part of what all requests have got.
            leaves, structure = flatten_output(duplicate(output))
        except UnsplittableError:
            return None
        return cls(timestep, leaves, structure)

    @property
    def numbers(self) -> list[Tensor]:
        """Its tensors that change little by little."""
        return [leaf for leaf in self.leaves if _is_numeric(leaf)]

    @property
    def form(self) -> Hashable:
        """Equal for outputs with the same kinds of values in the same places."""
        # Structures themselves cannot be compared: they hold the objects that were taken apart.
        return tuple(self.structure.paths()), tuple(map(_form, self.leaves))

    def repeat(self) -> Any:
        """The output once more."""
        return self.structure.unflatten(self.leaves)


@dataclass(frozen=True)
class Line:
    """A straight line in the timestep through the last two outputs of a call."""

    before: Output
    latest: Output

    @classmethod
    def through(cls, before: Output | None, latest: Output | None) -> Line | None:
        """None where there are no two outputs, or not of one form."""
        if before is None or latest is None or not latest.numbers or before.form != latest.form:
            return None
        return cls(before, latest)

    def change(self) -> Tensor:
        """The mean absolute difference of the two, over the size of the latest."""
        latest = self.latest.numbers
        return mean_change(latest, self.before.numbers) / mean_size(latest)

    def at(self, timestep: Timestep) -> Any:
        """The output that the line has there; what is no number is as in the latest."""
        share = _share(timestep, self.latest.timestep, self.before.timestep)
        pairs = zip(self.latest.leaves, self.before.leaves, strict=True)
        return self.latest.structure.unflatten(
            [_beyond(leaf, other, share) if _is_numeric(leaf) else leaf for leaf, other in pairs]
        )


@dataclass
class Outputs:
    """What one call of a step gave when it last ran.

    Args:
        is_denoiser: whether it is predicted by a line through the last two, and else repeated.
    """

    is_denoiser: bool
    latest: Output | None = None
    line: Line | None = None

    @property
    def is_known(self) -> bool:
        """Whether the next one can be predicted."""
        return (self.line if self.is_denoiser else self.latest) is not None

    def learn(self, output: Output | None) -> None:
        """The call ran again."""
        if self.is_denoiser:
            self.line = Line.through(self.latest, output)
        self.latest = output

    def at(self, timestep: Timestep) -> Any:
        """What it should give at a timestep; one of the two is known."""
        if self.line is not None:
            return self.line.at(timestep)
        assert self.latest is not None
        return self.latest.repeat()


@dataclass
class History:
    """Steps that ran since the rows, shapes or methods of their calls last changed.

    Args:
        inputs: of calls that may be the first of a step, by their place in it.
        outputs: by place.
        output_change: of the denoiser's first call, over the size of its output; None before there
            were two.
        steps: that ran.
        error: that is expected to have added up since the last one.
    """

    inputs: dict[Hashable, Inputs] = field(default_factory=dict)
    outputs: dict[Hashable, Outputs] = field(default_factory=dict)
    output_change: Tensor | None = None
    steps: int = 0
    error: float = 0.0

    def learn_input(self, place: Hashable, sample: Sequence[Tensor]) -> None:
        """A call was given this, and ran."""
        before = self.inputs.get(place)
        is_comparable = before is not None and before.fits(sample)
        change = mean_change(sample, before.sample) if before and is_comparable else None
        self.inputs[place] = Inputs([part.clone() for part in sample], change)


def _share(timestep: Timestep, latest: Timestep, before: Timestep) -> Timestep:
    """How far a timestep is beyond the latest, in distances between the last two."""
    distance = latest - before
    if isinstance(distance, Tensor):
        # Some solvers are twice at one timestep.
        return ((timestep - latest) / distance).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    return (timestep - latest) / distance if distance else 0.0


def _beyond(latest: Tensor, before: Tensor, share: Timestep) -> Tensor:
    precise = _precise(latest)
    return (precise + (precise - _precise(before)) * share).to(latest.dtype)


def _form(leaf: Any) -> Hashable:
    return (leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else (type(leaf),)


def _is_numeric(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _precise(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype in PRECISE else tensor.float()
