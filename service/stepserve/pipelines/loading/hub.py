"""Models that lie on a Hugging Face hub, at one commit that never changes."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Sequence
from pathlib import Path

from diffusers import DiffusionPipeline
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError

from stepserve.models.modular import MODULAR_INDEX, describe_modular
from stepserve.pipelines.errors import ModelLoadError
from stepserve.pipelines.facts.capabilities import MANIFEST
from stepserve.pipelines.facts.trust import PICKLES, SAFE, Trust
from stepserve.pipelines.step_cache.magnitudes import FILE as MAGNITUDES

logger = logging.getLogger(__name__)


def fetch_model(hub_id: str, revision: str, trust: Trust | None = None) -> Path:
    """The folder of a pipeline of the hub, downloaded unless it is in the cache already.

    Only the files that the pipeline needs are fetched, of weights the safetensors (unless `trust`
    allows pickle). Where the cache is, which hub is asked and with what token is told to
    huggingface_hub by its own variables: HF_HOME, HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE.

    Args:
        hub_id: `owner/name`.
        revision: a whole commit hash.

    Raises:
        ModelLoadError: it is not there, may not be read, or the hub cannot be reached.
    """
    trust = trust or Trust()
    began_s = time.monotonic()
    logger.info("fetching %s at %s", hub_id, revision)
    try:
        folder = DiffusionPipeline.download(
            hub_id,
            revision=revision,
            # None: safetensors where there are any.
            use_safetensors=None if trust.pickle else True,
            trust_remote_code=trust.remote_code,
        )
        for name in (MANIFEST, MAGNITUDES):
            with contextlib.suppress(EntryNotFoundError):
                hf_hub_download(hub_id, name, revision=revision)
    except Exception as error:
        if refusal := _modular_refusal(hub_id, revision):
            raise ModelLoadError(f"{hub_id} at {revision}: {refusal}", refusal) from error
        # Whatever the hub's client, diffusers and the network raise.
        raise _not_fetched(hub_id, revision, error) from error
    logger.info("%s is in %s after %.1f s", hub_id, folder, time.monotonic() - began_s)
    return Path(folder)


def fetch_files(hub_id: str, revision: str, patterns: Sequence[str]) -> Path:
    """The folder with those files of a hub's repository, of which the others are left there.

    Args:
        hub_id: `owner/name`.
        revision: a whole commit hash.
        patterns: of the names of files.

    Raises:
        ModelLoadError: it is not there, may not be read, or the hub cannot be reached.
    """
    logger.info("fetching of %s at %s: %s", hub_id, revision, ", ".join(patterns))
    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=[*patterns]))
    except Exception as error:
        # Whatever the hub's client and the network raise.
        raise _not_fetched(hub_id, revision, error) from error


def model_files(folder: str, trust: Trust) -> list[str]:
    """Patterns of the files of one model in a folder of a repository."""
    suffixes = (".json", SAFE, *(PICKLES if trust.pickle else ()))
    return [f"{folder}/*{suffix}".lstrip("/") for suffix in suffixes]


def _modular_refusal(hub_id: str, revision: str) -> str | None:
    """Why it cannot be served, if the hub has a modular pipeline there."""
    try:
        index = hf_hub_download(hub_id, MODULAR_INDEX, revision=revision)
    except Exception:
        # It is none, or whatever kept its other files from being fetched.
        return None
    return describe_modular(Path(index))


def _not_fetched(hub_id: str, revision: str, error: Exception) -> ModelLoadError:
    kind, reason = type(error).__name__, " ".join(str(error).split())
    message = f"{hub_id} at {revision} cannot be fetched: {kind}: {reason}"
    return ModelLoadError(message, f"{hub_id} at {revision} cannot be fetched from its hub")
