"""The secret that links to results are signed with, read before anything is started."""

from __future__ import annotations

from pathlib import Path

from stepserve.api.results.store import StoreUnusableError
from stepserve.config import ResultSettings
from stepserve.private_files import NotPrivateError, check_not_writable_by_others

SHORTEST_SECRET = 16


def with_secret(settings: ResultSettings) -> ResultSettings:
    """Return settings that hold the secret itself, as replicas may not see the file.

    Raises:
        StoreUnusableError: the file cannot be read, others may write to it, or it holds too short
            a secret.
    """
    if settings.secret_file is None:
        return settings
    secret = _read(Path(settings.secret_file))
    return settings.model_copy(update={"secret": secret, "secret_file": None})


def _read(path: Path) -> str:
    try:
        check_not_writable_by_others(path)
        secret = path.read_text(encoding="utf-8").strip()
    except (NotPrivateError, OSError, UnicodeDecodeError) as error:
        raise StoreUnusableError(f"cannot read results.secret_file {path}: {error}") from error
    if len(secret) < SHORTEST_SECRET:
        raise StoreUnusableError(
            f"results.secret_file {path} holds {len(secret)} characters; the least is "
            f"{SHORTEST_SECRET}"
        )
    return secret
