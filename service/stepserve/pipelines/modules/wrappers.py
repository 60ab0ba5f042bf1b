"""What stands around the methods of shared modules: one ordered list, put on in one place.

Each layer needs those before it inside:

- **Reference scales** belong to the attention processors inside the module: whoever calls it says
  how strong each row's reference images are, and compiled code and graphs hold that as well.
- **Perturbed rows** likewise: whoever calls it says which rows attend perturbed.
- **Device arguments** belong to the module as it was loaded: whoever calls it may have its tensors
  on the host.
- **Compiled code** takes the place of the eager forward, so whatever records or parks a forward
  gets compiled code where there is any.
- **CUDA graphs** record what the forward launches: compiled kernels, not the compiler's guards.
- **Parking** is outermost. A parked call holds its arguments only; it is stacked with others
  before it runs, so graphs and compiled code see the few row counts of shared forwards instead of
  those of single requests. The output cache and guidance intervals are parts of it: they decide
  whether, and with which rows, a call parks.

diffusers' offloading is put on before all of these, when a pipeline is loaded.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

import torch
from torch import nn

from stepserve.engine.calls.arguments import ArgumentRules
from stepserve.engine.calls.call import ParkableMethod
from stepserve.engine.calls.output_cache import OutputCache
from stepserve.engine.tracks.interception import (
    optional_names,
    parameter_names,
    parkable,
    replace_method,
)
from stepserve.pipelines.modules.cuda_graphs import GraphedForward, Recorder
from stepserve.pipelines.modules.parking import (
    NETWORK_RULE,
    ROWS_MEET,
    ParkingOptions,
    ParkingRule,
    parkable_methods,
    rules_of,
)
from stepserve.pipelines.modules.third_party.pinned_noise import on_device

Method = Callable[..., Any]


class Layer(StrEnum):
    """What may stand around a method, innermost first."""

    REFERENCE_SCALES = "reference scales"
    PERTURBED_ROWS = "perturbed rows"
    DEVICE_ARGUMENTS = "device arguments"
    COMPILED = "compiled code"
    GRAPHS = "CUDA graphs"
    PARKING = "parking"


ORDER = tuple(Layer)
LAYER_ATTRIBUTE = "stepserve_layer"
# Where accelerate keeps what it has put around a module's forward.
OFFLOADING_HOOK = "_hf_hook"


class LayerOrderError(Exception):
    """A layer would be put around one that must be outside it."""


@dataclass(frozen=True)
class Wrappers:
    """What to put around the methods of a pipeline's modules; what is not given is left out.

    Args:
        reference_scales: by path of a component, what makes its forward take a scale for each row.
        perturbed_rows: likewise, what makes its forward take which rows are perturbed.
        device: where shared forwards get every tensor, wherever their caller has it.
        compiled: by path of a component, what runs in place of its eager forward.
        record: makes CUDA graphs of shared forwards.
        parking: how calls park.
    """

    reference_scales: Mapping[str, Callable[[Method], Method]] = field(default_factory=dict)
    perturbed_rows: Mapping[str, Callable[[Method], Method]] = field(default_factory=dict)
    device: torch.device | None = None
    compiled: Mapping[str, Method] = field(default_factory=dict)
    record: Recorder | None = None
    parking: ParkingOptions | None = None


def wrap_modules(pipeline: Any, wrappers: Wrappers) -> Callable[[], None]:
    """Put wrappers around the methods of `pipeline` that calls park at, innermost first.

    The modules stay resident and shared; called outside a track they behave as before.

    Returns:
        A function that takes them off again.

    Raises:
        LayerOrderError: a method has a layer already that must be outside a new one.
    """
    undo = ExitStack()
    for path, module, rule in parkable_methods(pipeline):
        for layer, wrap in _layers(path, module, rule, wrappers):
            undo.callback(put_around(module, rule.method, layer, wrap))
    # Last on, first off: nothing is taken off that is inside something else.
    return undo.close


def wrap_network(path: str, module: nn.Module, wrappers: Wrappers) -> None:
    """Put wrappers around the forward of a control network that was loaded later.

    It goes with the network. No graph is recorded of it, as it may go at any time.

    Args:
        path: which no other module has.
        module: the network.
        wrappers: of the pipeline's modules.
    """
    for layer, wrap in _layers(path, module, NETWORK_RULE, replace(wrappers, record=None)):
        put_around(module, NETWORK_RULE.method, layer, wrap)


def put_around(
    module: nn.Module, name: str, layer: Layer, wrap: Callable[[Method], Method]
) -> Callable[[], None]:
    """Put one layer around a method; returns a function that takes it off.

    Raises:
        LayerOrderError: the method has a layer already that must be outside this one.
    """
    inner = getattr(module, name)
    below = getattr(inner, LAYER_ATTRIBUTE, None)
    if below is not None and ORDER.index(layer) <= ORDER.index(below):
        raise LayerOrderError(f"{layer} cannot be put around {below}")
    outer = wrap(inner)
    setattr(outer, LAYER_ATTRIBUTE, layer)
    return replace_method(module, name, outer)


def wrappers_of(module: nn.Module, name: str) -> Iterator[Method]:
    """What was put around a method, outermost first."""
    wrapper = getattr(module, name)
    while hasattr(wrapper, LAYER_ATTRIBUTE):
        yield wrapper
        wrapper = getattr(wrapper, "__wrapped__", None)


def graphs_of(pipeline: Any) -> tuple[GraphedForward, ...]:
    """The forwards of a pipeline that record CUDA graphs."""
    methods = [(module, rule.method) for _, module, rule in parkable_methods(pipeline)]
    wrappers = (wrapper for method in methods for wrapper in wrappers_of(*method))
    return tuple(wrapper for wrapper in wrappers if isinstance(wrapper, GraphedForward))


def describe_wrappers(pipeline: Any) -> str:
    """What stands around each method, outermost first: `unet.forward: parking > CUDA graphs`."""
    return "; ".join(
        f"{path}.{rule.method}: {' > '.join(_names(module, rule.method)) or 'nothing'}"
        for path, module, rule in parkable_methods(pipeline)
    )


def _layers(
    path: str, module: nn.Module, rule: ParkingRule, wrappers: Wrappers
) -> Iterator[tuple[Layer, Callable[[Method], Method]]]:
    """What is wanted around one method, innermost first."""
    parking = wrappers.parking
    is_inline = parking is not None and path in parking.inline
    if path in wrappers.reference_scales and rule.shared:
        yield Layer.REFERENCE_SCALES, wrappers.reference_scales[path]
    if path in wrappers.perturbed_rows and rule.shared:
        yield Layer.PERTURBED_ROWS, wrappers.perturbed_rows[path]
    if wrappers.device is not None and rule.shared:
        yield Layer.DEVICE_ARGUMENTS, functools.partial(on_device, device=wrappers.device)
    if path in wrappers.compiled and rule.shared:
        yield Layer.COMPILED, lambda eager: wrappers.compiled[path]
    if wrappers.record is not None and rule.shared and not is_inline:
        yield Layer.GRAPHS, functools.partial(GraphedForward, record=wrappers.record)
    if parking is not None and not is_inline:
        rules = rules_of(module, path in wrappers.compiled)
        rules = replace(rules, mixes_lengths=parking.mixes_lengths)
        if not parking.pads_prompts:
            rules = replace(rules, text=())
        yield Layer.PARKING, functools.partial(_parkable, path, module, rule, parking, rules)


def _parkable(
    path: str,
    module: nn.Module,
    rule: ParkingRule,
    options: ParkingOptions,
    rules: ArgumentRules,
    inner: Method,
) -> Method:
    keeps_outputs = rule.cached and options.prompt_cache_bytes > 0
    is_shared = rule.shared and type(module).__name__ not in ROWS_MEET
    method = ParkableMethod(
        path,
        rule.method,
        inner,
        rule.stage,
        parameter_names(inner),
        optional_names(inner),
        rules,
        max_rows=options.max_rows if is_shared else 1,
        bucket_rows=options.bucket_rows if is_shared else (),
        enter=options.enter.get(path),
        output_cache=OutputCache(options.prompt_cache_bytes) if keeps_outputs else None,
    )
    return parkable(method)


def _names(module: nn.Module, name: str) -> Iterator[str]:
    for wrapper in wrappers_of(module, name):
        yield getattr(wrapper, LAYER_ATTRIBUTE)
    if name == "forward" and hasattr(module, OFFLOADING_HOOK):
        yield "offloading"
