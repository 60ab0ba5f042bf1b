"""Stepserve and its peers: the same weights, the same trace, the same rates, in turns.

    python3.11 -m venv out/peers && out/peers/bin/pip install -r loadtests/peers/requirements.txt
    python -m loadtests.race [--servers stepserve fastapi-lock ...] [--rounds 3]

One server at a time is started, warmed up and measured. In the first rounds (`--open-rounds`) all
have a turn; the later ones are for ours, the one-at-a-time server, and the peers with the highest
throughput so far, of the mixed trace (the best that batches) and of the homogeneous one. Latency
targets are multiples of what a request takes on the idle one-at-a-time server, for all alike. Each
turn measures the saturated throughput (mixed and homogeneous) and latencies at 0.8 of the capacity
of the one-at-a-time server; the last round finds the knees. Medians over rounds are reported by
`python -m loadtests.report`. Where a machine's speed drifts, more rounds can be added later:

    python -m loadtests.race --add --servers stepserve fastapi-lock litserve-cores --no-knees

On a machine with a GPU, those that it can be given to:

    python -m loadtests.race --cuda FOLDER --sizes 512x512,384x384,768x768 --no-knees
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from loadtests.bench import read_unloaded, write_unloaded
from loadtests.load import scenarios
from loadtests.load.client import Target, open_session
from loadtests.load.contenders import (
    FULL_QUEUE,
    OPENMP,
    PEERS_PYTHON,
    Contender,
    contenders,
    on_cuda,
    running,
)
from loadtests.load.scenarios import Bench
from loadtests.load.trace import HOMOGENEOUS, MIXED, Mix, draw_gaps, draw_trace, weigh_sizes
from loadtests.load.watch import served_model
from loadtests.report import BATCHING, OURS, homogeneous, knee_of_turn, throughput
from loadtests.results.facts import take_facts
from loadtests.results.measures import make_targets

REFERENCE = "fastapi-lock"
"""One at a time, with nothing but diffusers and an HTTP server: others are compared with it."""

SHORT_JOBS_LOAD = 0.8
WARM_UP_REQUESTS = 16
OUR_FIRST_RATE, THEIR_FIRST_RATE = 0, -14
"""Where on the grid a search begins: at the capacity of the reference, and at a quarter of it."""

TRACE_REQUESTS = 20_000
SAME_IN_ALL_TURNS = ("openmp", "targets", "mixes", "requests", "in_flight")


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = list(contenders(1))
    parser.add_argument("--servers", nargs="+", choices=known)
    parser.add_argument("--cuda", type=Path, metavar="FOLDER", help="a model, served on a GPU")
    parser.add_argument("--sizes", help="that the model can do, the commonest first")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--open-rounds", type=int, default=1, help="rounds in which all take part")
    parser.add_argument(
        "--add", action="store_true", help="turns to the race in OUT, which had the same requests"
    )
    parser.add_argument("--requests", type=int, default=200, help="of each run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit-s", type=float, default=2.0)
    parser.add_argument("--in-flight", type=int, default=24)
    parser.add_argument("--calibration-repeats", type=int, default=3)
    parser.add_argument("--openmp", choices=sorted(OPENMP), default="short-spin")
    parser.add_argument("--no-knees", action="store_true", help="throughput and latencies only")
    parser.add_argument("--knees-of", nargs="+", choices=known, default=known)
    parser.add_argument(
        "--knee-requests", type=int, default=120, help="of each run of a search, at least"
    )
    parser.add_argument(
        "--knee-targets", type=int, default=3, help="so many of them, the strictest first"
    )
    parser.add_argument("--no-overload", action="store_true")
    parser.add_argument("--peers-python", type=Path, default=PEERS_PYTHON)
    parser.add_argument("--out", type=Path, default=Path("out/race.json"))
    options = parser.parse_args(arguments)
    entered = known_to(options)
    options.servers = options.servers or list(entered)
    if missing := set(options.servers) - set(entered):
        parser.error(f"not made for --cuda: {', '.join(sorted(missing))}")
    if REFERENCE not in options.servers:
        parser.error(f"{REFERENCE} must take part: the others are compared with it")
    return options


def known_to(options: argparse.Namespace) -> dict[str, Contender]:
    """Who can take part."""
    if options.cuda:
        return on_cuda(options.cuda)
    return contenders(os.cpu_count() or 1, options.peers_python)


def mixes(options: argparse.Namespace) -> tuple[Mix, Mix]:
    """The mixed one, and the homogeneous one."""
    if not options.sizes:
        return MIXED, HOMOGENEOUS
    sizes = options.sizes.split(",")
    return replace(MIXED, sizes=weigh_sizes(sizes)), replace(HOMOGENEOUS, sizes=((sizes[0], 1.0),))


def main(arguments: list[str] | None = None) -> int:
    """Race, and write JSON after every turn, so that a race that is stopped is not lost."""
    options = parse_options(arguments)
    report = new_report(options)
    if options.add:
        report = added_to(json.loads(options.out.read_text()), report)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for round_number in range(options.rounds):
        if round_number >= options.open_rounds:
            options.servers = finalists(report["servers"])
        for contender in in_order(options, round_number):
            _turn(contender, round_number, report, options)
            options.out.write_text(json.dumps(report, indent=2))
    print(f"report: {options.out}")
    return 0


def new_report(options: argparse.Namespace) -> dict[str, Any]:
    """Of a race in which nobody had a turn yet."""
    mixed, alike = mixes(options)
    return {
        "kind": "race",
        "facts": take_facts(),
        "command": " ".join(["python -m loadtests.race", *sys.argv[1:]]),
        "openmp": options.openmp,
        "reference": REFERENCE,
        "targets": [asdict(target) for target in make_targets(options.limit_s)],
        "mixes": {"mixed": asdict(mixed), "homogeneous": asdict(alike)},
        "requests": options.requests,
        "in_flight": options.in_flight,
        "short_jobs_load": SHORT_JOBS_LOAD,
        "servers": {},
    }


def added_to(before: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """The race of before, for more turns of the same kind.

    Raises:
        SystemExit: they would be of another kind; the message says in what.
    """
    # As it would be read from a file: JSON knows no tuples.
    told = json.loads(json.dumps(more))
    for name in SAME_IN_ALL_TURNS:
        if before.get(name, told[name]) != told[name]:
            raise SystemExit(f"{name}: the race so far has {before[name]}, not {told[name]}")
    return before | {"command": f"{before['command']}\n{more['command']}"}


def in_order(options: argparse.Namespace, round_number: int) -> list[Contender]:
    """Who has a turn when. The first round begins with the reference; every other is reversed."""
    known = known_to(options)
    names = sorted(options.servers, key=lambda name: name != REFERENCE)
    return [known[name] for name in (names if round_number % 2 == 0 else reversed(names))]


def finalists(servers: dict[str, Any]) -> list[str]:
    """Ours, the reference, the fastest that batches, and the fastest where requests are alike."""
    measured = {name: told for name, told in servers.items() if told["turns"]}
    peers = [name for name, told in measured.items() if told["role"] != OURS]
    batching = [name for name in peers if measured[name]["role"] == BATCHING]
    best = [
        max(batching, key=lambda name: throughput(measured[name]) or 0.0, default=None),
        max(peers, key=lambda name: homogeneous(measured[name]) or 0.0, default=None),
    ]
    return [name for name in measured if name not in peers or name in (REFERENCE, *best)]


def _turn(
    contender: Contender, round_number: int, report: dict[str, Any], options: argparse.Namespace
) -> None:
    """Start a server and measure it once. What cannot be started is told in the report."""
    told = report["servers"].setdefault(
        contender.name, {"tuned": contender.tuned, "role": contender.role, "turns": []}
    )
    print(f"== {contender.name}, round {round_number + 1}", flush=True)
    log = options.out.with_name(f"race-{contender.name}.log")
    try:
        # A throughput is measured with nothing refused, so ours gets a queue without an end.
        with running(contender, log, options.openmp, FULL_QUEUE) as url:
            is_last = round_number == options.rounds - 1
            turn = asyncio.run(_measure(url, contender, report, options, is_last))
    except (OSError, RuntimeError) as error:
        print(f"{contender.name} could not be measured: {error}")
        told["trouble"] = f"{type(error).__name__}: {error}"
        return
    told["turns"].append(turn)
    knee_per_s = knee_of_turn(turn, report["targets"][0]["name"])
    if contender.role == OURS and knee_per_s and not options.no_overload:
        told["overload"] = _overload(contender, log, knee_per_s, report, options)


async def _measure(
    url: str,
    contender: Contender,
    report: dict[str, Any],
    options: argparse.Namespace,
    is_last: bool,
) -> dict[str, Any]:
    """One turn of one server."""
    mixed_mix, alike_mix = mixes(options)
    trace = draw_trace(mixed_mix, TRACE_REQUESTS, options.seed)
    alike_trace = draw_trace(alike_mix, options.requests, options.seed)
    gaps = draw_gaps(TRACE_REQUESTS, options.seed)
    async with open_session(Target(url)) as session:
        await scenarios.wait_until_serving(session, trace[0])
        if "unloaded" not in report:
            # The reference has the first turn of all: its times are everybody's.
            own = await scenarios.calibrate(session, trace, options.calibration_repeats)
            report["unloaded"] = write_unloaded(own)
        common = read_unloaded(report["unloaded"])
        targets = make_targets(options.limit_s)
        model = await served_model(session)
        whole = Bench(session, trace, gaps, common, targets, model)
        bench = whole.first(options.requests)
        await _warm_up(bench, options.in_flight)
        mixed = await scenarios.offline(bench, options.in_flight)
        alike = await scenarios.offline(replace(bench, trace=alike_trace), options.in_flight)
        rates = [f"{told['throughput_per_s']:.2f}/s" for told in (mixed, alike)]
        print(f"{rates[0]} mixed, {rates[1]} homogeneous", flush=True)
        capacity_per_s = report.setdefault("reference_capacity_per_s", mixed["throughput_per_s"])
        short_jobs = await scenarios.server(bench, SHORT_JOBS_LOAD * capacity_per_s)
        scenarios.print_progress("at 0.8", short_jobs)
        turn: dict[str, Any] = {"offline": mixed, "homogeneous": alike, "short_jobs": short_jobs}
        if is_last and not options.no_knees and contender.name in options.knees_of:
            start = OUR_FIRST_RATE if contender.role == OURS else THEIR_FIRST_RATE
            sought = targets[: options.knee_targets]
            sought_by = replace(whole, targets=sought)
            turn["knee"] = await scenarios.knees(
                sought_by, options.knee_requests, capacity_per_s, start
            )
    return turn


async def _warm_up(bench: Bench, in_flight: int) -> None:
    await scenarios.offline(bench.first(WARM_UP_REQUESTS), in_flight)


def _overload(
    contender: Contender,
    log: Path,
    knee_per_s: float,
    report: dict[str, Any],
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Ours at twice its knee, with the queue that it has by default."""
    with running(contender, log, options.openmp) as url:
        return asyncio.run(_overloaded(url, knee_per_s, report, options))


async def _overloaded(
    url: str, knee_per_s: float, report: dict[str, Any], options: argparse.Namespace
) -> dict[str, Any]:
    trace = draw_trace(mixes(options)[0], TRACE_REQUESTS, options.seed)
    gaps = draw_gaps(TRACE_REQUESTS, options.seed)
    unloaded = read_unloaded(report["unloaded"])
    async with open_session(Target(url)) as session:
        await scenarios.wait_until_serving(session, trace[0])
        model = await served_model(session)
        targets = make_targets(options.limit_s)
        bench = Bench(session, trace, gaps, unloaded, targets, model, send_deadlines=True)
        await _warm_up(bench, options.in_flight)
        return await scenarios.overload(bench, knee_per_s, options.seed)


if __name__ == "__main__":
    raise SystemExit(main())
