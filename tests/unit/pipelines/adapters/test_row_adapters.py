"""Layers that add other adapters to each row, compared with PEFT's for each row by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from stepserve.pipelines.adapters.layers import settle_layers
from stepserve.pipelines.adapters.module import ModuleAdapters
from stepserve.pipelines.adapters.rows import MOST_KEPT, RowAdapters, Slot, Slots, gather
from torch import Tensor, nn

# PEFT warns of the second adapter.
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
RANKS = {"one": 1, "two": 2, "eight": 8, "other": 8, "odd": 5}


class Layers(nn.Module):
    """Layers of every kind: of tokens, of one vector a row, and convolutions of images."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(24, 40)
        self.time = nn.Linear(24, 16, bias=False)
        self.down = nn.Conv2d(6, 10, 3, stride=2, padding=1)
        self.point = nn.Conv2d(6, 8, 1)
        self.video = nn.Conv3d(3, 4, (1, 3, 3), padding=(0, 1, 1))

    def forward(self, states: Tensor) -> list[Tensor]:
        images = states.reshape(-1, 6, 4, 6).contiguous(memory_format=torch.channels_last)
        videos = states.reshape(-1, 3, 2, 4, 6)
        return [
            self.query(states),
            self.time(states[:, 0]),
            self.down(images),
            self.point(images),
            self.video(videos),
        ]


ALL = ["query", "time", "down", "point", "video"]


def adapted(dtype: torch.dtype) -> Layers:
    """With adapters of several ranks; one lacks all layers but one, one has another alpha."""
    torch.manual_seed(0)
    module = Layers()
    module.down.weight.data = module.down.weight.contiguous(memory_format=torch.channels_last)
    for name, rank in RANKS.items():
        config = LoraConfig(
            r=rank,
            lora_alpha=3 * rank if name == "odd" else rank,
            use_rslora=name == "two",
            target_modules=["query"] if name == "other" else ALL,
            init_lora_weights=False,
        )
        inject_adapter_in_model(config, module, name)
    settle_layers(module)
    return module.to(dtype)


def slots(**scales: float) -> Slots:
    return tuple(Slot(name, scale) for name, scale in scales.items())


ROWS = (
    slots(eight=1.0),
    (),
    slots(one=0.7),
    slots(eight=0.3, odd=-1.0),
    slots(other=2.0),
    slots(two=0.5, one=0.25, other=1.5),
    (),
    slots(eight=1.0),
)
RUNS = [(each, 1) for each in ROWS]


def states(dtype: torch.dtype, rows: int = len(ROWS)) -> Tensor:
    return torch.randn(rows, 6, 24, generator=torch.Generator().manual_seed(1)).to(dtype)


def by_row(adapters: ModuleAdapters, module: Layers, rows: Sequence[Slots], given: Tensor) -> Any:
    adapters.apply_by_row([(each, 1) for each in rows])
    return module(given)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_each_row_gets_what_peft_gives_it_alone(dtype: torch.dtype) -> None:
    module = adapted(dtype)
    adapters = ModuleAdapters(module)
    adapters.refresh()
    given = states(dtype)
    together = by_row(adapters, module, ROWS, given)
    bound = {torch.float64: 1e-14, torch.float32: 1e-5, torch.bfloat16: 0.02}[dtype]
    for row, each in enumerate(ROWS):
        adapters.apply(each)
        for mixed, alone in zip(together, module(given[row : row + 1]), strict=True):
            assert (mixed[row] - alone[0]).abs().max() <= bound * alone.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_bits_of_a_row_do_not_depend_on_the_others(dtype: torch.dtype) -> None:
    module = adapted(dtype)
    adapters = ModuleAdapters(module)
    adapters.refresh()
    given = states(dtype)
    # Only what is added is looked at: the base layer may sum in another order for more rows.
    for path in ALL:
        tuner: Any = module.get_submodule(path)
        base = tuner.get_base_layer()
        base.weight.zero_()
        if base.bias is not None:
            base.bias.zero_()
    together = by_row(adapters, module, ROWS, given)
    for row, each in enumerate(ROWS):
        alone = by_row(adapters, module, [each], given[row : row + 1])
        for mixed, one in zip(together, alone, strict=True):
            assert torch.equal(mixed[row], one[0])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_without_an_adapter_have_the_bits_of_the_base_layer(dtype: torch.dtype) -> None:
    module = adapted(dtype)
    adapters = ModuleAdapters(module)
    adapters.refresh()
    given = states(dtype)
    bare = by_row(adapters, module, [()] * len(ROWS), given)
    mixed = by_row(adapters, module, ROWS, given)
    for row, each in enumerate(ROWS):
        pairs = zip(mixed, bare, strict=True)
        are_equal = [torch.equal(some[row], without[row]) for some, without in pairs]
        # One of them is for the first layer only.
        assert are_equal == [each == ()] + [each in ((), ROWS[4])] * 4


@torch.no_grad()
def test_a_layer_may_get_several_vectors_of_each_row_one_after_the_other() -> None:
    module = adapted(torch.float64)
    adapters = ModuleAdapters(module)
    adapters.refresh()
    given = states(torch.float64)
    folded = given.reshape(2 * len(ROWS), 3, 24)
    adapters.apply_by_row(RUNS)
    assert torch.equal(module.query(folded).reshape(len(ROWS), 6, 40), module.query(given))


@torch.no_grad()
def test_a_convolution_gives_a_row_the_bits_of_peft() -> None:
    module = adapted(torch.float32)
    adapters = ModuleAdapters(module)
    adapters.refresh()
    convolution: Any = module.down
    images = torch.randn(len(ROWS), 6, 9, 7).contiguous(memory_format=torch.channels_last)
    nn.init.zeros_(convolution.get_base_layer().weight)
    adapters.apply_by_row(RUNS)
    together = convolution(images)
    for row, each in enumerate(ROWS):
        adapters.apply(each)
        assert torch.equal(together[row], convolution(images[row : row + 1])[0])


@torch.no_grad()
def test_calls_of_several_rows_have_the_bits_of_each_call_alone() -> None:
    module = adapted(torch.float32)
    adapters = ModuleAdapters(module)
    adapters.refresh()
    for path in ALL:
        nn.init.zeros_(module.get_submodule(path).get_base_layer().weight)  # type: ignore[operator]
    given = states(torch.float32)
    runs = [(ROWS[0], 2), ((), 1), (ROWS[3], 3), (ROWS[4], 1), (ROWS[4], 1)]
    adapters.apply_by_row(runs)
    together, first = module(given), 0
    for slots_, count in runs:
        rows = slice(first, first + count)
        adapters.apply_by_row([(slots_, count)])
        for mixed, alone in zip(together, module(given[rows]), strict=True):
            assert torch.equal(mixed.unflatten(0, (len(ROWS), -1))[rows].flatten(0, 1), alone)
        first += count


@torch.no_grad()
def test_rows_that_do_not_fit_are_an_error() -> None:
    module = adapted(torch.float64)
    adapters = ModuleAdapters(module)
    adapters.refresh()
    with pytest.raises(RuntimeError, match="shape"):
        by_row(adapters, module, ROWS, states(torch.float64, rows=3))


@torch.no_grad()
def test_stacked_factors_are_kept_within_their_bytes() -> None:
    module = adapted(torch.float32)
    layer: Any = module.query
    size_bytes = sum(factors.size_bytes for factors in gather(layer, RUNS))
    rows, stacked = RowAdapters(kept_bytes=2 * size_bytes), []
    rows.wrap(layer)
    for turn in range(5):
        wanted = [*ROWS[turn:], *ROWS[:turn]]
        rows.set((each, 1) for each in wanted)
        first, again = layer(states(torch.float32)), layer(states(torch.float32))
        assert torch.equal(first, again)
        assert rows._held_bytes <= 2 * size_bytes
        stacked.append(len(rows._gathered))
    assert stacked == [1, 2, 2, 2, 2]
    for count in range(2 * MOST_KEPT):
        rows.set([((), count)])
    assert (rows._held_bytes, len(rows._gathered)) == (0, MOST_KEPT)
    rows.forget()
    assert rows._held_bytes == len(rows._gathered) == 0


@torch.no_grad()
def test_without_room_factors_are_stacked_at_every_forward() -> None:
    module = adapted(torch.float32)
    layer: Any = module.query
    rows = RowAdapters(kept_bytes=0)
    rows.wrap(layer)
    rows.set(RUNS)
    kept = RowAdapters()
    expected = layer(states(torch.float32))
    kept.wrap(layer)
    kept.set(RUNS)
    assert torch.equal(layer(states(torch.float32)), expected)
    assert rows._held_bytes == 0 < kept._held_bytes
