from __future__ import annotations

import resource

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stepserve.api.http.open_connections import (
    RESERVED_DESCRIPTORS,
    OpenConnections,
    affordable_connections,
)


class Fake:
    def __init__(self, address: str = "a") -> None:
        self.address = address
        self.gave_way = False

    def give_way(self) -> None:
        self.gave_way = True


def test_whose_client_is_awaited_longest_gives_way():
    connections = OpenConnections(3)
    first, second, third = Fake(), Fake(), Fake()
    for connection in (first, second, third):
        assert connections.add(connection)
    connections.work(first)
    connections.await_client(second)

    assert connections.add(Fake())
    assert [c.gave_way for c in (first, second, third)] == [False, False, True]


def test_the_address_with_most_gives_way_and_no_other():
    connections = OpenConnections(5)
    others = [Fake("b"), Fake("c")]
    flood = [Fake() for _ in range(20)]
    for connection in (*others, *flood):
        assert connections.add(connection)
        for known in flood:
            if known.gave_way:
                connections.remove(known)

    assert [c.gave_way for c in others] == [False, False]
    assert [c.gave_way for c in flood] == [True] * 17 + [False] * 3


def test_one_that_ended_its_work_is_awaited_from_then_on():
    connections = OpenConnections(2)
    first, second = Fake(), Fake()
    connections.add(first)
    connections.add(second)
    connections.work(first)
    connections.await_client(first)
    connections.add(Fake())

    assert (first.gave_way, second.gave_way) == (False, True)


def test_none_gives_way_while_all_work():
    connections = OpenConnections(1)
    first = Fake()
    connections.add(first)
    connections.work(first)

    assert not connections.add(Fake())
    assert not first.gave_way


@given(st.lists(st.tuples(st.sampled_from(["add", "work", "await", "remove"]), st.integers(0, 9))))
def test_at_most_as_many_as_may_be_once_those_that_gave_way_are_gone(
    steps: list[tuple[str, int]],
):
    connections = OpenConnections(3)
    known = [Fake("ab"[i % 2]) for i in range(10)]
    open_now: set[int] = set()
    for step, i in steps:
        if step == "add" and i not in open_now:
            open_now.add(i)
            if not connections.add(known[i]):
                connections.remove(known[i])
                open_now.discard(i)
        elif i in open_now and step != "add":
            act = {"work": connections.work, "await": connections.await_client}
            act.get(step, connections.remove)(known[i])
            if step == "remove":
                open_now.discard(i)
        for j in [j for j in open_now if known[j].gave_way]:
            connections.remove(known[j])
            open_now.discard(j)
            known[j] = Fake("ab"[j % 2])

        assert len(connections) == len(open_now) <= 3


@pytest.mark.parametrize(
    ("soft", "hard", "raised", "affordable"),
    [
        (1024, 4096, None, 700),
        (1024, resource.RLIM_INFINITY, 1256, 1000),
        (1024, 4096, 1256, 1000),
        (512, 1000, 1000, 744),
        (100, 200, 200, 1),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, None, 1000),
    ],
)
def test_as_many_as_descriptors_allow(
    monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, raised: int | None, affordable: int
):
    limits = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda _, pair: limits.append(pair))
    wanted = 700 if affordable == 700 else 1000

    assert affordable_connections(wanted) == affordable
    assert limits == ([] if raised is None else [(raised, hard)])
    assert RESERVED_DESCRIPTORS == 256
