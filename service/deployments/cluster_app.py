"""The application for a cluster that somebody else runs, such as KubeRay's.

In a Serve configuration: `import_path: service.deployments.cluster_app:build`, and the settings as
`args`. Environment variables of the head's pod win over them, as they win over a file.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from service.config import Settings, load_settings
from service.deployments.application import build_application
from service.deployments.exposure import check_exposure

ANYWHERE = "0.0.0.0"  # noqa: S104 - where Ray Serve listens in a cluster


def build(args: dict[str, Any]) -> Any:
    """The application that `args` describe.

    Raises:
        ConfigError: a key or a value is wrong.
        OpenToAllError: there are no API keys, and nobody said that anybody may call.
    """
    settings = settings_from(args)
    check_exposure(settings)
    return build_application(settings)


def settings_from(args: dict[str, Any], environ: Mapping[str, str] | None = None) -> Settings:
    """The settings in `args` and the environment, checked as a file of them is."""
    http = {"host": ANYWHERE} | (args.get("http") or {})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "serveConfigV2.yaml"
        path.write_text(yaml.safe_dump(args | {"http": http}))
        return load_settings(path, environ)
