"""Are a model's weights all there, and numbers? Images of others would look like an answer."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from stepserve.pipelines.errors import ModelLoadError

logger = logging.getLogger(__name__)

# Large models on a CPU take longer; what is left is looked at if the warm-up fails.
MOST_S = 1.0
SHOWN = 5
# BERT has a head that no pipeline asks, and that some folders lack.
_UNUSED = re.compile(r"(^|\.)pooler\.dense\.")
_MADE_UP = (
    re.compile(r"newly initialized.*: \[(?P<names>.*?)\]", re.DOTALL),
    re.compile(r"^(?P<names>\S+)\s*\|\s*MISSING", re.MULTILINE),
)


def check_heard(heard: Iterable[str]) -> None:
    """Refuse a model of which the libraries said that weights were made up by chance.

    Raises:
        ModelLoadError: names the weights that its files lack.
    """
    missing = list[str]()
    for message in heard:
        made_up = [name for pattern in _MADE_UP for name in _names(pattern, message)]
        missing += [name for name in made_up if not _UNUSED.search(name)]
        logger.info("said while loading: %s", message)
    if missing:
        raise ModelLoadError(f"its files lack weights: {_listed(missing)}")


def check_finite_weights(
    pipeline: Any, most_s: float = MOST_S, clock: Callable[[], float] = time.monotonic
) -> None:
    """Refuse a model with weights that are no numbers.

    On a CPU it ends after about `most_s` seconds, whatever is left; infinity looks at all.

    Raises:
        ModelLoadError: names such weights.
    """
    started_s, flaws = clock(), dict[str, Tensor]()
    for name, weight in _weights(pipeline):
        if weight.device.type == "cpu" and clock() - started_s > most_s:
            logger.info("no time to look at all weights: %s is the first of the rest", name)
            break
        flaws[name] = ~is_finite(weight)
    # Asked last, as a device would be waited for each time.
    found = [name for name, flaw in flaws.items() if bool(flaw)]
    if found:
        raise ModelLoadError(
            f"weights are NaN or infinite in the dtype that was asked for: {_listed(found)}"
        )


def is_finite(tensor: Tensor) -> Tensor:
    """Whether a tensor of any shape has neither NaN nor infinity: a scalar on its device.

    Ten times as fast as looking at each number: the least and the largest are NaN if any is.
    """
    if not tensor.numel():
        return torch.tensor(True)
    return torch.stack(torch.aminmax(tensor)).isfinite().all()


def _weights(pipeline: Any) -> Iterator[tuple[str, Tensor]]:
    for component, module in pipeline.components.items():
        if not isinstance(module, nn.Module):
            continue
        for name, weight in module.named_parameters():
            # What is quantised or not in memory cannot be looked at.
            if weight.is_floating_point() and weight.device.type != "meta" and _is_plain(weight):
                yield f"{component}.{name}", weight.detach()


def _is_plain(weight: Tensor) -> bool:
    return type(weight) in (nn.Parameter, Tensor) and weight.dtype.itemsize > 1


def _names(pattern: re.Pattern[str], message: str) -> list[str]:
    found = (match["names"] for match in pattern.finditer(message))
    return [name.strip(" '\"") for names in found for name in names.split(",")]


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
