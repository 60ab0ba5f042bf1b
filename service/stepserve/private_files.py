"""Files and folders that other users of the machine can neither change nor read.

Temporary folders, shared folders and mounted volumes are open to more users than this one. Others
must not be able to put files of their own where the service reads, nor to read what it writes.

A group that this process belongs to is trusted, as an administrator decides who is in it: volumes
of Kubernetes are given to a service in this way (`fsGroup`).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from stepserve.domain.errors import StepserveError

ROOT = 0
OF_OTHERS = stat.S_IRWXG | stat.S_IRWXO
MOST_LINKS = 40


class NotPrivateError(StepserveError):
    """Other users could change or read what must be this user's alone; the message says why."""


def make_private_folder(path: Path) -> None:
    """Make a folder that nobody else can look into, or see to it that an existing one is that.

    A folder of this user's is closed to all others (mode 0700). One of root's, as volumes are,
    stays as it is.

    Raises:
        NotPrivateError: it belongs to somebody else, or others could put another in its place.
        OSError: it cannot be made.
    """
    check_way(_nearest_folder(path))
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    check_way(path)
    found = path.stat()
    # On a read-only volume nothing could be changed, nor need be.
    if found.st_uid == os.getuid() and found.st_mode & OF_OTHERS:
        path.chmod(stat.S_IMODE(found.st_mode) & ~OF_OTHERS)


def make_own_folder(path: Path) -> None:
    """Make a folder, or see to it that an existing one is this user's or root's to change.

    Raises:
        NotPrivateError: it is somebody else's, or others may write to it.
    """
    path.mkdir(parents=True, exist_ok=True)
    check_own(path)


def check_way(path: Path) -> None:
    """Return if nobody but this user and root decides what is found at a path.

    Raises:
        NotPrivateError: a folder or link on the way belongs to somebody else, or others may write
            to one of the folders.
        OSError: there is nothing at that path.
    """
    path.stat()
    for step in _way(path.absolute(), MOST_LINKS):
        found = step.lstat()
        _require_owner(step, found.st_uid)
        _require_kept(step, found)


def check_own(path: Path) -> None:
    """Return if a file or folder is this user's or root's, and others cannot write to it.

    Raises:
        NotPrivateError: it is not.
        OSError: there is nothing at that path.
    """
    found = path.stat()
    _require_owner(path, found.st_uid)
    _require_kept(path, found)


def write_private_file(path: Path, content: bytes) -> None:
    """Write a new file that only this user can read.

    Raises:
        FileExistsError: there is one, or a link.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)


def read_private_file(path: Path) -> bytes:
    """Read a file that `write_private_file` wrote.

    Raises:
        NotPrivateError: it is a link, belongs to somebody else, or others may write to it.
        FileNotFoundError: there is none.
    """
    try:
        # Opening a pipe would wait for somebody who writes to it.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise NotPrivateError(f"{path} cannot be opened: {error.strerror}") from error
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise NotPrivateError(f"{path} is no file")
        _require_owner(path, found.st_uid)
        _require_kept(path, found)
        return file.read()


def check_not_writable_by_others(path: Path) -> None:
    """Return if others cannot change a file or folder that an operator named, whoever owns it.

    Raises:
        NotPrivateError: they can.
        OSError: there is nothing at that path.
    """
    _require_kept(path, path.stat())


def others_may_read(path: Path) -> bool:
    """Whether other users can read a file."""
    return _others_may(stat.S_IROTH, path.stat())


def _way(path: Path, links_left: int) -> Iterator[Path]:
    """Every folder and link on the way to an absolute path, in the order they are passed."""
    for step in [*reversed(path.parents), path]:
        yield step
        if step.is_symlink() and links_left:
            yield from _way(step.parent / step.readlink(), links_left - 1)


def _nearest_folder(path: Path) -> Path:
    """The path itself, or the nearest one above it that is there."""
    absolute = path.absolute()
    return next(step for step in [absolute, *absolute.parents] if os.path.lexists(step))


def _require_owner(path: Path, owner: int) -> None:
    # Mounted volumes often belong to root.
    if owner not in (os.getuid(), ROOT):
        raise NotPrivateError(
            f"{path} belongs to another user (uid {owner}): choose a folder of your own"
        )


def _others_may(bit: int, found: os.stat_result) -> bool:
    """Whether a mode lets others do what this bit of theirs is for, or a group of strangers."""
    group_is_trusted = found.st_gid in (ROOT, os.getegid(), *os.getgroups())
    return bool(found.st_mode & bit) or bool(found.st_mode & bit << 3 and not group_is_trusted)


def _require_kept(path: Path, found: os.stat_result) -> None:
    is_link = stat.S_ISLNK(found.st_mode)
    if _others_may(stat.S_IWOTH, found) and not is_link and not _is_kept(found):
        raise NotPrivateError(
            f"other users may write to {path} (mode {stat.S_IMODE(found.st_mode):o}): take that "
            "from them (chmod go-w), or choose another place"
        )


def _is_kept(found: os.stat_result) -> bool:
    """Whether others cannot move or remove what this user has in a folder that they may write to.

    Or root gave the folder to a group of this process, as `fsGroup` of Kubernetes does.
    """
    if not stat.S_ISDIR(found.st_mode):
        return False
    is_ours = found.st_gid in (os.getegid(), *os.getgroups()) and found.st_gid != ROOT
    is_given = found.st_uid == ROOT and bool(found.st_mode & stat.S_ISGID) and is_ours
    return bool(found.st_mode & stat.S_ISVTX) or is_given
