"""What load tests with users are made of, without locust."""

from __future__ import annotations

import base64
import io
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from loadtests.load.response_checks import complaint_about_images, read_events
from loadtests.load.shapes import SHAPES, users_at


def encoded(width: int = 64, height: int = 64, cut: int = 0) -> str:
    file = io.BytesIO()
    Image.effect_noise((width, height), 50).save(file, "PNG")
    return base64.b64encode(file.getvalue()[: len(file.getvalue()) - cut]).decode()


@given(st.sampled_from(sorted(SHAPES)), st.floats(0, 0.999), st.integers(1, 1000))
def test_there_is_always_a_user_and_never_too_many(shape, passed, most_users) -> None:
    users = users_at(shape, 60 * passed, 60, most_users)
    assert users is not None
    assert 1 <= users <= most_users


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_a_test_ends(shape: str) -> None:
    assert users_at(shape, 60, 60, 10) is None


def test_shapes_are_what_they_are_called() -> None:
    def users(shape: str) -> list[int | None]:
        return [users_at(shape, seconds, 60, 100) for seconds in (0, 5, 15, 30, 45, 59)]

    assert users("steady") == [100] * 6
    assert users("spike") == [20, 20, 20, 100, 20, 20]
    assert users("soak") == [1, 83, 100, 100, 100, 100]
    assert users("ramp") == [1, 8, 25, 50, 75, 98]


BODY: dict[str, Any] = {"size": "64x64", "seed": 7, "n": 2}


def images(*seeds: int, **kwargs: int) -> dict[str, Any]:
    return {"data": [{"b64_json": encoded(**kwargs), "seed": seed} for seed in seeds]}


@pytest.mark.parametrize(
    ("response", "complaint"),
    [
        (images(7, 8), ""),
        (images(7), "2 images"),
        ({}, "2 images"),
        (images(8, 9), "seeds"),
        (images(7, 8, width=48), "48x64"),
        (images(7, 8, cut=400), "decoded"),
        ({"data": [{"seed": 7}, {"seed": 8}]}, "decoded"),
        ({"data": [{"b64_json": "!", "seed": 7}, {"b64_json": "!", "seed": 8}]}, "decoded"),
    ],
)
def test_wrong_answers_are_noticed(response: dict[str, Any], complaint: str) -> None:
    found = complaint_about_images(response, BODY)
    assert complaint in found
    assert bool(found) == bool(complaint)


def test_events_are_read_as_they_come() -> None:
    lines = iter(
        [b": keep-alive", b"", b"event: one", b'data: {"a": 1}', b"", b'data: {"b":', b"data: 2}"]
    )
    events = read_events(lines)
    assert next(events) == ("one", {"a": 1})
    assert next(lines) == b'data: {"b":'
    assert list(read_events(iter([b"event: x", b'data: {"b":', b"data: 2}"]))) == [("x", {"b": 2})]
