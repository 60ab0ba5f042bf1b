"""What stands around module methods: in one order, put on and taken off in one place."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from stepserve.engine.tracks.interception import replace_method
from stepserve.pipelines.loading.folders import LoadedModel
from stepserve.pipelines.modules.parking import ParkingOptions, parkable_methods, rules_of
from stepserve.pipelines.modules.wrappers import (
    ORDER,
    Layer,
    LayerOrderError,
    Wrappers,
    describe_wrappers,
    graphs_of,
    put_around,
    wrap_modules,
    wrappers_of,
)
from stepserve.pipelines.probing.parked_calls import parked_at
from stepserve.pipelines.probing.probe_requests import make_probe_requests
from stepserve.pipelines.serving.runner import PipelineRunner
from tiny_model import UNTRIED

CPU = torch.device("cpu")


class Doubler(torch.nn.Module):
    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        return 2 * sample


def plus_one(inner: Any) -> Any:
    return lambda sample: inner(sample) + 1


def never_record(forward: Any, leaves: Sequence[Any], structure: Any) -> Any:
    raise AssertionError("a forward was recorded")


def everything(model: LoadedModel) -> Wrappers:
    compiled = model.pipeline.unet.forward
    return Wrappers(
        device=CPU,
        compiled={"unet": lambda *args, **kwargs: compiled(*args, **kwargs)},
        record=never_record,
        parking=ParkingOptions(max_rows=2),
    )


def test_compiled_code_is_for_calls_without_residuals_alone(tiny: LoadedModel) -> None:
    """There is no compiled code for the others, and eager code rounds otherwise."""
    unet = tiny.pipeline.unet
    assert "mid_block_additional_residual" in rules_of(unet).residuals
    assert rules_of(unet, is_compiled=True).residuals == frozenset()


def test_the_order_of_the_layers() -> None:
    """Whoever changes it must say why parked, recorded and compiled calls stay right."""
    assert ORDER == (
        Layer.REFERENCE_SCALES,
        Layer.PERTURBED_ROWS,
        Layer.DEVICE_ARGUMENTS,
        Layer.COMPILED,
        Layer.GRAPHS,
        Layer.PARKING,
    )


@pytest.mark.parametrize(("below", "above"), list(itertools.product(ORDER, ORDER)))
def test_a_layer_goes_around_those_before_it_only(below: Layer, above: Layer) -> None:
    module = Doubler()
    undo = put_around(module, "forward", below, plus_one)
    if ORDER.index(above) > ORDER.index(below):
        put_around(module, "forward", above, plus_one)()
    else:
        with pytest.raises(LayerOrderError, match=f"{above} cannot be put around {below}"):
            put_around(module, "forward", above, plus_one)
    assert module(torch.ones(1)) == 3
    undo()
    assert "forward" not in vars(module)


def test_a_layer_is_seen_through_a_wrapper_of_somebody_else() -> None:
    module = Doubler()
    put_around(module, "forward", Layer.PARKING, plus_one)
    other = vars(module)["forward"]
    replace_method(module, "forward", other)
    with pytest.raises(LayerOrderError):
        put_around(module, "forward", Layer.GRAPHS, plus_one)


def test_all_layers_are_put_on_in_order_and_taken_off(tiny: LoadedModel) -> None:
    pipeline = tiny.pipeline
    methods = [(module, rule.method) for _, module, rule in parkable_methods(pipeline)]
    assert len(methods) == 4
    unwrap = wrap_modules(pipeline, everything(tiny))
    layers = [wrapper.stepserve_layer for wrapper in wrappers_of(pipeline.unet, "forward")]  # type: ignore[attr-defined]
    # What takes the place of the eager forward hides what it does not call.
    assert layers == [Layer.PARKING, Layer.GRAPHS, Layer.COMPILED]
    assert len(graphs_of(pipeline)) == 1
    assert all(method in vars(module) for module, method in methods)
    unwrap()
    assert not any(method in vars(module) for module, method in methods)
    assert graphs_of(pipeline) == ()


def test_components_that_a_call_changes_do_not_park(tiny: LoadedModel) -> None:
    options = ParkingOptions(inline=frozenset({"unet", "vae"}))
    unwrap = wrap_modules(tiny.pipeline, Wrappers(record=never_record, parking=options))
    assert describe_wrappers(tiny.pipeline) == (
        "vae.encode: nothing; vae.decode: nothing; text_encoder.forward: parking; "
        "unet.forward: nothing"
    )
    unwrap()


def test_a_parked_call_reaches_no_layer_before_it_runs(tiny: LoadedModel) -> None:
    """So graphs and compiled code see shared forwards only, of few row counts."""
    reached: list[int] = []

    def compiled(sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        reached.append(len(sample))
        return (torch.zeros_like(sample),)

    wrap = wrap_modules(tiny.pipeline, Wrappers(compiled={"unet": compiled}))
    with parked_at("denoise", tiny.pipeline, make_probe_requests(tiny), ParkingOptions()) as groups:  # type: ignore[arg-type]
        assert reached == []
        (call, *_) = groups[0]
        call.method.run(*call.args, **call.kwargs)
        assert reached == [call.rows]
    wrap()


def test_a_runner_logs_its_wrappers(tiny: LoadedModel, caplog: pytest.LogCaptureFixture) -> None:
    runner = PipelineRunner(tiny, sharing=UNTRIED)
    with caplog.at_level(logging.INFO):
        runner.start()
    runner.stop()
    (line,) = [line for line in caplog.messages if "wrappers" in line]
    assert line == (
        "model tiny, wrappers of its modules: vae.encode: parking; vae.decode: parking; "
        "text_encoder.forward: parking; unet.forward: parking"
    )
