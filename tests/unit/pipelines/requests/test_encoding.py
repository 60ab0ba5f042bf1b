"""Files are made one after another, and what waits for it is counted."""

from __future__ import annotations

from queue import SimpleQueue
from threading import Event

import pytest
from stepserve.domain.errors import ServerFullError
from stepserve.pipelines.requests.encoding import ImageEncoder, Telling


def test_as_many_images_as_may_wait_keep_new_requests_out() -> None:
    encoder, go = ImageEncoder(2), Event()

    def encode() -> Telling:
        go.wait()
        return lambda: None

    encoder.submit(2, encode)
    with pytest.raises(ServerFullError, match=r"2 finished images wait .* the limit is 2"):
        encoder.check_room()
    go.set()
    encoder.shutdown()
    encoder.check_room()


def test_whoever_is_told_of_its_images_finds_room_for_the_next() -> None:
    encoder, found = ImageEncoder(1), SimpleQueue[Exception | None]()

    def tell() -> None:
        try:
            encoder.check_room()
        except ServerFullError as error:
            found.put(error)
        else:
            found.put(None)

    encoder.submit(1, lambda: tell)
    assert found.get(timeout=10) is None
    encoder.shutdown()


def test_images_that_cannot_be_encoded_wait_no_longer() -> None:
    encoder = ImageEncoder(1)

    def fail() -> Telling:
        raise OSError("no file")

    encoder.submit(1, fail)
    encoder.shutdown()
    encoder.check_room()
