"""Clients by other people, run as their users run them: each script of `clients/` tells in JSON."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

SCRIPTS = Path(__file__).parent / "clients"
NPM_PACKAGES = ("openai@6", "ai@6", "@ai-sdk/openai@3", "@ai-sdk/openai-compatible@2")
INSTALL_S = 120
RUN_S = 180
# LiteLLM would ask the internet what models cost.
QUIET = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "NO_PROXY": "*"}


def drawn_image(mode: str = "RGBA") -> bytes:
    """A PNG file of 64 x 64 pixels; with transparency it is a mask, too."""
    buffer = io.BytesIO()
    Image.new(mode, (64, 64)).save(buffer, "PNG")
    return buffer.getvalue()


def install_from_npm(folder: Path) -> Path:
    """Install the clients in JavaScript, or skip the test by name."""
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    command = ["npm", "install", "--no-audit", "--no-fund", "--silent", *NPM_PACKAGES]
    installed = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=INSTALL_S, check=False
    )
    if installed.returncode != 0:
        names = " ".join(NPM_PACKAGES)
        pytest.skip(f"npm cannot install {names}: {installed.stderr.strip()[:200]}")
    return folder


def run_python(script: str, package: str, url: str) -> Any:
    """Run a script that needs a package against the API at `url`, and return what it told."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    return _told([sys.executable, str(SCRIPTS / script)], url)


def run_javascript(script: str, installed: Path, url: str) -> Any:
    """The same with Node. Imports are looked for beside a script, so it is copied there."""
    copied = shutil.copy(SCRIPTS / script, installed)
    return _told(["node", str(copied)], url)


def _told(command: list[str], url: str) -> Any:
    environment = {"URL": url, "IMAGE": base64.b64encode(drawn_image()).decode()}
    ran = subprocess.run(
        command,
        env=os.environ | QUIET | environment,
        capture_output=True,
        text=True,
        timeout=RUN_S,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    # Not `splitlines`: a file that is told as text may hold what Unicode calls the end of a line.
    return json.loads(ran.stdout.strip().rpartition("\n")[2])
