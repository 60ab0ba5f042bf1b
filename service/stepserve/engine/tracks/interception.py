"""Makes methods of resident modules park their caller instead of running at once."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Hashable
from typing import Any

import greenlet
import torch

from stepserve.engine.calls.arguments import ArgumentRules, flatten
from stepserve.engine.calls.call import NO_RULES, ParkableMethod, make_call
from stepserve.engine.calls.guidance_interval import GuidanceInterval
from stepserve.engine.calls.output_cache import OutputCache, content_key
from stepserve.engine.tracks.track import Stage, Track, TrackGreenlet

_sequence = itertools.count()


def parkable(
    original: Callable[..., Any],
    module_name: str,
    method_name: str,
    *,
    stage: str,
    rules: ArgumentRules = NO_RULES,
    max_rows: int = 32,
    bucket_rows: tuple[int, ...] = (),
    enter: Callable[[Hashable], None] | None = None,
    output_cache: OutputCache | None = None,
) -> Callable[..., Any]:
    """A method that parks every track that calls it; outside a track it behaves as before.

    Args:
        original: the method of a resident module that all tracks share.
        module_name: the module's name in the pipeline.
        method_name: such as `forward` or `decode`.
        stage: what its time is counted as, a value of `Stage`.
        rules: how some of its arguments are to be read.
        max_rows: most rows of one shared forward.
        bucket_rows: row counts that forwards are filled up to.
        enter: sets the module to a variant before a forward of calls that want it, or None.
        output_cache: where outputs are kept for calls with the same arguments, or None.
    """
    method = ParkableMethod(
        module_name,
        method_name,
        original,
        Stage(stage),
        parameter_names(original),
        rules,
        max_rows,
        bucket_rows,
        enter=enter,
        output_cache=output_cache,
    )

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


def _wants_gradients(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a pipeline goes back through this call, as to guide its latents.

    Shared forwards run without gradients.
    """
    return torch.is_grad_enabled() and any(
        isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in flatten((args, kwargs))[0]
    )


def _park(track: Track, method: ParkableMethod, args: tuple[Any, ...], kwargs: Any) -> Any:
    call = make_call(
        method,
        args,
        kwargs,
        next(_sequence),
        variant=track.sharing_variant,
        module_variant=track.variant,
    )
    return track.park(call)


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
