"""The applications for a cluster that somebody else runs, such as KubeRay's.

In a Serve configuration there is one for the ingress, of the name `stepserve`, and one for each
model, of the name `stepserve-model-ID`: so models come, change and go without touching the others.

    import_path: stepserve.ray_serve.cluster_app:ingress     args: settings, without `models`
    import_path: stepserve.ray_serve.cluster_app:model       args: `models` with the one model

Environment variables of the head's pod win over `args`, as they win over a file. All applications
of the cluster see them: each takes those of its own models and leaves those of others alone.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from stepserve.config import PREFIX, ConfigError, Settings, as_variable, load_settings
from stepserve.ray_serve.application import ingress_target, model_target
from stepserve.ray_serve.exposure import check_exposure

ANYWHERE = "0.0.0.0"  # noqa: S104 - where Ray Serve listens in a cluster
OF_MODELS = f"{PREFIX}MODELS__"


def ingress(args: dict[str, Any]) -> Any:
    """The application that answers HTTP.

    Raises:
        ConfigError: a key or a value is wrong.
        OpenToAllError: there are no API keys, and nobody said that anybody may call.
    """
    settings = settings_from(args)
    check_exposure(settings)
    return ingress_target(settings).target


def model(args: dict[str, Any]) -> Any:
    """The application that serves the one model in `args`.

    Raises:
        ConfigError: a key or a value is wrong, or there are several models.
    """
    settings = settings_from(args)
    if len(settings.models) != 1:
        raise ConfigError(f"models: {len(settings.models)} in one application, it takes 1")
    return model_target(next(iter(settings.models)), settings).target


def settings_from(args: dict[str, Any], environ: Mapping[str, str] | None = None) -> Settings:
    """The settings in `args` and the environment, checked as a file of them is."""
    http = {"host": ANYWHERE} | (args.get("http") or {})
    # The ingress is told of no model but the default one: it asks Ray Serve which there are.
    default = args.get("default_model")
    models = args.get("models") or ({default: {}} if default else None)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "serveConfigV2.yaml"
        path.write_text(yaml.safe_dump(args | {"http": http, "models": models}))
        return load_settings(path, _variables(os.environ if environ is None else environ, args))


def _variables(environ: Mapping[str, str], args: Mapping[str, Any]) -> dict[str, str]:
    """The variables, without those of models that are not in `args`: others have them."""
    own = tuple(OF_MODELS + as_variable(str(key)) + "__" for key in args.get("models") or {})
    return {
        name: value
        for name, value in environ.items()
        if not name.startswith(OF_MODELS) or name.startswith(own)
    }
