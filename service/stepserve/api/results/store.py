"""Finished images that are kept for a while, and links that nobody can guess or forge.

A link holds its own expiry and a signature over it, so that any ingress replica can check it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import fsspec
from fsspec.implementations.local import LocalFileSystem

from stepserve.api.results.space import SPARE_BYTES, Trouble, probe, unavailable, write_whole
from stepserve.domain.errors import InvalidRequestError, StepserveError
from stepserve.private_files import (
    NotPrivateError,
    make_private_folder,
    others_may_read,
    read_private_file,
    write_private_file,
)

logger = logging.getLogger(__name__)

ROUTE = "/v1/results"
ENDINGS = {
    "image/png": "png",
    "image/jpeg": "jpg",
    "image/webp": "webp",
    "application/vnd.safetensors": "safetensors",
}
MEDIA_TYPES = {ending: media_type for media_type, ending in ENDINGS.items()}
NAME = re.compile(r"([0-9]{10,12})-[A-Za-z0-9_-]{32}\.(png|jpg|webp|safetensors)", re.ASCII)
"""When it expires (Unix time in seconds), 192 random bits, and what it is."""

SECRET_FILE = "secret"  # noqa: S105 - the name of the file that holds it
SECRET_BYTES = 32
SWEEP_S = 60.0
PARTIAL = ".partial"
# Storage that does not answer in so long holds nobody up any longer.
WRITE_TIMEOUT_S = 60.0
CHECK_TIMEOUT_S = 5.0


class ResultNotFoundError(InvalidRequestError):
    """No such result, or it is gone."""


class LinkExpiredError(InvalidRequestError):
    """The link has expired; the same request makes the image again."""


class WrongSignatureError(InvalidRequestError):
    """The link was not made by this server, or was changed since."""


class StoreUnusableError(StepserveError):
    """Results cannot be kept where the settings say; the message says why."""


class ResultStore:
    """Keeps images in a folder, or under any other address that fsspec knows.

    Args:
        address: a local folder, or such as `s3://bucket/prefix`.
        expires_s: how long results are kept, in seconds.
        secret: what links are signed with; every replica must have the same.
        clock: Unix time in seconds.
    """

    def __init__(
        self,
        address: str,
        expires_s: float,
        secret: bytes,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._files, self._root = _open(address)
        self._is_local = isinstance(self._files, LocalFileSystem)
        self._expires_s = expires_s
        self._secret = secret
        self._clock = clock
        self._trouble = Trouble(time.monotonic)

    async def check(self, size_bytes: int = SPARE_BYTES) -> None:
        """Return if files of so many bytes can be kept now.

        A folder is tried, and other storage after it has refused something.

        Raises:
            ResultsUnavailableError: they cannot.
        """
        if self._is_local:
            await self._try(CHECK_TIMEOUT_S, self._probe, size_bytes)
        elif (recent := self._trouble.recent) is not None:
            raise recent
        elif self._trouble.unsolved:
            await self._try(CHECK_TIMEOUT_S, self._probe_remote)

    async def put(self, data: bytes, media_type: str) -> str:
        """Keep a file and return the path of its link, with its expiry and signature.

        Raises:
            ResultsUnavailableError: it cannot be kept.
        """
        name = self._new_name(ENDINGS[media_type])
        await self._try(WRITE_TIMEOUT_S, self._write, name, data)
        return f"{ROUTE}/{name}?{urlencode({'signature': self.sign(name)})}"

    async def get(self, name: str, signature: str) -> tuple[bytes, str, int]:
        """Return a file, its media type, and for how many seconds more it is kept.

        Raises:
            WrongSignatureError: the link is not one of ours.
            LinkExpiredError: it was.
            ResultNotFoundError: there is no such file.
            ResultsUnavailableError: it cannot be read.
        """
        parts = NAME.fullmatch(name)
        wanted, given = self.sign(name).encode(), signature.encode(errors="replace")
        if parts is None or not hmac.compare_digest(wanted, given):
            raise WrongSignatureError("the signature of this link is wrong", "signature")
        left_s = int(parts[1]) - int(self._clock())
        if left_s <= 0:
            raise LinkExpiredError("this link has expired; send the request again")
        try:
            data = await asyncio.to_thread(self._read, name)
        except (FileNotFoundError, NotPrivateError) as error:
            raise ResultNotFoundError("this result is gone; send the request again") from error
        except OSError as error:
            raise unavailable(error) from error
        return data, MEDIA_TYPES[parts[2]], left_s

    async def _try(self, within_s: float, use: Callable[..., None], *arguments: Any) -> None:
        try:
            await asyncio.wait_for(asyncio.to_thread(use, *arguments), within_s)
        except Exception as error:
            # Whatever clients of object stores raise.
            raise self._trouble.note(error) from error
        self._trouble.clear()

    def _new_name(self, ending: str) -> str:
        expires = int(self._clock() + self._expires_s)
        return f"{expires}-{secrets.token_urlsafe(24)}.{ending}"

    def sign(self, name: str) -> str:
        """The signature of a name, which holds the expiry."""
        return hmac.new(self._secret, name.encode(errors="replace"), hashlib.sha256).hexdigest()

    async def sweep(self) -> int:
        """Remove what has expired, and return how many files that were."""
        return await asyncio.to_thread(self._sweep)

    async def sweep_for_ever(self) -> None:
        """Remove what expires, once a minute. Several replicas may do so at once.

        A store that cannot be reached for a while is swept again when it can.
        """
        while True:
            try:
                await self.sweep()
            except Exception as error:
                logger.warning("expired results could not be removed: %s", error)
            await asyncio.sleep(SWEEP_S)

    def _write(self, name: str, data: bytes) -> None:
        if not self._is_local:
            # Object stores show a file when it is whole.
            self._files.pipe_file(self._path(name), data)
            return
        path = Path(self._path(name))
        # Whoever cleans temporary folders may have removed it, and somebody else made another.
        make_private_folder(path.parent)
        partial = path.with_name(name + PARTIAL)
        write_whole(partial, path, lambda partial: write_private_file(partial, data))

    def _probe(self, size_bytes: int) -> None:
        # Named as a result, so that the sweep finds it if it should stay behind.
        partial = Path(self._path(self._new_name("png") + PARTIAL))
        make_private_folder(partial.parent)
        probe(partial, size_bytes)

    def _probe_remote(self) -> None:
        path = self._path(self._new_name("png") + PARTIAL)
        self._files.pipe_file(path, b"")
        self._files.rm_file(path)

    def _read(self, name: str) -> bytes:
        if self._is_local:
            return read_private_file(Path(self._path(name)))
        data: bytes = self._files.cat_file(self._path(name))
        return data

    def _sweep(self) -> int:
        try:
            paths = self._files.ls(self._root, detail=False)
        except FileNotFoundError:
            return 0
        removed = expired((path.rsplit("/", 1)[-1] for path in paths), self._clock())
        for name in removed:
            # Another replica may be faster.
            with contextlib.suppress(FileNotFoundError):
                self._files.rm_file(self._path(name))
        return len(removed)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"


def expired(names: Iterable[str], now: float) -> list[str]:
    """Return those of the names that are results and have expired."""
    return [
        name
        for name in names
        if (parts := NAME.fullmatch(name.removesuffix(PARTIAL))) and int(parts[1]) <= now
    ]


def open_store(address: str, expires_s: float, secret: str | None = None) -> ResultStore:
    """A store as the settings describe it.

    A local folder is made where there is none. It and the images in it are for its owner alone.
    Without a secret one is made in the folder and shared by all replicas that see the folder.

    Raises:
        StoreUnusableError: there is no secret and no local folder to keep one in, the folder or the
            secret in it belongs to another user or is open to others, or the address is of a kind
            that is not known.
    """
    try:
        files, root = _open(address)
    except (ImportError, ValueError) as error:
        raise StoreUnusableError(f"results cannot be kept at {address!r}: {error}") from error
    if isinstance(files, LocalFileSystem):
        return ResultStore(address, expires_s, _local_secret(Path(root), secret))
    if not secret:
        raise StoreUnusableError(
            f"results at {address!r} need results.secret or results.secret_file: all replicas must "
            "sign alike"
        )
    return ResultStore(address, expires_s, secret.encode())


def _local_secret(folder: Path, secret: str | None) -> bytes:
    """The secret for a folder, which is made and seen to be this user's alone."""
    try:
        make_private_folder(folder)
        return secret.encode() if secret else _shared_secret(folder)
    except (NotPrivateError, OSError) as error:
        raise StoreUnusableError(
            f"results cannot be kept in {folder}: {error} (results.address)"
        ) from error


def _open(address: str) -> tuple[Any, str]:
    """The file system of an address, and the path in it."""
    # A remembered listing would hide from the sweep what other replicas have written since.
    files, root = fsspec.url_to_fs(address, use_listings_cache=False)
    return files, root


def _shared_secret(folder: Path) -> bytes:
    path = folder / SECRET_FILE
    # Nothing is written, so that an ingress is replaced where the folder is full as well.
    if not path.exists():
        _make_secret(path)
    secret = read_private_file(path)
    if others_may_read(path):
        raise NotPrivateError(f"other users may read {path}: remove it, and a new one is made")
    return secret


def _make_secret(path: Path) -> None:
    partial = path.with_name(f"{SECRET_FILE}.{secrets.token_hex(8)}")
    write_private_file(partial, secrets.token_bytes(SECRET_BYTES))
    # Whoever links first has made the secret of all.
    with contextlib.suppress(FileExistsError):
        os.link(partial, path)
    partial.unlink()
