"""Mixed load for a long time, and what it leaves behind: memory, requests, latency.

    python -m loadtests.endurance [--seconds 1800] [--rate 1.0] [--out out/endurance.json]
    python -m loadtests.endurance --host http://127.0.0.1:8000 --pid 4711

Starts a service (or takes one that runs on this machine already), sends the mixed trace (edits and
clients that leave included) at one rate, and looks at the memory of every process of the service.
At the end nothing may be in flight any more. The slopes of memory and latency are those of straight
lines, of memory through what was seen once the caches of kernels had filled, and the exit code is 1
if one of them is steeper than it may be.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from loadtests.bench import write_unloaded
from loadtests.load import scenarios
from loadtests.load.client import Status, Target, open_session
from loadtests.load.contenders import contenders, running
from loadtests.load.scenarios import Bench
from loadtests.load.trace import MIXED, arrivals_through, draw_gaps, draw_trace
from loadtests.load.watch import served_model
from loadtests.results.facts import take_facts
from loadtests.results.measures import Run, latency_by_second, make_targets, slope_per_s, summarize

LOOK_EVERY_S = 5.0
LATENCY_WINDOW_S = 10.0
QUIET_S = 5.0
MIB = 2**20
HOUR_S = 3600.0


@dataclass(frozen=True)
class Growth:
    """One process: its memory once caches had filled and at the end, and how it grew meanwhile."""

    process: str
    begin_mib: float
    end_mib: float
    mib_per_hour: float


def main(arguments: list[str] | None = None) -> int:
    """Run, print, write; 1 if something grew or was left behind."""
    options = parse_options(arguments)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with _service(options) as (url, process):
        report = asyncio.run(endure(url, process, options))
    report["faults"] = faults_of(report, options)
    options.out.write_text(json.dumps(report, indent=2))
    print_report(report)
    return 1 if report["faults"] else 0


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=1800.0)
    parser.add_argument("--rate", type=float, default=1.0, help="requests a second")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cancelled", type=float, default=0.2, metavar="SHARE")
    parser.add_argument("--image-to-image", type=float, default=0.2, metavar="SHARE")
    parser.add_argument(
        "--filling",
        type=float,
        default=0.6,
        metavar="SHARE",
        help="of the time, while caches fill with kernels for each size and number of rows",
    )
    parser.add_argument("--max-mib-per-hour", type=float, default=60.0, help="of each process")
    parser.add_argument(
        "--max-slowdown", type=float, default=1.2, help="of latency, end over begin"
    )
    parser.add_argument("--host", help="of a service that runs on this machine already")
    parser.add_argument("--pid", type=int, help="of its `stepserve serve`")
    parser.add_argument("--out", type=Path, default=Path("out/endurance.json"))
    options = parser.parse_args(arguments)
    if (options.host is None) != (options.pid is None):
        parser.error("--host and --pid belong together")
    return options


@contextmanager
def _service(options: argparse.Namespace) -> Iterator[tuple[str, psutil.Process]]:
    """Where a service is, and the process that all of its processes descend from."""
    if options.host is not None:
        try:
            process = psutil.Process(options.pid)
        except psutil.NoSuchProcess:
            raise SystemExit(f"--pid: there is no process {options.pid}") from None
        yield options.host, process
        return
    with running(contenders(1)["stepserve"], options.out.with_suffix(".log")) as url:
        yield url, psutil.Process()


async def endure(url: str, process: psutil.Process, options: argparse.Namespace) -> dict[str, Any]:
    """The load, the looks at memory beside it, and what is left at the end."""
    mix = replace(
        MIXED,
        cancelled_share=options.cancelled,
        image_to_image_share=options.image_to_image,
    )
    # Twice what should arrive; each kind of them is first served once alone.
    count = int(2 * options.rate * options.seconds) + 20
    trace, gaps = draw_trace(mix, count, options.seed), draw_gaps(count, options.seed)
    async with open_session(Target(url)) as session:
        await scenarios.wait_until_serving(session, trace[0])
        print("asking for each kind of request alone ...", flush=True)
        unloaded = await scenarios.calibrate(session, trace, repeats=1)
        model = await served_model(session)
        bench = Bench(session, trace, gaps, unloaded, make_targets(2.0), model)
        arrivals = arrivals_through([(options.rate, options.seconds)], gaps)
        memory: dict[str, list[tuple[float, float]]] = defaultdict(list)
        looking = asyncio.create_task(_look_at_memory(process, memory))
        print(
            f"sending {options.rate:g} requests a second for {options.seconds:g} s ...", flush=True
        )
        run = await scenarios.run_arrivals(bench, arrivals)
        looking.cancel()
        await asyncio.sleep(QUIET_S)
        left = await left_in_flight(session, model or "")
    return {
        "kind": "endurance",
        "facts": take_facts(),
        "command": " ".join(["python -m loadtests.endurance", *sys.argv[1:]]),
        "seconds": options.seconds,
        "unloaded": write_unloaded(unloaded),
        "growth": [
            asdict(growth_of(name, points, options.filling))
            for name, points in sorted(memory.items())
        ],
        "memory": memory,
        "left_in_flight": left,
        "slowdown": slowdown_of(run),
        "latency_by_second": latency_by_second(run, LATENCY_WINDOW_S),
        "run": summarize(run, bench.targets),
    }


def growth_of(name: str, points: Sequence[tuple[float, float]], filling: float) -> Growth:
    """Of one process, from (seconds, MiB), of which the share `filling` at first does not count."""
    after = points[int(filling * len(points)) :]
    return Growth(name, after[0][1], after[-1][1], HOUR_S * slope_per_s(after))


def slowdown_of(run: Run) -> float | None:
    """How much longer requests took at the end than at the beginning, over their unloaded times.

    Told by a straight line, so that one slow moment is not taken for a trend.
    """
    points = [
        (outcome.intended_s, outcome.latency_s / run.unloaded_s[outcome.index])
        for outcome in run.judged
        if outcome.status is Status.OK
    ]
    if len(points) < 2:
        return None
    slope = slope_per_s(points)
    middle_s = sum(at_s for at_s, _ in points) / len(points)
    middle = sum(slowdown for _, slowdown in points) / len(points)
    begin, end = (middle + slope * (at_s - middle_s) for at_s in (points[0][0], points[-1][0]))
    return end / begin if begin > 0 else None


async def left_in_flight(session: aiohttp.ClientSession, model: str) -> int:
    """How many requests the service has in flight although nobody waits any more."""
    async with session.get(f"/v1/models/{model}/batch") as response:
        answer = await response.json()
    return sum(len(replica["requests"]) for replica in answer["replicas"])


def faults_of(report: dict[str, Any], options: argparse.Namespace) -> list[str]:
    """What must not be."""
    counts = report["run"]["counts"]
    faults = [
        f"{growth['process']} grows by {growth['mib_per_hour']:.0f} MiB an hour"
        for growth in report["growth"]
        if growth["mib_per_hour"] > options.max_mib_per_hour
    ]
    if report["left_in_flight"]:
        faults.append(f"{report['left_in_flight']} requests are still in flight")
    if counts.get("failed") or counts.get("given_up"):
        faults.append(f"not all were answered: {counts} {report['run']['complaints']}")
    if report["slowdown"] is not None and report["slowdown"] > options.max_slowdown:
        faults.append(f"latency grew to {report['slowdown']:.2f} of what it was")
    if report["run"]["void"]:
        faults.append("void: the client fell behind")
    return faults


def print_report(report: dict[str, Any]) -> None:
    """For people."""
    for growth in report["growth"]:
        print(
            f"{growth['process']:50} {growth['begin_mib']:8.1f} to {growth['end_mib']:8.1f} MiB, "
            f"{growth['mib_per_hour']:+.1f} MiB an hour"
        )
    scenarios.print_progress("endurance", report["run"])
    print(f"latency at the end over the beginning: {scenarios.shown(report['slowdown'])}")
    print("\n".join(f"FAULT: {fault}" for fault in report["faults"]) or "nothing grew")


async def _look_at_memory(
    root: psutil.Process, memory: dict[str, list[tuple[float, float]]]
) -> None:
    """Private memory of `root` and every process that descends from it, by name, in MiB.

    Not of this process, which is no part of the service.
    """
    started_s = time.monotonic()
    names: dict[int, str] = {}
    while True:
        for pid, name, mib in await asyncio.to_thread(_memory_now, root):
            # Ray's processes change their names with what they are doing.
            memory[names.setdefault(pid, name)].append((time.monotonic() - started_s, mib))
        await asyncio.sleep(LOOK_EVERY_S)


def _memory_now(root: psutil.Process) -> list[tuple[int, str, float]]:
    found = []
    for process in [root, *root.children(recursive=True)]:
        if process.pid == os.getpid():
            continue
        try:
            # Pages that only this process has: what Ray's processes share is not theirs alone.
            memory = process.memory_full_info().uss
            command = Path((process.cmdline() or ["?"])[0]).name
        except psutil.Error:
            continue
        found.append((process.pid, f"{command} {process.pid}", memory / MIB))
    return found


if __name__ == "__main__":
    raise SystemExit(main())
