"""Decoding beside the steps of others, on devices that can do two things at a time.

What a request decodes at its end concerns nobody else, and takes a GPU as long as some steps. On a
stream of its own the others step on meanwhile; the request is woken when its images are there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch


class SideStream(Protocol):
    """A second queue of a device."""

    def launching(self) -> AbstractContextManager[None]:
        """What is launched in here runs aside, once all that was launched before has ended."""
        ...

    def waking(self) -> AbstractContextManager[None]:
        """Whoever is given what was made aside goes on in here, and waits for nothing else."""
        ...

    def rejoin(self) -> None:
        """Whatever is launched from now on comes after what was launched aside."""
        ...


class CudaSideStream:
    """A CUDA stream beside the current one.

    Memory that is allocated on it is used again on it alone, and only after `launching`, which
    waits for the main stream: so a tensor of it may be read there without being recorded.
    """

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()

    @contextmanager
    def launching(self) -> Iterator[None]:
        """Behind the main stream as it is now."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield

    @contextmanager
    def waking(self) -> Iterator[None]:
        """Copies to the host wait for this stream, and not for the steps of others."""
        with torch.cuda.stream(self._stream):
            yield

    def rejoin(self) -> None:
        """The main stream waits; the host does not."""
        torch.cuda.current_stream().wait_stream(self._stream)
