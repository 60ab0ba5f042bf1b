"""Decoding beside the steps of others: who waits for it, and what becomes of those that end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from engine_fakes import WIDTH, Bench, FakeClock, Job, PoisonedError, alone, make_track
from stepserve.domain.errors import CancelledError
from stepserve.domain.requests import RequestKey
from stepserve.engine.loop.execution import Execution

DECODE_S = 0.2


class TwoQueues:
    """A device whose second queue takes its time; the main one has ended when Python goes on."""

    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock
        self.is_aside = False
        self.log: list[str] = []

    @contextmanager
    def launching(self) -> Iterator[None]:
        self.log.append("launched aside")
        self.is_aside = True
        yield
        self.is_aside = False

    @contextmanager
    def waking(self) -> Iterator[None]:
        self.log.append("woken aside")
        yield

    def rejoin(self) -> None:
        self.log.append("rejoined")

    def start(self, clock: Callable[[], float]) -> Timing:
        return Timing(self, DECODE_S if self.is_aside else 0.0)


class Timing:
    runs_on = True

    def __init__(self, device: TwoQueues, seconds: float) -> None:
        self.device, self.seconds = device, seconds
        self.started_s = device.clock()

    def launched(self) -> None:
        self.ends_s = self.device.clock() + self.seconds

    def has_ended(self) -> bool:
        return self.device.clock() >= self.ends_s

    def wait(self) -> float:
        self.device.clock.now_s = max(self.device.clock(), self.ends_s)
        return self.ends_s - self.started_s


@pytest.fixture
def device() -> TwoQueues:
    return TwoQueues(FakeClock())


@pytest.fixture
def bench(device: TwoQueues) -> Bench:
    execution = Execution(start_timing=device.start, side_stream=device)
    return Bench(execution=execution, clock=device.clock)


def test_others_step_while_one_is_decoded(bench: Bench, device: TwoQueues) -> None:
    short, long = Job(seed=1, steps=2), Job(seed=2, steps=20)
    ears = [bench.add(job) for job in (short, long)]
    while not device.log:
        bench.batcher.tick()
    steps = bench.batcher.scheduler.running[-1].steps_done
    bench.batcher.tick()
    # It is not woken, and the other one goes on.
    assert [track.steps_done for track in bench.batcher.scheduler.running] == [2, steps + 1]
    assert ears[0].ends == []
    bench.run()
    assert bench.ended == ["1", "2"]
    assert device.log == 2 * ["launched aside", "woken aside"]
    for job, ear in zip((short, long), ears, strict=True):
        assert torch.equal(ear.result, alone(job))


def test_with_nothing_else_to_do_it_is_waited_for(bench: Bench, device: TwoQueues) -> None:
    ear = bench.add(Job(seed=1, steps=1))
    bench.run()
    assert ear.ends == ["finished"]
    assert not bench.batcher.tick()
    assert bench.batcher.counters.forward_s > DECODE_S


def test_who_ends_while_it_is_decoded_is_not_woken(bench: Bench, device: TwoQueues) -> None:
    ear = bench.add(Job(seed=1, steps=1))
    while not device.log:
        bench.batcher.tick()
    bench.batcher.stop_track(RequestKey("1"), CancelledError("request 1 was cancelled"))
    assert ear.ends == ["failed"]
    bench.run()
    assert ear.ends == ["failed"]
    assert device.log == ["launched aside"]


def test_a_decoder_that_raises_fails_its_own_request(bench: Bench, device: TwoQueues) -> None:
    spoiled = torch.full((1, WIDTH), float("nan"))
    bad = bench.add_track(make_track(lambda: bench.modules.decoder(spoiled)))
    good = bench.add(Job(seed=2))
    bench.run()
    assert isinstance(bad.error, PoisonedError)
    assert good.ends == ["finished"]


def test_who_goes_on_after_decoding_comes_behind_it(bench: Bench, device: TwoQueues) -> None:
    decode = bench.modules.decoder
    ear = bench.add_track(make_track(lambda: decode(decode(torch.ones(1, WIDTH)))))
    bench.run()
    assert ear.ends == ["finished"]
    there_and_back = ["launched aside", "woken aside"]
    assert device.log == [*there_and_back, "rejoined", *there_and_back]
