"""Makes methods of resident modules park their caller instead of running at once."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable
from typing import Any

import greenlet
import torch

from stepserve.engine.calls.arguments import flatten
from stepserve.engine.calls.call import Call, ParkableMethod, make_call
from stepserve.engine.calls.guidance_interval import GuidanceInterval
from stepserve.engine.calls.output_cache import OutputCache, content_key
from stepserve.engine.calls.output_scale import scaled, take_output_scale
from stepserve.engine.tracks.step_cache import StepCache
from stepserve.engine.tracks.track import SKIPPED, Stage, Track, TrackGreenlet

_sequence = itertools.count()
# What a step cache may skip.
OF_STEPS = (Stage.CONTROL, Stage.DENOISE)


def parkable(method: ParkableMethod) -> Callable[..., Any]:
    """A method that parks every track that calls it; outside a track it behaves as before."""
    original = method.run

    @functools.wraps(original)
    def parked(*args: Any, **kwargs: Any) -> Any:
        current = greenlet.getcurrent()
        if not isinstance(current, TrackGreenlet) or _wants_gradients(args, kwargs):
            return original(*args, **kwargs)
        interval = current.track.guidance_interval
        if method.stage == Stage.DENOISE and interval is not None:
            return _park_narrowed(current.track, interval, method, args, kwargs)
        if method.output_cache is None:
            return _park(current.track, method, args, kwargs)
        return _recall(current.track, method, method.output_cache, args, kwargs)

    return parked


def replace_method(
    module: object, name: str, replacement: Callable[..., Any]
) -> Callable[[], None]:
    """Replace a method on one instance; returns a function that undoes it.

    It does nothing if another replacement was put on top meanwhile: that one still calls this one,
    which is harmless outside a track.
    """
    before = vars(module).get(name)
    setattr(module, name, replacement)
    return functools.partial(_restore, module, name, replacement, before)


def parameter_names(function: Callable[..., Any]) -> tuple[str, ...]:
    """Names of the parameters that may be given by position or by name, in their order."""
    nameable = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(function).parameters.values()
    return tuple(parameter.name for parameter in parameters if parameter.kind in nameable)


def optional_names(function: Callable[..., Any]) -> frozenset[str]:
    """Names of the parameters whose default is None."""
    parameters = inspect.signature(function).parameters.values()
    return frozenset(parameter.name for parameter in parameters if parameter.default is None)


def _wants_gradients(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a pipeline goes back through this call, as to guide its latents.

    Shared forwards run without gradients.
    """
    return torch.is_grad_enabled() and any(
        isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in flatten((args, kwargs))[0]
    )


def _park(track: Track, method: ParkableMethod, args: tuple[Any, ...], kwargs: Any) -> Any:
    if method.rules.output_scale:
        args, kwargs, scale = take_output_scale(method, args, kwargs)
        return scaled(_park_call(track, method, args, kwargs), scale)
    return _park_call(track, method, args, kwargs)


def _park_call(track: Track, method: ParkableMethod, args: tuple[Any, ...], kwargs: Any) -> Any:
    call = make_call(
        method,
        args,
        kwargs,
        next(_sequence),
        variant=track.sharing_variant,
        module_variant=track.variant,
    )
    if track.step_cache is None or method.stage not in OF_STEPS:
        return track.park(call)
    return _park_or_predict(track, track.step_cache, call)


def _park_or_predict(track: Track, cache: StepCache, call: Call) -> Any:
    pending = cache.expect(call)
    output = track.park(call, pending.decision)
    if output is SKIPPED:
        return pending.predict()
    pending.learn(output)
    return output


def _park_narrowed(
    track: Track,
    interval: GuidanceInterval,
    method: ParkableMethod,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    if not interval.is_due(method.name):
        return _park(track, method, args, kwargs)
    without_rows = method.rules.shared | method.rules.ignored
    half_args, half_kwargs = interval.narrow(args, kwargs, without_rows)
    return interval.widen(_park(track, method, half_args, half_kwargs))


def _recall(
    track: Track, method: ParkableMethod, cache: OutputCache, args: tuple[Any, ...], kwargs: Any
) -> Any:
    key = content_key(track.variant, args, kwargs)
    known, output = cache.find(key)
    if not known:
        output = _park(track, method, args, kwargs)
        cache.keep(key, output)
    return output


def _restore(module: object, method_name: str, parked: object, before: object) -> None:
    if vars(module).get(method_name) is not parked:
        return
    if before is None:
        delattr(module, method_name)
    else:
        setattr(module, method_name, before)
