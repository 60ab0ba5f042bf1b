"""The router against Ray Serve's own, on a real service with two replicas.

    python -m loadtests.routing.on_ray [--rate 3] [--requests 150] [--rounds 2] [--out FILE]

The same seeded requests at the same times, in turns. Both replicas share this machine's cores with
one thread each, and so do Ray's own processes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from loadtests import bench
from loadtests.load.contenders import contenders, running
from loadtests.results.facts import take_facts

ROUTINGS = ("power-of-two", "expected-finish")
REPLICAS = 2
ENGINE = "STEPSERVE_MODELS__EMOJI__ENGINE__"
VARIABLES = {
    "STEPSERVE_MODELS__EMOJI__REPLICAS": str(REPLICAS),
    "STEPSERVE_MODELS__EMOJI__NUM_CPUS": "0.5",
    f"{ENGINE}THREADS": "1",
    f"{ENGINE}MAX_PENDING_IMAGES": "10000",
}


def main() -> None:
    """Measure in turns, print medians, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rate", type=float, default=3.0, help="requests a second")
    parser.add_argument("--requests", type=int, default=150)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("out/routing-on-ray.json"))
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    runs: dict[str, list[dict[str, Any]]] = {routing: [] for routing in ROUTINGS}
    for number in range(options.rounds):
        for routing in ROUTINGS if number % 2 else ROUTINGS[::-1]:
            runs[routing].append(measure(routing, options, seed=number))
    report = {
        "facts": take_facts(),
        "command": " ".join(["python -m loadtests.routing.on_ray", *sys.argv[1:]]),
        "replicas": REPLICAS,
        "rate_per_s": options.rate,
        "requests": options.requests,
        "latency_s": {routing: medians(told) for routing, told in runs.items()},
        "runs": runs,
    }
    options.out.write_text(json.dumps(report, indent=2))
    for routing, told in report["latency_s"].items():
        print(routing, {name: round(value, 3) for name, value in told.items()})


def measure(routing: str, options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """One run on a service of its own."""
    folder = options.out.parent
    contender = replace(contenders(1)["stepserve"], environment={})
    variables = VARIABLES | {"STEPSERVE_MODELS__EMOJI__ROUTING": routing}
    out = folder / f"routing-{routing}-{seed}.json"
    with running(contender, folder / f"routing-{routing}.log", more=variables) as url:
        numbers = ["--rate", options.rate, "--requests", options.requests, "--seed", seed]
        told = ["server", "--host", url, "--out", out, "--unloaded", _unloaded(url, folder, seed)]
        bench.main([str(part) for part in (*told, *numbers)])
    summary: dict[str, Any] = json.loads(out.read_text())["server"]
    if summary["void"] or summary["complaints"]:
        raise SystemExit(f"{routing}: the run is void: {summary}")
    return summary


def _unloaded(url: str, folder: Path, seed: int) -> Path:
    """What requests take alone; measured once, as both are judged by the same."""
    path = folder / "routing-unloaded.json"
    if not path.exists():
        arguments = ["server", "--host", url, "--rate", "1", "--requests", "5"]
        arguments += ["--seed", str(seed), "--write-unloaded", str(path)]
        bench.main([*arguments, "--out", str(folder / "routing-warm-up.json")])
    return path


def medians(told: list[dict[str, Any]]) -> dict[str, float]:
    """Of all runs of one routing."""
    names = told[0]["latency_s"]
    return {name: statistics.median(run["latency_s"][name] for run in told) for name in names}


if __name__ == "__main__":
    main()
