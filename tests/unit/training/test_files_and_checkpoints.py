"""Files are whole or absent; checkpoints of something else are refused with a reason."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from stepserve.private_files import NotPrivateError
from stepserve.training.errors import CheckpointError
from stepserve.training.loop.checkpoint import check_origin, load_checkpoint, save_checkpoint
from stepserve.training.loop.files import fresh_sibling, replace_folder, write_atomically
from stepserve.training.loop.fingerprint import digest_weights


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fail_to_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)


def test_failed_write_keeps_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "folder" / "checkpoint.pt"
    save_checkpoint(path, {"step": 1, "weights": torch.ones(3)})
    fail_to_sync(monkeypatch)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(path, {"step": 2, "weights": torch.zeros(3)})
    state = load_checkpoint(path)
    assert state is not None
    assert state["step"] == 1
    assert names_in(path.parent) == ["checkpoint.pt"]


def test_part_of_a_killed_write_does_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    (tmp_path / "checkpoint.pt.partial").write_bytes(b"half a check")
    assert load_checkpoint(path) is None
    save_checkpoint(path, {"step": 3})
    assert load_checkpoint(path) == {"step": 3}
    assert names_in(tmp_path) == ["checkpoint.pt"]


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 cut off"])
def test_damaged_checkpoint_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt cannot be read.*delete it"):
        load_checkpoint(path)


def test_truncated_checkpoint_is_named(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"weights": torch.ones(1000)})
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(path)


def test_pickled_code_is_not_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "trapped"),)

    torch.save({"step": Trap()}, tmp_path / "checkpoint.pt")
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path / "checkpoint.pt")
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize("open_to_others", ["model.pt", "."])
def test_a_checkpoint_that_others_may_have_written_is_not_read(
    tmp_path: Path, open_to_others: str
) -> None:
    path = tmp_path / "model.pt"
    save_checkpoint(path, {"step": 1})
    assert load_checkpoint(path) == {"step": 1}
    (tmp_path / open_to_others).chmod(0o777)
    with pytest.raises(NotPrivateError, match="other users may write to"):
        load_checkpoint(path)


def test_other_settings_are_listed() -> None:
    state = {"fingerprint": {"loop.batch_size": "64", "vae.image_px": "64", "gone": "1"}}
    wanted = {"loop.batch_size": "32", "vae.image_px": "64"}
    with pytest.raises(CheckpointError, match="batch_size was 64, is now 32") as caught:
        check_origin(Path("checkpoint.pt"), state, wanted)
    assert "image_px" not in str(caught.value)
    assert "gone was 1, is now absent" in str(caught.value)


def test_checkpoint_without_fingerprint_is_believed() -> None:
    check_origin(Path("checkpoint.pt"), {"step": 1}, {"loop.batch_size": "32"})


def test_weights_digest_sees_every_bit() -> None:
    layer = torch.nn.Linear(3, 3)
    before = digest_weights(layer)
    assert digest_weights(layer) == before
    with torch.no_grad():
        layer.weight[1, 1] = torch.nextafter(layer.weight[1, 1], torch.tensor(9.0))
    assert digest_weights(layer) != before


def test_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    for content in ("first", "second"):
        partial = fresh_sibling(folder)
        (partial / "inner").mkdir()
        (partial / "inner" / content).write_text(content)
        replace_folder(partial, folder)
    assert names_in(tmp_path) == ["model"]
    assert names_in(folder / "inner") == ["second"]


def test_leftovers_of_killed_exports_are_thrown_away(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    for leftover in ("model.partial", "model.old"):
        (tmp_path / leftover).mkdir()
        (tmp_path / leftover / "stale").write_text("stale")
    partial = fresh_sibling(folder)
    (partial / "new").write_text("new")
    replace_folder(partial, folder)
    assert names_in(tmp_path) == ["model"]
    assert names_in(folder) == ["new"]


def test_write_makes_missing_folders(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a" / "b" / "c.txt", b"text")
    assert (tmp_path / "a" / "b" / "c.txt").read_bytes() == b"text"
