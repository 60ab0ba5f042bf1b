"""Decoding what requests bring along, on threads of its own and so many at a time.

It comes after admission: what is refused is never decoded, and what was let in waits its turn, as a
small file may unfold to 64 MB.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from stepserve.domain.requests import GenerationRequest
from stepserve.engine.loop.engine import Engine
from stepserve.engine.tracks.listener import tell
from stepserve.engine.tracks.track import as_stepserve_error
from stepserve.pipelines.requests.inputs import InputImages, decode_inputs

DECODERS = 2
"""Images decoded at once: each takes a core and up to 200 MB for a moment."""


class Inputs:
    """The images of one request, before they are decoded and after.

    Args:
        request: brings them along.
        is_fitted: as in `decode_inputs`.
        factor: the same.
    """

    def __init__(self, request: GenerationRequest, is_fitted: bool = True, factor: int = 1) -> None:
        self.request = request
        self._is_fitted, self._factor = is_fitted, factor
        self.are_needed = request.has_files
        self._images: InputImages | None = None if self.are_needed else InputImages()
        self._is_wanted = True
        self._then: list[Callable[[], None]] = []

    @property
    def images(self) -> InputImages:
        """As decoded: what needs them is released afterwards."""
        assert self._images is not None
        return self._images

    def then(self, call: Callable[[], None]) -> None:
        """Call once the images are known to be fine; at once where there are none."""
        if self.are_needed:
            self._then.append(call)
        else:
            call()

    def forget(self) -> None:
        """Nobody needs them any more."""
        self._is_wanted = False
        self._images = None

    def decode(self) -> None:
        """Decode them if somebody still needs them.

        Raises:
            InvalidRequestError: names the field that is wrong.
        """
        if self._is_wanted:
            self._images = decode_inputs(self.request, self._is_fitted, self._factor)
        # It may have been cancelled meanwhile.
        if self._is_wanted:
            for call in self._then:
                tell(self.request.id, call)


class InputDecoder:
    """Decodes for requests that were admitted, first come, first served.

    Args:
        engine: has the work that waits for images.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._threads = ThreadPoolExecutor(DECODERS, thread_name_prefix="decode")

    def submit(self, inputs: Inputs) -> None:
        """Decode when it is their turn; then the work is released, or ended with what is wrong."""
        if inputs.are_needed:
            # Once it has ended, so has the engine, which answers what it holds.
            with contextlib.suppress(RuntimeError):
                self._threads.submit(self._decode, inputs)

    def stop(self) -> None:
        """End; what was not begun is not decoded."""
        self._threads.shutdown(cancel_futures=True)

    def _decode(self, inputs: Inputs) -> None:
        key = inputs.request.key
        try:
            inputs.decode()
        except Exception as error:
            self._engine.fail(key, as_stepserve_error(error, key.id))
        else:
            self._engine.release(key)
