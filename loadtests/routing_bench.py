"""Routing policies on a simulated fleet, as a report with plots.

    python -m loadtests.routing_bench [--seconds 120] [--docs docs]

Seeded, and without Ray: the numbers are the same on every machine, but for how long a decision
takes. `docs/routing.md` holds the tables, `docs/images/routing-*.svg` the plots.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from stepserve.routing.ledger import Ledger
from stepserve.routing.reports import Report

from loadtests.routing.compare import BASELINES, CAPACITY, POLICY, Latencies, capacity, compare
from loadtests.routing.simulator import COSTS, mixed_job

ALL = (*BASELINES, POLICY)
LOADS = (0.3, 0.5, 0.7, 0.85, 0.95)
FLEETS = ((2, 1), (8, 1), (32, 3), (200, 4), (1000, 4))
SEED = 1
LEAST_S = 60.0
COLOURS = dict(zip(ALL, ("#bbbbbb", "#8da0cb", "#66a182", "#e0a030", "#c0392b"), strict=True))


def main() -> None:
    """Run everything and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=120.0, help="of each simulated trace")
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument("--on-ray", type=Path, help="what loadtests.routing.on_ray has written")
    options = parser.parse_args()
    by_load = {load: compare(8, 1, load, options.seconds, SEED) for load in LOADS}
    # Large fleets get as many requests in less time, but queues take their time to form.
    by_fleet = {
        fleet: compare(*fleet, 0.85, max(options.seconds * 8 / fleet[0], LEAST_S), SEED)
        for fleet in FLEETS
    }
    slow = compare(8, 1, 0.7, options.seconds, SEED, speeds=[1.0] * 7 + [0.4])
    capacities = {name: capacity(name) for name in ALL}
    plot_loads(by_load, options.docs / "images" / "routing-load.svg")
    text = report(by_load, by_fleet, slow, capacities, decision_s())
    if options.on_ray is not None:
        text += on_ray(json.loads(options.on_ray.read_text()))
    (options.docs / "routing.md").write_text(text)
    print(text)


def decision_s(replicas: int = 1000, decisions: int = 2000) -> float:
    """Median seconds of one decision among busy replicas, its entry in the ledger included."""
    chance = random.Random(SEED)
    ledger = Ledger(time.monotonic, seed=SEED)
    ledger.set_replicas(range(replicas))
    for number in range(replicas):
        jobs = tuple(mixed_job(chance, 100 * number + i) for i in range(20))
        ledger.note_report(number, Report(jobs, COSTS))
    took_s = []
    for number in range(decisions):
        job = mixed_job(chance, 10**6 + number)
        began_s = time.perf_counter()
        ledger.note_sent(ledger.choose(job, 3)[0], job)
        took_s.append(time.perf_counter() - began_s)
    return statistics.median(took_s)


def plot_loads(by_load: dict[float, dict[str, Latencies]], path: Path) -> None:
    """Latency against load, one line for each policy."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    figures: Sequence[tuple[str, Callable[[Latencies], float]]] = (
        ("p95 latency in s", lambda told: told.p95_s),
        ("mean latency in s", lambda told: told.mean_s),
    )
    for axis, (title, value) in zip(axes, figures, strict=True):
        for name in ALL:
            heights = [value(results[name]) for results in by_load.values()]
            width = 2.5 if name == POLICY else 1.2
            axis.plot(list(by_load), heights, "o-", label=name, color=COLOURS[name], lw=width)
        axis.set(xlabel="load, in shares of capacity", title=title, ylim=(0, None))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    plt.rcParams["svg.hashsalt"] = "routing"
    figure.savefig(path, metadata={"Date": None})


def report(
    by_load: dict[float, dict[str, Latencies]],
    by_fleet: dict[tuple[int, int], dict[str, Latencies]],
    slow: dict[str, Latencies],
    capacities: dict[str, float],
    one_decision_s: float,
) -> str:
    """The page, in Markdown."""
    return f"""\
# Routing: which replica gets a request

*Written by `python -m loadtests.routing_bench`.*

Each request goes to the replica that should finish it first, with some concern for those that it
would delay there. Work is counted in seconds of the learned cost model
(`engine/scheduling/cost.py`), not in requests: 100 steps of four guided images at
128 pixels are some two hundred times the work of 4 steps of a small one. And a request that fits
what a replica is stepping already, in size (and in adapters, where it mixes none), shares its
forwards and costs less there.
`routing/ledger.py` says how the seconds are counted; `ray_serve/ingress/router.py` is the
router that Ray Serve asks.

The simulation drives that same code: replicas that step as the engine does, forward by forward,
with costs like those of the embedded model on a CPU; Poisson arrivals of 4 to 100 steps
(heavy-tailed), three sizes, one to four images, most with guidance; routers that see what they
would see in service, which is what they sent themselves and reports that are a second apart.
Requests of the first third of a simulation are not counted, as the fleet is empty then. Load
is given in shares of what ordinary routers can just serve: {CAPACITY:.1f} requests a second and
replica.

![Latency against load](images/routing-load.svg)

## p95 latency against load, 8 replicas, one router

{table(("load", by_load))}

At 85 % load p95 is {saving(by_load[0.85]):.0%} under the best of the others.

## Against the size of the fleet, at 85 % load

Several ingress replicas have a router each, which knows of the others' requests from reports only.

{table(("replicas, routers", {f"{a}, {b}": told for (a, b), told in by_fleet.items()}))}

## One replica of eight is slow (0.4 of the others' speed), at 70 % load

{table(("", {"p95": slow}))}

## What a fleet can do at all

Requests a second and replica when far more come. Replicas that step few sizes fill their forwards
better.

| {" | ".join(ALL)} |
|{"---|" * len(ALL)}
| {" | ".join(f"{capacities[name]:.2f}" for name in ALL)} |

## What a decision takes

Among 1,000 replicas with 20 requests each: {one_decision_s * 1e6:.0f} microseconds (median, on one
core of the machine that wrote this page).
"""


def on_ray(told: dict[str, Any]) -> str:
    """What was measured on a real service."""
    names = ("mean", "p50", "p95", "p99")
    rows = [
        f"| {routing} | {' | '.join(f'{seconds[name]:.2f} s' for name in names)} |"
        for routing, seconds in told["latency_s"].items()
    ]
    return f"""
## On real Ray

Two replicas of the embedded model on one machine of two cores, one thread each, beside Ray's own
processes: Poisson arrivals of {told["rate_per_s"]:g} requests a second, {told["requests"]} of
them in each run, medians of {len(next(iter(told["runs"].values())))} runs in turns
(`{told["command"]}`). `power-of-two` is Ray Serve's own router.

| `routing` | {" | ".join(names)} |
|{"---|" * (len(names) + 1)}
{chr(10).join(rows)}
"""


def saving(results: dict[str, Latencies]) -> float:
    """By how much p95 is under the best of the others."""
    return 1 - results[POLICY].p95_s / min(results[name].p95_s for name in BASELINES)


def table(rows: tuple[str, Mapping[Any, dict[str, Latencies]]]) -> str:
    """p95 of every policy, and by how much ours is under the best of the others."""
    title, results = rows
    lines = [f"| {title} | {' | '.join(ALL)} | less than the best |", "|---" * (len(ALL) + 2) + "|"]
    for key, told in results.items():
        cells = " | ".join(f"{told[name].p95_s:.2f} s" for name in ALL)
        lines.append(f"| {key} | {cells} | {saving(told):.0%} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
