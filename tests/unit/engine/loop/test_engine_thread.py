from __future__ import annotations

import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from engine_fakes import Ear, Job, Modules, alone, job_track, make_parkable, make_track
from stepserve.domain.errors import (
    ExpiredError,
    GenerationFailedError,
    NotReadyError,
    ServerFullError,
    StoppedError,
)
from stepserve.domain.requests import RequestKey
from stepserve.domain.timings import Timings
from stepserve.engine.loop.batcher import Batcher
from stepserve.engine.loop.engine import IDLE_WAIT_S, Engine, EngineOptions

PATIENCE_S = 20.0


class WaitingEar(Ear):
    """A listener that a test can wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.heard = threading.Event()
        self.begun = threading.Event()

    def started(self) -> None:
        super().started()
        self.begun.set()

    def finished(self, result: Any, timings: Timings) -> None:
        super().finished(result, timings)
        self.heard.set()

    def failed(self, error: BaseException, timings: Timings) -> None:
        super().failed(error, timings)
        self.heard.set()

    def wait(self) -> WaitingEar:
        assert self.heard.wait(PATIENCE_S), f"never answered: {self.news}"
        return self


class LifeClock:
    """Stands still, and tells when the engine looks at it."""

    def __init__(self) -> None:
        self.now_s, self.read = 100.0, threading.Event()

    def __call__(self) -> float:
        if threading.current_thread().name == "engine":
            self.read.set()
        return self.now_s


class Gate:
    """Work that holds the engine thread until the test opens it."""

    def __init__(self) -> None:
        self.entered, self.opened = threading.Event(), threading.Event()

    def run(self) -> str:
        self.entered.set()
        assert self.opened.wait(PATIENCE_S)
        return "through"


@pytest.fixture
def modules() -> Modules:
    return Modules()


@pytest.fixture
def engines() -> Iterator[Callable[..., Engine]]:
    made: list[Engine] = []

    def make(
        started: bool = True,
        clock: Callable[[], float] = time.perf_counter,
        idle_wait_s: float = IDLE_WAIT_S,
        **options: Any,
    ) -> Engine:
        engine = Engine(EngineOptions(**options), clock=clock, idle_wait_s=idle_wait_s)
        made.append(engine)
        if started:
            engine.start()
        return engine

    yield make
    for engine in made:
        engine.stop()


def submit(engine: Engine, modules: Modules, job: Job) -> WaitingEar:
    ear = WaitingEar()
    engine.submit(job_track(modules, job, ear))
    return ear


def test_work_is_done_as_if_alone(engines: Callable[..., Engine], modules: Modules) -> None:
    engine = engines()
    jobs = [Job(seed=seed, steps=3 + seed) for seed in range(6)]
    ears = [submit(engine, modules, job) for job in jobs]
    for ear, job in zip(ears, jobs, strict=True):
        assert ear.wait().news == ["accepted", "started", "finished"]
        assert torch.equal(ear.result, alone(job))


def test_accepted_is_heard_before_started_even_if_the_engine_is_quicker(
    engines: Callable[..., Engine], modules: Modules
) -> None:
    engine = engines()

    class SlowEar(WaitingEar):
        def accepted(self, position: int, expected_s: float) -> None:
            for _ in range(3):
                # So many times the engine has looked for work, and ticked.
                engine.call(lambda: None)
            assert not self.begun.is_set()
            super().accepted(position, expected_s)

    ear = SlowEar()
    engine.submit(job_track(modules, Job(seed=1), ear))
    assert ear.wait().news == ["accepted", "started", "finished"]


def test_position_counts_those_ahead(engines: Callable[..., Engine], modules: Modules) -> None:
    engine = engines(started=False)
    assert [engine.submit(job_track(modules, Job(seed=s), Ear())) for s in range(3)] == [0, 1, 2]
    assert engine.load().requests == engine.load().images == 3


def test_the_caller_is_told_when_to_expect_it(
    engines: Callable[..., Engine], modules: Modules
) -> None:
    engine = engines(started=False)
    ears = [Ear() for _ in range(3)]
    for seed, ear in enumerate(ears):
        engine.submit(job_track(modules, Job(seed=seed, steps=10), ear))
    expected_s = [ear.expected_s for ear in ears]
    assert all(seconds is not None and seconds > 0 for seconds in expected_s)
    assert engine.load().backlog_s > 0


def test_rows_may_be_limited_while_it_runs(
    engines: Callable[..., Engine], modules: Modules
) -> None:
    engine = engines(max_rows=8)
    for rows, limit in ((4, 4), (100, 8)):
        engine.limit_rows(rows)
        submit(engine, modules, Job(seed=rows)).wait()
        assert engine.row_limit == limit


def test_an_engine_drops_what_expired(engines: Callable[..., Engine], modules: Modules) -> None:
    ear = WaitingEar()
    track = replace(job_track(modules, Job(seed=1, steps=10**6), ear), deadline_s=0.05)
    engine = engines()
    engine.submit(track)
    assert isinstance(ear.wait().error, ExpiredError)
    assert engine.load().requests == 0


def test_grad_is_disabled_in_tracks(engines: Callable[..., Engine], modules: Modules) -> None:
    engine = engines()
    ear = WaitingEar()
    engine.submit(make_track(torch.is_grad_enabled, ear=ear))
    assert ear.wait().result is False
    submit(engine, modules, Job(seed=1)).wait()
    assert modules.denoiser.grad_enabled == {False}
    assert torch.is_grad_enabled()


def test_a_full_server_refuses_and_says_when_to_come_back(
    engines: Callable[..., Engine], modules: Modules
) -> None:
    engine = engines(max_pending_images=3)
    gate, ear = Gate(), WaitingEar()
    engine.submit(make_track(gate.run, name="gate", images=2, ear=ear))
    assert gate.entered.wait(PATIENCE_S)
    accepted = submit(engine, modules, Job(seed=1))
    refused = Ear()
    with pytest.raises(ServerFullError, match="3 of 3 images pending") as full:
        engine.submit(job_track(modules, Job(seed=2), refused))
    assert full.value.retry_after_s >= 1
    assert refused.news == []
    gate.opened.set()
    ear.wait()
    accepted.wait()
    assert ear.result == "through"


class NextOne(WaitingEar):
    """Sends another piece of work the moment it hears the end of the one before."""

    def __init__(self, send: Callable[[], object]) -> None:
        super().__init__()
        self.send = send

    def finished(self, result: Any, timings: Timings) -> None:
        self.send()
        super().finished(result, timings)


def test_who_was_told_of_an_end_may_send_the_next_at_once(
    engines: Callable[..., Engine], modules: Modules
) -> None:
    """An answered request takes no place any more, even if the engine has yet to forget it."""
    engine, last = engines(max_pending_images=1), WaitingEar()
    first = NextOne(lambda: engine.submit(job_track(modules, Job(seed=2), last)))
    engine.submit(job_track(modules, Job(seed=1), first))
    first.wait()
    last.wait()
    assert last.news[-1] == "finished"


def test_stopping_with_time_to_drain_finishes_what_was_accepted(
    engines: Callable[..., Engine], modules: Modules
) -> None:
    engine = engines(max_rows=4)
    ears = [submit(engine, modules, Job(seed=seed, steps=20)) for seed in range(6)]
    engine.stop(drain_s=PATIENCE_S)
    assert [ear.ends for ear in ears] == [["finished"]] * 6
    assert engine.silent_s() == float("inf")


def await_refusal(engine: Engine, modules: Modules) -> NotReadyError:
    """Submit until the engine takes no more: `stop` was called on another thread just now."""
    while True:
        try:
            submit(engine, modules, Job(seed=1))
        except NotReadyError as error:
            return error
        except ServerFullError:
            os.sched_yield()


def test_while_draining_new_work_is_refused(
    engines: Callable[..., Engine], modules: Modules
) -> None:
    engine = engines()
    gate, ear = Gate(), WaitingEar()
    engine.submit(make_track(gate.run, ear=ear))
    assert gate.entered.wait(PATIENCE_S)
    stopping = threading.Thread(target=engine.stop, args=(PATIENCE_S,))
    stopping.start()
    refusal = await_refusal(engine, modules)
    assert "draining" in str(refusal)
    assert refusal.retry_after_s > 0
    gate.opened.set()
    stopping.join(PATIENCE_S)
    assert ear.ends == ["finished"]


def test_stopping_at_once_cancels_the_rest(
    engines: Callable[..., Engine], modules: Modules
) -> None:
    engine = engines(max_rows=4)
    ears = [submit(engine, modules, Job(seed=seed, steps=100_000)) for seed in range(5)]
    assert ears[0].begun.wait(PATIENCE_S)
    engine.stop()
    assert [ear.ends for ear in ears] == [["failed"]] * 5
    assert all(isinstance(ear.error, StoppedError) for ear in ears)
    assert engine.load().requests == 0
    engine.stop()
    engine.cancel(RequestKey("0"))


def test_an_engine_that_never_started_answers_when_it_stops(
    engines: Callable[..., Engine], modules: Modules
) -> None:
    engine = engines(started=False)
    assert engine.silent_s() == float("inf")
    ear = submit(engine, modules, Job(seed=1))
    engine.stop(drain_s=PATIENCE_S)
    assert ear.news == ["accepted", "failed"]
    engine.start()
    with pytest.raises(NotReadyError):
        submit(engine, modules, Job(seed=2))


def test_a_listener_may_stop_and_ask_the_engine(
    engines: Callable[..., Engine], modules: Modules
) -> None:
    engine = engines()

    class Stopping(WaitingEar):
        def accepted(self, position: int, expected_s: float) -> None:
            super().accepted(position, expected_s)
            assert engine.load().requests == 1

        def finished(self, result: Any, timings: Timings) -> None:
            engine.stop()
            super().finished(result, timings)

    ear = Stopping()
    engine.submit(job_track(modules, Job(seed=1), ear))
    ear.wait()
    engine.stop()
    assert ear.news == ["accepted", "started", "finished"]


def test_cancelling_ends_running_queued_and_nothing_else(
    engines: Callable[..., Engine], modules: Modules
) -> None:
    engine = engines(max_rows=2)
    running = submit(engine, modules, Job(seed=1, steps=1_000_000))
    assert running.begun.wait(PATIENCE_S)
    queued = submit(engine, modules, Job(seed=2))
    last = submit(engine, modules, Job(seed=3))
    for request_id in ("nobody", "2", "1", "1"):
        engine.cancel(RequestKey(request_id))
    assert queued.wait().news == ["accepted", "failed"]
    assert running.wait().news == ["accepted", "started", "failed"]
    assert last.wait().ends == ["finished"]
    assert str(running.error) == "request 1 was cancelled"


def test_an_error_of_the_engines_own_is_told_to_everyone_and_survived(
    engines: Callable[..., Engine],
    modules: Modules,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine = engines()
    decide = engine.batcher.scheduler.pick

    def fail_once(busy: Any) -> list[Any]:
        monkeypatch.setattr(engine.batcher.scheduler, "pick", decide)
        raise LookupError("a bug")

    monkeypatch.setattr(engine.batcher.scheduler, "pick", fail_once)
    with caplog.at_level(logging.ERROR):
        ear = submit(engine, modules, Job(seed=1)).wait()
    assert isinstance(ear.error, GenerationFailedError)
    assert "LookupError('a bug')" in str(ear.error)
    assert "internal engine error" in caplog.text
    assert submit(engine, modules, Job(seed=2)).wait().ends == ["finished"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_even_a_dying_engine_thread_answers(
    engines: Callable[..., Engine], modules: Modules, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engines(started=False)

    class Dying(BaseException):
        pass

    def die(batcher: Batcher) -> bool:
        raise Dying

    def broken(*args: object) -> None:
        raise LookupError("nothing works any more")

    monkeypatch.setattr(Batcher, "tick", die)
    monkeypatch.setattr(Batcher, "stop_all", broken)
    ear = submit(engine, modules, Job(seed=1))
    engine.start()
    assert ear.wait().news == ["accepted", "failed"]
    with pytest.raises(NotReadyError):
        submit(engine, modules, Job(seed=2))
    assert engine.load().requests == 0


class Crowd:
    """Threads that submit, cancel and fail at random."""

    def __init__(self, engine: Engine, modules: Modules) -> None:
        self.engine, self.modules = engine, modules
        self.accepted: list[WaitingEar] = []
        self.refused: list[WaitingEar] = []
        self.many_submitted, self.some_finished = threading.Event(), threading.Event()

    def live(self, number: int) -> None:
        chance = random.Random(number)
        for index in range(125):
            self.submit(self.random_job(chance, number * 1000 + index))
            for _ in range(chance.choice([0, 0, 1, 2])):
                name = str(number * 1000 + chance.randint(0, index))
                self.engine.cancel(RequestKey(name))
            if index == 100:
                self.many_submitted.set()

    def random_job(self, chance: random.Random, seed: int) -> Job:
        steps = chance.randint(1, 6)
        return Job(
            seed=seed,
            steps=steps,
            rows=chance.randint(1, 4),
            raises_at=chance.choice([None, None, None, None, 0, steps - 1]),
            poisoned_at=chance.choice([None, None, None, None, None, steps - 1]),
        )

    def submit(self, job: Job) -> None:
        ear = CountingEar(self.some_finished)
        try:
            self.engine.submit(job_track(self.modules, job, ear))
        except NotReadyError:
            self.refused.append(ear)
        else:
            self.accepted.append(ear)


class CountingEar(WaitingEar):
    def __init__(self, some_finished: threading.Event) -> None:
        super().__init__()
        self.some_finished = some_finished

    def finished(self, result: Any, timings: Timings) -> None:
        super().finished(result, timings)
        self.some_finished.set()


def test_every_request_of_500_random_lives_is_answered_exactly_once(
    engines: Callable[..., Engine], modules: Modules, caplog: pytest.LogCaptureFixture
) -> None:
    """Four threads submit, cancel and fail at random while a fifth drains and stops the engine."""
    caplog.set_level(logging.CRITICAL, "stepserve.engine.tracks.track")
    crowd = Crowd(engines(max_rows=12, max_pending_images=100_000), modules)
    threads = [threading.Thread(target=crowd.live, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    assert crowd.many_submitted.wait(PATIENCE_S)
    assert crowd.some_finished.wait(PATIENCE_S)
    crowd.engine.stop(drain_s=0.05)
    for thread in threads:
        thread.join(PATIENCE_S)
    assert len(crowd.accepted) + len(crowd.refused) == 500
    assert [ear.news for ear in crowd.accepted if len(ear.ends) != 1] == []
    assert {ear.news[0] for ear in crowd.accepted} == {"accepted"}
    assert {ear.news[-1] for ear in crowd.accepted} == {"finished", "failed"}
    assert [ear.news for ear in crowd.refused if ear.news] == []
    assert crowd.engine.load().requests == 0


def priority_and_threads(into: dict[str, int]) -> None:
    thread = threading.get_native_id()
    into["niceness"] = os.getpriority(os.PRIO_PROCESS, thread)
    into["threads"] = torch.get_num_threads()


def test_niceness_and_threads_belong_to_the_engine_thread(
    engines: Callable[..., Engine],
) -> None:
    before = os.getpriority(os.PRIO_PROCESS, 0)
    found: dict[str, int] = {}
    ear = WaitingEar()
    engine = engines(niceness=3, threads=1)
    engine.submit(make_track(lambda: priority_and_threads(found), ear=ear))
    assert ear.wait().ends == ["finished"]
    assert found == {"niceness": min(before + 3, 19), "threads": 1}
    assert os.getpriority(os.PRIO_PROCESS, 0) == before


def test_a_priority_that_cannot_be_set_is_no_reason_to_stop(
    engines: Callable[..., Engine], modules: Modules, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: int) -> None:
        raise PermissionError("not allowed")

    monkeypatch.setattr(os, "setpriority", refuse)
    assert submit(engines(niceness=3), modules, Job(seed=1)).wait().ends == ["finished"]


def test_an_idle_engine_shows_life_and_uses_next_to_no_time(
    engines: Callable[..., Engine], modules: Modules
) -> None:
    engine = engines(clock=(clock := LifeClock()), idle_wait_s=0.05)
    submit(engine, modules, Job(seed=1)).wait()
    clock.now_s += 1000
    clock.read.clear()
    used_s = time.process_time()
    for _ in range(3):
        assert clock.read.wait(PATIENCE_S)
        clock.read.clear()
    assert time.process_time() - used_s < 0.1
    assert engine.silent_s() == 0


def test_a_function_runs_on_the_engine_thread_between_ticks(engines: Callable[..., Engine]) -> None:
    engine = engines()
    assert engine.call(lambda: threading.current_thread().name) == "engine"
    with pytest.raises(ZeroDivisionError):
        engine.call(lambda: 1 // 0)
    engine.stop()
    with pytest.raises(NotReadyError):
        engine.call(lambda: None)


def test_gradients_go_through_a_resident_module(engines: Callable[..., Engine]) -> None:
    module = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(module.weight, 3.0)
    make_parkable(module, "guide", "forward", stage="denoise")

    def guided() -> float:
        with torch.enable_grad():
            point = torch.ones(1, 1, requires_grad=True)
            (slope,) = torch.autograd.grad(module.forward(point), point)
        # Without gradients it parks like any other.
        return float(slope + module.forward(torch.ones(1, 1)))

    ear = WaitingEar()
    engines(gradients=True).submit(make_track(guided, ear=ear))
    ear.wait()
    assert (ear.error, ear.result) == (None, 6.0)


@pytest.mark.parametrize("gradients", [False, True])
def test_a_pipeline_may_compute_gradients_where_that_is_wanted(
    engines: Callable[..., Engine], gradients: bool
) -> None:
    def steepest() -> float:
        with torch.enable_grad():
            point = torch.tensor(3.0, requires_grad=True)
            (slope,) = torch.autograd.grad(point * point, point)
        return float(slope)

    engine = engines(gradients=gradients)
    assert engine.call(torch.is_inference_mode_enabled) is not gradients
    ear = WaitingEar()
    engine.submit(make_track(steepest, ear=ear))
    ear.wait()
    assert (ear.result == 6.0) is gradients
    assert (ear.error is None) is gradients
