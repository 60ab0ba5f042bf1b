"""What other users of a machine could do to a folder or file, and what is refused therefore."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from stepserve.private_files import (
    NotPrivateError,
    check_not_writable_by_others,
    check_own,
    check_way,
    make_private_folder,
    others_may_read,
    read_private_file,
    write_private_file,
)

STRANGER = 12345


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def as_root() -> None:
    if os.getuid() != 0:
        pytest.skip("only root can give files to other users")


def give(path: Path, user: int = STRANGER, group: int = STRANGER) -> None:
    os.chown(path, user, group, follow_symlinks=False)


def test_a_folder_is_made_for_this_user_alone(tmp_path: Path) -> None:
    make_private_folder(tmp_path / "some" / "folder")
    assert mode_of(tmp_path / "some" / "folder") == 0o700


def test_a_folder_of_this_user_is_closed_to_others(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    make_private_folder(tmp_path)
    assert mode_of(tmp_path) == 0o700


@pytest.mark.parametrize("above", [0, 1, 2])
def test_others_that_write_to_a_folder_on_the_way_could_put_their_own_there(
    tmp_path: Path, above: int
) -> None:
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    [folder, *folder.parents][above].chmod(0o777)
    with pytest.raises(NotPrivateError, match="other users may write to"):
        make_private_folder(folder)
    with pytest.raises(NotPrivateError, match=r"mode 777.*chmod go-w"):
        make_private_folder(folder / "not" / "there" / "yet")


def test_a_sticky_folder_keeps_what_this_user_has_there(tmp_path: Path) -> None:
    tmp_path.chmod(0o1777)
    make_private_folder(tmp_path / "folder")
    assert mode_of(tmp_path / "folder") == 0o700


@pytest.mark.usefixtures("as_root")
def test_a_folder_of_another_user_is_refused_and_stays_as_it_is(tmp_path: Path) -> None:
    for folder in (tmp_path / "theirs", tmp_path / "theirs" / "within"):
        (tmp_path / "theirs").mkdir(exist_ok=True)
        give(tmp_path / "theirs")
        with pytest.raises(NotPrivateError, match="theirs belongs to another user"):
            make_private_folder(folder)
    assert mode_of(tmp_path / "theirs") == 0o755
    assert not (tmp_path / "theirs" / "within").exists()


@pytest.mark.usefixtures("as_root")
def test_a_link_of_another_user_is_refused(tmp_path: Path) -> None:
    """They could turn it to another folder of this user's."""
    (tmp_path / "ours").mkdir()
    (tmp_path / "link").symlink_to("ours")
    make_private_folder(tmp_path / "link")
    give(tmp_path / "link")
    with pytest.raises(NotPrivateError, match="link belongs to another user"):
        make_private_folder(tmp_path / "link")


@pytest.mark.usefixtures("as_root")
def test_where_a_link_leads_through_is_looked_at(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "ours").mkdir()
    give(tmp_path / "theirs")
    (tmp_path / "link").symlink_to(tmp_path / "theirs" / "ours")
    with pytest.raises(NotPrivateError, match="theirs belongs to another user"):
        check_way(tmp_path / "link")


def test_links_that_lead_nowhere_are_errors(tmp_path: Path) -> None:
    (tmp_path / "round").symlink_to("round")
    (tmp_path / "nowhere").symlink_to("not-there")
    for link in ("round", "nowhere"):
        with pytest.raises(OSError, match=link):
            make_private_folder(tmp_path / link)


@pytest.mark.usefixtures("as_root")
def test_a_group_of_strangers_is_not_let_write(tmp_path: Path) -> None:
    tmp_path.chmod(0o775)
    os.chown(tmp_path, 0, STRANGER)
    with pytest.raises(NotPrivateError, match="other users may write to"):
        check_way(tmp_path)


@pytest.mark.usefixtures("as_root")
@pytest.mark.parametrize("mode", [0o2775, 0o2777])
def test_a_volume_that_root_gave_to_a_group_of_ours_is_used_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int
) -> None:
    """`fsGroup` of Kubernetes: 2775 for most volumes, 2777 for `emptyDir`."""
    volume = tmp_path / "volume"
    volume.mkdir()
    os.chown(volume, 0, STRANGER)
    volume.chmod(mode)
    with pytest.raises(NotPrivateError):
        check_way(volume)
    # As the service's own user sees it: its way there is this user's.
    monkeypatch.setattr(os, "getgroups", lambda: [STRANGER])
    check_way(volume)
    write_private_file(volume / "file", b"x")
    assert read_private_file(volume / "file") == b"x"
    assert mode_of(volume) == mode


def test_files_are_for_this_user_alone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_private_file(path, b"content")
    assert mode_of(path) == 0o600
    assert read_private_file(path) == b"content"
    assert not others_may_read(path)
    path.chmod(0o604)
    assert others_may_read(path)


def test_nothing_is_written_through_a_link_or_over_a_file(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "target")
    (tmp_path / "file").write_bytes(b"before")
    for name in ("link", "file"):
        with pytest.raises(FileExistsError):
            write_private_file(tmp_path / name, b"x")
    assert not (tmp_path / "target").exists()
    assert (tmp_path / "file").read_bytes() == b"before"


def test_what_others_may_have_written_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_private_file(path, b"content")
    (tmp_path / "link").symlink_to(path)
    os.mkfifo(tmp_path / "pipe")
    for name, reason in (("link", "cannot be opened"), ("pipe", "is no file")):
        with pytest.raises(NotPrivateError, match=reason):
            read_private_file(tmp_path / name)
    path.chmod(0o606)
    with pytest.raises(NotPrivateError, match="other users may write to"):
        read_private_file(path)
    with pytest.raises(NotPrivateError, match="other users may write to"):
        check_not_writable_by_others(path)
    with pytest.raises(FileNotFoundError):
        read_private_file(tmp_path / "not-there")


@pytest.mark.usefixtures("as_root")
def test_a_file_of_another_user_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_private_file(path, b"theirs")
    give(path)
    for check in (read_private_file, check_own):
        with pytest.raises(NotPrivateError, match="belongs to another user"):
            check(path)
    # A file that an operator named may be another administrator's.
    check_not_writable_by_others(path)
