"""Which adapters the LoRA layers of one module apply: to a whole forward, or row by row."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from stepserve.pipelines.adapters.layers import tuner_layers
from stepserve.pipelines.adapters.mixing import can_mix_in
from stepserve.pipelines.adapters.rows import RowAdapters, Run, Slots


class ModuleAdapters:
    """Says which adapters the LoRA layers of one module apply, and how strongly.

    All layers look at one list of active adapters, so that switching the whole module costs no walk
    through it. With an empty list a layer returns what the layer it wraps returns. Where rows have
    adapters of their own, that list is empty.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module
        self._by_row = RowAdapters()
        self._active: list[str] = []
        self._layers: dict[str, list[Any]] = {}
        self._scales: dict[str, float] = {}
        # None while it is not known what the layers are set to.
        self._applied: Slots | None = None

    def refresh(self) -> None:
        """Find all layers and turn them off: after an adapter was loaded, or before one goes."""
        self._by_row.forget()
        self._active.clear()
        self._layers.clear()
        self._scales.clear()
        self._applied = ()
        for layer in tuner_layers(self._module):
            # PEFT keeps the very list.
            layer.set_adapter(self._active)
            for name in layer.scaling:
                self._layers.setdefault(name, []).append(layer)
            if can_mix_in(layer):
                self._by_row.wrap(layer)

    def apply(self, slots: Slots) -> None:
        """Apply exactly these adapters to all rows, in that order. Cheap where it is so already."""
        self._by_row.unset()
        if self._applied != slots:
            self._switch(slots)

    def apply_by_row(self, runs: Iterable[Run]) -> None:
        """Apply these adapters to the rows of the next forward, call by call."""
        if self._applied != ():
            self._switch(())
        self._by_row.set(runs)

    @property
    def stacked_bytes(self) -> int:
        """Memory of the factors that are stacked for rows with adapters of their own."""
        return self._by_row.held_bytes

    def _switch(self, slots: Slots) -> None:
        # Should anything raise, nobody must think that it is set.
        self._applied = None
        for name, scale in slots:
            self._set_scale(name, scale)
        self._active[:] = [slot.name for slot in slots]
        self._applied = slots

    def _set_scale(self, name: str, scale: float) -> None:
        if self._scales.get(name) != scale:
            for layer in self._layers.get(name, ()):
                layer.set_scale(name, scale)
            self._scales[name] = scale
