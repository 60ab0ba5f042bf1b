"""When a model that could not be loaded is tried again."""

from __future__ import annotations

from pathlib import Path

from stepserve.ray_serve.replica.load_attempts import (
    FIRST_PAUSE_S,
    LONGEST_PAUSE_S,
    LoadAttempts,
    folder_state,
)


class Bench:
    """A folder and a clock that are set by hand."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.folder = 0
        self.attempts = LoadAttempts(lambda: self.folder, lambda: self.now_s)
        self.fail()

    def fail(self, reason: str = "no weights") -> None:
        self.attempts.begin()
        self.attempts.failed(reason)

    def pause_s(self) -> float:
        """Seconds until it is due, to the second."""
        began_s = self.now_s
        while not self.attempts.is_due():
            self.now_s += 1.0
        return self.now_s - began_s


def test_it_says_why_and_when() -> None:
    bench = Bench()
    bench.now_s += 5.0
    assert bench.attempts.failure == (
        "cannot be loaded: no weights; it is tried again in 10 s, or once its folder has changed"
    )
    assert bench.attempts.retry_after_s == FIRST_PAUSE_S - 5.0
    bench.now_s += 60.0
    assert bench.attempts.failure == "cannot be loaded: no weights; it is tried again now"


def test_pauses_grow_up_to_a_limit() -> None:
    bench, pauses_s = Bench(), []
    for _ in range(9):
        pauses_s.append(bench.pause_s())
        bench.fail()
    assert pauses_s[:3] == [FIRST_PAUSE_S, 2 * FIRST_PAUSE_S, 4 * FIRST_PAUSE_S]
    assert pauses_s[-2:] == [LONGEST_PAUSE_S, LONGEST_PAUSE_S]


def test_a_folder_that_changes_is_tried_once_it_has_come_to_rest() -> None:
    bench = Bench()
    assert not bench.attempts.is_due()
    for written in (1, 2, 3):
        bench.folder = written
        assert not bench.attempts.is_due()
    assert bench.attempts.is_due()
    bench.fail()
    assert not bench.attempts.is_due()
    assert bench.pause_s() == FIRST_PAUSE_S


def test_what_changes_while_it_is_tried_is_a_reason_to_try_again() -> None:
    bench = Bench()
    bench.attempts.begin()
    bench.folder = 1
    bench.attempts.failed("a file is missing")
    assert not bench.attempts.is_due()
    assert bench.attempts.is_due()


def test_one_that_was_loaded_has_nothing_to_say() -> None:
    bench = Bench()
    bench.attempts.succeeded()
    assert bench.attempts.failure == ""


def test_the_state_of_a_folder_tells_files_that_come_change_and_go(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    states = [folder_state(folder)]
    (folder / "unet").mkdir(parents=True)
    states.append(folder_state(folder))
    (folder / "unet/weights").write_bytes(b"cut")
    states.append(folder_state(folder))
    (folder / "unet/weights").write_bytes(b"whole")
    states.append(folder_state(folder))
    assert len(set(states)) == 4
    assert folder_state(folder) == states[-1]
    (folder / "link").symlink_to(tmp_path / "nowhere")
    assert folder_state(folder) == folder_state(folder)
    assert folder_state(None) == folder_state(None)
