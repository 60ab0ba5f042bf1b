"""A training that is killed, interrupted or run again ends with the same bits."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_training import STEPS, build_trainer, final_weights
from stepserve.training.errors import CheckpointError, TrainingDivergedError
from stepserve.training.loop.checkpoint import load_checkpoint
from stepserve.training.loop.interrupts import StopSignals

PROGRAM = Path(__file__).with_name("small_training.py")


def run_straight(folder: Path) -> list[torch.Tensor]:
    trainer = build_trainer(folder)
    trainer.run()
    return final_weights(trainer)


def assert_same_bits(made: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(made, wanted, strict=True))


def raw_after(steps: int, folder: Path) -> list[torch.Tensor]:
    trainer = build_trainer(folder)
    for _ in range(steps):
        trainer._train_step()
    return final_weights(trainer)


def average_after(steps: int, folder: Path) -> list[torch.Tensor]:
    trainer = build_trainer(folder)
    for _ in range(steps):
        trainer._train_step()
    return trainer.average


def stored_step(folder: Path) -> int:
    state = load_checkpoint(folder / "checkpoint.pt")
    return 0 if state is None else int(state["step"])


def kill_after_some_steps(folder: Path, chance: random.Random) -> int:
    """Start the program, kill it at some moment of its life, and tell its status."""
    command = [sys.executable, str(PROGRAM), str(folder)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        for _ in range(chance.randint(1, 10)):
            assert process.stdout.readline()
        process.kill()
    return process.returncode


def test_killed_and_resumed_equals_straight(tmp_path: Path) -> None:
    chance = random.Random()
    statuses = [kill_after_some_steps(tmp_path / "killed", chance) for _ in range(2)]
    assert statuses[0] == -signal.SIGKILL
    assert 0 < stored_step(tmp_path / "killed") <= STEPS
    resumed = build_trainer(tmp_path / "killed")
    resumed.run()
    assert_same_bits(final_weights(resumed), run_straight(tmp_path / "straight"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stop_signal_saves_between_two_steps(tmp_path: Path, number: signal.Signals) -> None:
    def stop(step: int) -> None:
        if step == 30:
            # Twice at once, as `timeout` sends it to a process and to its group.
            signal.raise_signal(number)
            signal.raise_signal(number)

    before = signal.getsignal(number)
    stopped = build_trainer(tmp_path / "stopped", on_sample=stop)
    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit):
        stopped.run()
    assert signal.getsignal(number) is before
    assert stored_step(tmp_path / "stopped") == 30
    resumed = build_trainer(tmp_path / "stopped")
    resumed.run()
    assert_same_bits(final_weights(resumed), run_straight(tmp_path / "straight"))


def test_an_impatient_second_signal_interrupts_at_once() -> None:
    with StopSignals(patience_s=0) as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_finished_stage_is_not_run_again(tmp_path: Path) -> None:
    weights = run_straight(tmp_path)
    written = (tmp_path / "checkpoint.pt").stat().st_mtime_ns
    again = build_trainer(tmp_path)
    again.loss = lambda step, generator: pytest.fail("a finished stage was trained")
    again.run()
    assert_same_bits(final_weights(again), weights)
    assert (tmp_path / "checkpoint.pt").stat().st_mtime_ns == written


def test_run_ends_with_average_weights(tmp_path: Path) -> None:
    trainer = build_trainer(tmp_path, steps=50)
    trainer.run()
    state = load_checkpoint(tmp_path / "checkpoint.pt")
    assert state is not None
    assert_same_bits(final_weights(trainer), state["average"])
    assert not trainer.modules.training


def test_samples_see_average_weights_and_leave_no_trace(tmp_path: Path) -> None:
    seen: list[int] = []

    def look(step: int) -> None:
        seen.append(step)
        assert_same_bits(final_weights(trainer), expected[step])
        assert not trainer.modules.training

    expected = {step: average_after(step, tmp_path / str(step)) for step in (10, 20)}
    trainer = build_trainer(tmp_path / "watched", steps=STEPS, on_sample=look)
    for _ in range(20):
        trainer._train_step()
        if trainer.step % 10 == 0:
            trainer._sample()
    assert seen == [10, 20]
    assert_same_bits(final_weights(trainer), raw_after(20, tmp_path / "raw"))


def test_failing_sample_puts_the_weights_back(tmp_path: Path) -> None:
    def fail(step: int) -> None:
        raise OSError("disk full")

    trainer = build_trainer(tmp_path, on_sample=fail)
    with pytest.raises(OSError, match="disk full"):
        trainer.run()
    assert_same_bits(final_weights(trainer), raw_after(10, tmp_path / "straight"))


def test_longer_training_goes_on(tmp_path: Path) -> None:
    build_trainer(tmp_path, steps=20).run()
    longer = build_trainer(tmp_path, steps=30)
    longer.run()
    assert longer.step == 30


def test_checkpoint_beyond_the_last_step_is_refused(tmp_path: Path) -> None:
    build_trainer(tmp_path, steps=30).run()
    with pytest.raises(CheckpointError, match="at step 30, beyond the 20 asked for"):
        build_trainer(tmp_path, steps=20).run()


def test_checkpoint_of_other_hyperparameters_is_refused(tmp_path: Path) -> None:
    build_trainer(tmp_path, steps=5).run()
    with pytest.raises(CheckpointError, match=r"learning_rate was 0\.01, is now 0\.02"):
        build_trainer(tmp_path, steps=5, learning_rate=0.02).run()


def test_old_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    trainer = build_trainer(tmp_path, steps=5)
    trainer.run()
    state = load_checkpoint(tmp_path / "checkpoint.pt")
    assert state is not None
    del state["fingerprint"]
    state["modules"]["hidden.weight"] = torch.zeros(3, 3)
    torch.save(state, tmp_path / "checkpoint.pt")
    with pytest.raises(CheckpointError, match="of another model"):
        build_trainer(tmp_path, steps=5).run()


def test_diverged_training_stops_before_it_spoils_the_checkpoint(tmp_path: Path) -> None:
    build_trainer(tmp_path, steps=10).run()
    trainer = build_trainer(tmp_path, steps=20)
    trainer.loss = lambda step, generator: torch.tensor(float("nan"), requires_grad=True)
    with pytest.raises(TrainingDivergedError, match="the loss is nan at step 10"):
        trainer.run()
    assert stored_step(tmp_path) == 10


def test_loss_falls(tmp_path: Path) -> None:
    trainer = build_trainer(tmp_path)
    first = sum(trainer._train_step() for _ in range(10))
    for _ in range(100):
        trainer._train_step()
    assert sum(trainer._train_step() for _ in range(10)) < 0.5 * first
