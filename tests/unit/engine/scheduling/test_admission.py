from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stepserve.domain.errors import ServerFullError
from stepserve.engine.scheduling.admission import MINIMUM_RETRY_S, Ending, Load, check_room, load_of

endings = st.lists(st.builds(Ending, st.floats(0, 1e6), st.integers(1, 8)), min_size=1, max_size=20)


def test_load_sums_up_what_is_in_flight() -> None:
    assert load_of([Ending(3.0, 2), Ending(5.0, 1), Ending(4.0, 4)]) == Load(3, 7, 5.0)
    assert load_of([]) == Load(0, 0, 0.0)


@given(images=st.integers(1, 1000), limit=st.integers(1, 10))
def test_an_empty_server_takes_any_request(images: int, limit: int) -> None:
    check_room([], images, limit)


def test_images_up_to_the_limit_get_in() -> None:
    in_flight = [Ending(1.0, 2)] * 3
    check_room(in_flight, 2, limit=8)
    with pytest.raises(ServerFullError, match="6 of 8 images pending"):
        check_room(in_flight, 3, limit=8)


@pytest.mark.parametrize(("images", "retry_after_s"), [(1, 2.0), (2, 2.0), (3, 7.0), (9, 9.0)])
def test_retry_after_is_when_there_should_be_room(images: int, retry_after_s: float) -> None:
    with pytest.raises(ServerFullError) as refused:
        check_room([Ending(9.0, 1), Ending(2.0, 2), Ending(7.0, 1)], images, limit=4)
    assert refused.value.retry_after_s == retry_after_s


@given(in_flight=endings, images=st.integers(1, 8))
def test_once_those_have_ended_the_request_is_let_in(in_flight: list[Ending], images: int) -> None:
    limit = max(sum(item.images for item in in_flight), images)
    with pytest.raises(ServerFullError) as refused:
        check_room([*in_flight, Ending(0.0, limit)], images, limit)
    retry_after_s = refused.value.retry_after_s
    assert retry_after_s >= MINIMUM_RETRY_S
    check_room([item for item in in_flight if item.seconds > retry_after_s], images, limit)
