"""Machine and versions: without them a measured number says nothing."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "stepserve",
    "torch",
    "diffusers",
    "transformers",
    "ray",
    "fastapi",
    "uvicorn",
    "litserve",
    "bentoml",
    "locust",
    "aiohttp",
)
EXTENSIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def take_facts() -> dict[str, Any]:
    """What a reader needs to judge or repeat a measurement."""
    return {
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "processor": _processor(),
        "extensions": [name for name in EXTENSIONS if name in _flags()],
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": _versions(),
        "commit": _commit(),
        "load_average_before": [round(load, 2) for load in os.getloadavg()],
    }


def describe(facts: dict[str, Any]) -> str:
    """One line for people."""
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    extensions = ", ".join(facts["extensions"]) or "no vector extensions of note"
    return (
        f"{facts['processor']} ({extensions}), {facts['cores']} cores, {facts['memory_gib']} GiB, "
        f"{facts['system']}, Python {facts['python']}, {versions}, commit {facts['commit']}"
    )


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()


def _processor() -> str:
    names = [line.split(":", 1)[1] for line in _cpuinfo() if line.startswith("model name")]
    return names[0].strip() if names else platform.processor() or platform.machine()


def _flags() -> list[str]:
    flags = [line.split(":", 1)[1] for line in _cpuinfo() if line.startswith("flags")]
    return flags[0].split() if flags else []


def _cpuinfo() -> list[str]:
    file = Path("/proc/cpuinfo")
    return file.read_text().splitlines() if file.exists() else []
