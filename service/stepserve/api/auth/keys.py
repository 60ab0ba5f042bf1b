"""API keys: who may call, and how much.

Keys are 256 random bits, so a plain SHA-256 keeps them as safe at rest as a slow hash would: there
is nothing to guess. What is kept is the hash only. Keys that somebody thought up are refused where
they are short, because those can be guessed.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
)

from stepserve.domain.errors import InvalidRequestError, StepserveError
from stepserve.domain.requests import Priority
from stepserve.private_files import (
    NotPrivateError,
    check_not_writable_by_others,
    write_private_file,
)

PREFIX = "sk-stepserve-"
KEY_BYTES = 32
SHORTEST_KEY = 24
"""Characters that a key must have at least, where an operator brings one along."""

HASH_PREFIX = "sha256:"

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
_ENTRY = re.compile(r"([A-Za-z0-9._-]{1,64})=(\S+)")


class KeysUnreadableError(StepserveError):
    """The keys cannot be used as they are written; the message says what is wrong."""


class ApiKey(BaseModel):
    """One key as an operator writes it down.

    `priority` is the most urgent that its requests may ask for. No limit is None.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Name
    sha256: Sha256
    requests_per_minute: Annotated[float, Field(ge=0.001, allow_inf_nan=False)] | None = None
    max_concurrent: Annotated[int, Field(ge=1)] | None = None
    priority: Literal["interactive", "normal", "batch"] = "interactive"

    @property
    def has_limits(self) -> bool:
        """Whether its use must be counted."""
        return self.requests_per_minute is not None or self.max_concurrent is not None

    def text(self) -> str:
        """The key as an entry of a file of keys."""
        return yaml.safe_dump([self.model_dump(exclude_defaults=True)], sort_keys=False)


class KeysFile(BaseModel):
    """A file of keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    keys: Annotated[tuple[ApiKey, ...], BeforeValidator(lambda keys: keys or ())] = ()


@dataclass(frozen=True)
class Caller:
    """Who sent a request: the name of the key, empty for anybody, and what it may do."""

    name: str = ""
    most_urgent: Priority = Priority.INTERACTIVE

    def priority(self, wanted: str | None) -> Priority:
        """The priority of a request that asks for `wanted`.

        Raises:
            InvalidRequestError: the key may not ask for that.
        """
        if wanted is None:
            return max(Priority.NORMAL, self.most_urgent)
        if Priority[wanted.upper()] < self.most_urgent:
            most = self.most_urgent.name.lower()
            raise InvalidRequestError(
                f"priority {wanted!r} is not open to this API key; the most urgent is {most!r}",
                "priority",
            )
        return Priority[wanted.upper()]


ANYBODY = Caller()


class KeyRing:
    """All keys. Without any, everybody may call.

    Raises:
        KeysUnreadableError: two keys have one name, or one key has two names.
    """

    def __init__(self, keys: Iterable[ApiKey] = ()) -> None:
        self.keys = tuple(keys)
        names: dict[str, str] = {}
        for key in self.keys:
            if key.name in names.values():
                raise KeysUnreadableError(f"two API keys are named {key.name!r}")
            other = names.setdefault(key.sha256, key.name)
            if other != key.name:
                raise KeysUnreadableError(f"API keys {other!r} and {key.name!r} are the same")

    def find(self, token: str) -> ApiKey | None:
        """The key that `token` is, or None. Takes as long whichever it is, or if it is none."""
        digest = hash_key(token)
        found = None
        for key in self.keys:
            if hmac.compare_digest(key.sha256, digest):
                found = key
        return found


def caller_of_key(key: ApiKey) -> Caller:
    """Who calls with a key."""
    return Caller(key.name, Priority[key.priority.upper()])


def new_key() -> str:
    """A key that nobody can guess."""
    return PREFIX + secrets.token_urlsafe(KEY_BYTES)


def hash_key(token: str) -> str:
    """What is kept of a key."""
    return hashlib.sha256(token.encode(errors="replace")).hexdigest()


def read_keys(path: Path | None, listed: str | None) -> KeyRing:
    """The keys of a file, and those listed as `name=key` or `name=sha256:hash`, by commas.

    Raises:
        KeysUnreadableError: names the file or entry, and what is wrong with it.
    """
    from_file = () if path is None else _read_file(path).keys
    entries = enumerate((listed or "").split(","))
    return KeyRing([*from_file, *(_read_entry(i, e.strip()) for i, e in entries if e.strip())])


def add_key(path: Path, key: ApiKey) -> None:
    """Add a key to a file, which is made if there is none, readable by its owner alone.

    Readers see the file as it was or as it is then, never a part of it.

    Raises:
        KeysUnreadableError: the file cannot be read or written, others may write to it or to its
            folder, or it holds a key of that name.
    """
    try:
        check_not_writable_by_others(path.parent)
        with _locked(path.parent):
            known = _read_file(path).keys if path.exists() else ()
            _replace(path, _with_key(path, KeyRing([*known, key])))
    except (NotPrivateError, OSError) as error:
        raise KeysUnreadableError(f"cannot write API keys to {path}: {error}") from error


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Two that add a key at once wait for each other, or one key would be lost."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _with_key(path: Path, ring: KeyRing) -> str:
    """The text of the file with the last key of the ring added; comments are kept if possible."""
    text = path.read_text(encoding="utf-8").rstrip() + "\n" if path.exists() else "keys:\n"
    appended = text + ring.keys[-1].text()
    try:
        if KeysFile.model_validate(yaml.safe_load(appended)).keys == ring.keys:
            return appended
    except (yaml.YAMLError, ValidationError):
        pass
    return "keys:\n" + "".join(key.text() for key in ring.keys)


def _replace(path: Path, text: str) -> None:
    mode = path.stat().st_mode & 0o777 if path.exists() else 0o600
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    try:
        write_private_file(partial, text.encode())
        partial.chmod(mode)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _read_file(path: Path) -> KeysFile:
    try:
        check_not_writable_by_others(path)
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        return KeysFile.model_validate(tree or {})
    except (NotPrivateError, OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise KeysUnreadableError(f"cannot read API keys from {path}: {error}") from error
    except ValidationError as error:
        # Without the values: a plain key written in place of a hash must not reach a log.
        problems = [".".join(map(str, e["loc"])) + f": {e['msg']}" for e in error.errors()]
        raise KeysUnreadableError(f"wrong API keys in {path}: {'; '.join(problems)}") from None


def _read_entry(index: int, entry: str) -> ApiKey:
    parts = _ENTRY.fullmatch(entry)
    if parts is None:
        raise KeysUnreadableError(f"API key {index} of the list must be written as name=key")
    name, key = parts.groups()
    try:
        return ApiKey(name=name, sha256=_digest_of(name, key))
    except ValidationError:
        raise KeysUnreadableError(f"API key {name!r} of the list has a wrong hash") from None


def _digest_of(name: str, key: str) -> str:
    if key.startswith(HASH_PREFIX):
        return key.removeprefix(HASH_PREFIX)
    if len(key) < SHORTEST_KEY:
        raise KeysUnreadableError(
            f"API key {name!r} of the list is {len(key)} characters long and could be guessed; the "
            f"least is {SHORTEST_KEY} ('stepserve keys create' makes good ones)"
        )
    return hash_key(key)
