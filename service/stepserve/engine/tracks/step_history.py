"""What calls of one request were given, and what they gave, the last times that they ran.

All arithmetic is in float32, or in the tensors' own dtype where that is more precise. None of it
waits for a device. The first operations after a forward find its caches full of weights, so that
each takes many times as long as in a loop: hence as few of them as there can be.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

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

Scalar = float | Tensor
"""A number; a tensor without dimensions where it is on a device that must not be waited for."""


def sample_of(call: Call) -> list[Tensor]:
    """What a call is to denoise: its first argument that has rows; empty if there is none."""
    for (kind, _), leaf in zip(call.key.arguments, call.leaves, strict=True):
        if kind is ArgumentKind.BATCHED:
            return [leaf]
        if kind is ArgumentKind.ROW_LIST:
            return [part for part in flatten(leaf)[0] if isinstance(part, Tensor)]
    return []


def timestep_of(call: Call, number: int) -> Scalar:
    """The timestep of a call, or its number where it has none."""
    named = call.method.named(call.args, call.kwargs)
    value = next((named[name] for name in TIMESTEPS if named.get(name) is not None), number)
    if not isinstance(value, Tensor):
        return float(value)
    # Rows of one request are at one timestep. Only tokens of images that are given are at none.
    return _scalar(value if value.numel() == 1 else value.max())


def size(tensors: Sequence[Tensor]) -> Scalar:
    """The sum of all absolute values."""
    sizes = [torch.linalg.vector_norm(tensor, 1) for tensor in tensors]
    return _scalar(sizes[0] if len(sizes) == 1 else torch.stack(sizes).sum())


def distance(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> Scalar:
    """The sum of all absolute differences.

    Args:
        tensors: of any dtype.
        others: of the same shapes, as precise as is wanted.
    """
    pairs = zip(tensors, others, strict=True)
    return size([tensor - other for tensor, other in pairs])


def ratio(part: Scalar, whole: Scalar) -> Scalar:
    """How many times one is the other; infinite, or no number, where that is zero."""
    return part / whole if isinstance(whole, Tensor) or whole else math.inf


class Inputs(NamedTuple):
    """What a call was given when it last ran.

    Args:
        form: of the sample.
        sample: that it had to denoise; a precise copy.
        change: the distance from that to the one before; None: there was none.
    """

    form: Hashable
    sample: Sequence[Tensor]
    change: Scalar | None

    def fits(self, sample: Sequence[Tensor]) -> bool:
        """Whether it can be compared with this one."""
        return self.form == _form(sample)


class Output(NamedTuple):
    """What a call gave at a timestep.

    Args:
        timestep: of the call.
        form: equal for outputs of one type with values of the same kinds in the same order.
        leaves: the values in it, numbers as precise copies.
        dtypes: of the values as they were given; None for what is no number.
        structure: how they stand in it.
    """

    timestep: Scalar
    form: Hashable
    leaves: Sequence[Any]
    dtypes: Sequence[torch.dtype | None]
    structure: PyTreeSpec

    @classmethod
    def read(cls, timestep: Scalar, output: Any) -> Output | None:
        """None where an output cannot be looked into, or holds no numbers."""
        try:
            leaves, structure = flatten_output(output)
        except UnsplittableError:
            return None
        dtypes = [leaf.dtype if _is_numeric(leaf) else None for leaf in leaves]
        if not any(dtypes):
            return None
        kept = [_kept(leaf) for leaf in leaves]
        return cls(timestep, (type(output), _form(leaves)), kept, dtypes, structure)

    @property
    def numbers(self) -> list[Tensor]:
        """Its tensors that change little by little."""
        return [leaf for leaf, dtype in zip(self.leaves, self.dtypes, strict=True) if dtype]


class Line(NamedTuple):
    """A straight line in the timestep through the last two outputs of a call, of one form."""

    before: Output
    latest: Output

    def change(self) -> Scalar:
        """The distance between the two, over the size of the latest."""
        latest = self.latest.numbers
        return ratio(distance(latest, self.before.numbers), size(latest))

    def at(self, timestep: Scalar) -> Any:
        """The output that the line has there; what is no number is as in the latest."""
        before, latest = self.before, self.latest
        share = _share(timestep, latest.timestep, before.timestep)
        values = zip(latest.leaves, before.leaves, latest.dtypes, strict=True)
        return latest.structure.unflatten(
            [(v + (v - v0) * share).to(dtype) if dtype else v for v, v0, dtype in values]
        )


class Predicted:
    """What a denoiser call of a step gave when it last ran, and the line through the last two."""

    def __init__(self) -> None:
        self.line: Line | None = None
        self._latest: Output | None = None

    @property
    def is_known(self) -> bool:
        """Whether the next output can be predicted."""
        return self.line is not None

    def learn(self, timestep: Scalar, output: Any) -> None:
        """The call has run, and given this."""
        before, latest = self._latest, Output.read(timestep, output)
        is_alike = before is not None and latest is not None and before.form == latest.form
        self.line = Line(before, latest) if before and latest and is_alike else None
        self._latest = latest

    def at(self, timestep: Scalar) -> Any:
        """The output that it should give at a timestep."""
        assert self.line is not None
        return self.line.at(timestep)


class Repeated:
    """What a call beside the denoiser gave when it last ran: nobody looks at what is predicted."""

    def __init__(self) -> None:
        self._latest: Any = None

    @property
    def is_known(self) -> bool:
        """Whether there is an output."""
        return self._latest is not None

    def learn(self, timestep: Scalar, output: Any) -> None:
        """The call has run, and given this."""
        self._latest = None
        with suppress(UnsplittableError):
            self._latest = duplicate(output)

    def at(self, timestep: Scalar) -> Any:
        """The last output once more."""
        return self._latest


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
    outputs: dict[Hashable, Predicted | Repeated] = field(default_factory=dict)
    output_change: Scalar | None = None
    steps: int = 0
    error: float = 0.0

    def learn_input(self, place: Hashable, sample: Sequence[Tensor], change: Scalar | None) -> None:
        """A call was given this, and ran.

        Args:
            place: of the call in a step.
            sample: that it had to denoise.
            change: its distance from the one before, where it is known already.
        """
        before = self.inputs.get(place)
        if change is None and before is not None and before.fits(sample):
            change = distance(sample, before.sample)
        self.inputs[place] = Inputs(_form(sample), [_copy(part) for part in sample], change)


def _scalar(value: Tensor) -> Scalar:
    return value.item() if value.device.type == "cpu" else value.reshape(()).double()


def _share(timestep: Scalar, latest: Scalar, before: Scalar) -> Scalar:
    """How far a timestep is beyond the latest, in distances between the last two."""
    gap = latest - before
    if isinstance(gap, Tensor):
        # Some solvers are twice at one timestep.
        return ((timestep - latest) / gap).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    return (timestep - latest) / gap if gap else 0.0


def _kept(leaf: Any) -> Any:
    """A value as it is remembered: a pipeline may write into its own."""
    if _is_numeric(leaf):
        return _copy(leaf)
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def _copy(tensor: Tensor) -> Tensor:
    """One that nobody else writes into, in float32 or what is more precise."""
    return tensor.clone() if tensor.dtype in PRECISE else tensor.float()


def _form(leaves: Sequence[Any]) -> Hashable:
    return tuple(
        (leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else type(leaf) for leaf in leaves
    )


def _is_numeric(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()
