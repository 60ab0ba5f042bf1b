from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.domain.errors import ServerFullError
from service.engine.admission import (
    MINIMUM_RETRY_S,
    Load,
    RemainingWork,
    backlog_s,
    check_room,
)


def test_backlog_is_the_sum_of_what_is_left() -> None:
    work = [RemainingWork(10, 2, 0.01), RemainingWork(0, 8, 0.01), RemainingWork(5, 4, 0.02)]
    assert backlog_s(work) == pytest.approx(0.2 + 0.4)
    assert backlog_s([]) == 0


@given(pictures=st.integers(1, 1000), limit=st.integers(1, 10))
def test_an_empty_server_takes_any_request(pictures: int, limit: int) -> None:
    check_room(Load(0, 0, 0.0), pictures, limit)


def test_pictures_up_to_the_limit_get_in() -> None:
    check_room(Load(3, 6, 9.0), 2, limit=8)
    with pytest.raises(ServerFullError, match="6 pictures are in hand and the limit is 8"):
        check_room(Load(3, 6, 9.0), 3, limit=8)


@given(requests=st.integers(1, 100), backlog=st.floats(0, 1e6))
def test_retry_after_is_a_fair_share_of_the_backlog(requests: int, backlog: float) -> None:
    with pytest.raises(ServerFullError) as refused:
        check_room(Load(requests, requests, backlog), 1, limit=requests)
    assert refused.value.retry_after_s == max(backlog / requests, MINIMUM_RETRY_S)
