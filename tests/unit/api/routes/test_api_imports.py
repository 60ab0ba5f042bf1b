from __future__ import annotations

import subprocess
import sys


def test_the_http_api_needs_neither_ray_nor_torch():
    code = "import sys, stepserve.api, stepserve.config; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(run.stdout.split())

    assert "stepserve.api.app" in loaded
    assert loaded.isdisjoint({"ray", "torch", "diffusers", "greenlet", "stepserve.engine"})
