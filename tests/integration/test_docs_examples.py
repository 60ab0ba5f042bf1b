"""Every example of the API page, run as it stands against a real service."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from running_service import Service

PAGE = Path(__file__).parents[2] / "docs" / "api.md"
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)
ADDRESS = "http://127.0.0.1:8000"


def test_the_examples_run_in_their_order(service: Service, tmp_path: Path):
    blocks = BLOCK.findall(PAGE.read_text(encoding="utf-8"))
    # `python3` of the examples is the one that the tests run with.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for language, text in blocks:
        code = text.replace(ADDRESS, service.url)
        command = (
            ["bash", "-euo", "pipefail", "-c"] if language == "bash" else [sys.executable, "-c"]
        )
        ran = subprocess.run(
            [*command, code],
            cwd=tmp_path,
            env=os.environ | {"PATH": path},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert ran.returncode == 0, f"{code}\n{ran.stdout}{ran.stderr}"

    made = {path.name for path in tmp_path.iterdir()}
    assert len(blocks) >= 11
    assert {"heart.png", "sunflower-7.webp", "sunflower-8.webp", "completed.png"} <= made
    assert {"edited.json", "variations.json", "events.txt", "batch.json"} <= made
