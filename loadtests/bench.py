"""An open-loop benchmark over HTTP, against any server that speaks the Images API.

    python -m loadtests.bench --host http://127.0.0.1:8000 [SCENARIO ...] [--out out/bench.json]

Scenarios: `offline` (everything at once: the capacity), `server` (Poisson arrivals at one --rate),
`sweep` (0.3 to 2 times the capacity), `knee` (the highest rates that keep the latency targets),
`overload` (a minute at twice the knee, and back), `recorded` (arrivals of a --recorded file). The
default is all but `server` and `recorded`. Writes JSON, prints a table, and draws plots beside it.

Requests are sent on a schedule drawn beforehand and timed from when they should have been sent. A
run that sent at less than 99 % of the offered rate is void. Latency targets are multiples of what a
request takes unloaded, which is measured first, or read from --unloaded.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from loadtests.load import scenarios
from loadtests.load.client import DEFAULT_GIVE_UP_S, Target, open_session
from loadtests.load.scenarios import Bench, shown
from loadtests.load.trace import MIXES, Mix, draw_gaps, draw_trace, read_trace, weigh_sizes
from loadtests.load.watch import served_model
from loadtests.results.facts import describe, take_facts
from loadtests.results.measures import Line, Unloaded, make_targets, summarize
from loadtests.results.plots import plot_bench

DEFAULT_SCENARIOS = ("offline", "sweep", "knee", "overload")
OVERLOAD_REQUESTS = 20_000


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = (*DEFAULT_SCENARIOS, "server", "recorded")
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help=", ".join(known))
    parser.add_argument("--host", default="http://127.0.0.1:8000")
    parser.add_argument("--api-key", default="")
    parser.add_argument("--mix", choices=sorted(MIXES), default="mixed")
    parser.add_argument("--sizes", help="such as 64x64,48x48,96x96, the commonest first")
    parser.add_argument("--image-to-image", type=float, default=0.0, metavar="SHARE")
    parser.add_argument("--cancelled", type=float, metavar="SHARE")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--requests", type=int, default=200, help="of each run")
    parser.add_argument("--variation", type=float, default=1.0, help="of gaps; 1: Poisson")
    parser.add_argument("--recorded", type=Path, help="JSON lines with `at_s`")
    parser.add_argument("--rate", type=float, help="requests a second, for `server`")
    parser.add_argument("--capacity", type=float, help="requests a second, if known already")
    parser.add_argument("--knee", type=float, help="requests a second, if known already")
    parser.add_argument("--in-flight", type=int, default=24, help="for `offline`")
    parser.add_argument("--limit-s", type=float, default=2.0, help="one target for all requests")
    parser.add_argument("--send-deadlines", action="store_true", help="tell the server the target")
    parser.add_argument("--give-up-s", type=float, default=DEFAULT_GIVE_UP_S)
    parser.add_argument("--unloaded", type=Path, help="a file of --write-unloaded")
    parser.add_argument("--write-unloaded", type=Path)
    parser.add_argument("--calibration-repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("out/bench.json"))
    options = parser.parse_args(arguments)
    unknown = set(options.scenarios) - set(known)
    if unknown:
        parser.error(f"no such scenario: {', '.join(sorted(unknown))}")
    if "server" in options.scenarios and not options.rate:
        parser.error("`server` needs --rate")
    if "recorded" in options.scenarios and not options.recorded:
        parser.error("`recorded` needs --recorded")
    options.scenarios = options.scenarios or list(DEFAULT_SCENARIOS)
    return options


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write. Returns 1 if a run was void."""
    options = parse_options(arguments)
    report = asyncio.run(measure(options))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2))
    print_table(report)
    for file in plot_bench(report, options.out.with_suffix("")):
        print(f"plot: {file}")
    print(f"report: {options.out}")
    return 1 if has_void(report) else 0


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All scenarios, one after another."""
    headers = (("Authorization", f"Bearer {options.api_key}"),) if options.api_key else ()
    facts = take_facts()
    async with open_session(Target(options.host, headers)) as session:
        mix = choose_mix(options)
        trace = draw_trace(mix, max(options.requests, OVERLOAD_REQUESTS), options.seed)
        await scenarios.wait_until_serving(session, trace[0])
        unloaded = await _unloaded(session, trace, options)
        bench = Bench(
            session,
            trace,
            draw_gaps(len(trace), options.seed, options.variation),
            unloaded,
            make_targets(options.limit_s),
            await served_model(session),
            options.send_deadlines,
            options.give_up_s,
        )
        told = await run_scenarios(bench, options)
    return {
        "kind": "bench",
        "facts": facts,
        "host": options.host,
        "command": " ".join(["python -m loadtests.bench", *sys.argv[1:]]),
        "mix": asdict(mix),
        "targets": [asdict(target) for target in bench.targets],
        "unloaded": write_unloaded(unloaded),
        **told,
    }


async def run_scenarios(bench: Bench, options: argparse.Namespace) -> dict[str, Any]:
    """Those that were asked for. Each may need what an earlier one found out."""
    told: dict[str, Any] = {}
    short = bench.first(options.requests)
    wants_knee = "knee" in options.scenarios
    wants_knee |= "overload" in options.scenarios and not options.knee
    needs_capacity = wants_knee or "sweep" in options.scenarios
    if "offline" in options.scenarios or (needs_capacity and not options.capacity):
        told["offline"] = await scenarios.offline(short, options.in_flight)
        print(f"capacity: {told['offline']['throughput_per_s']:.2f} requests/s", flush=True)
    capacity_per_s = options.capacity or told.get("offline", {}).get("throughput_per_s")
    if "server" in options.scenarios:
        told["server"] = await scenarios.server(short, options.rate)
        scenarios.print_progress("server", told["server"])
    if "recorded" in options.scenarios:
        told["recorded"] = await _recorded(bench, options)
    if "sweep" in options.scenarios:
        told["sweep"] = await scenarios.sweep(short, capacity_per_s)
    if wants_knee:
        told["knee"] = await scenarios.knees(bench, options.requests, capacity_per_s)
    if "overload" in options.scenarios:
        told["overload"] = await _overload(bench, told, options)
    return told


async def _overload(
    bench: Bench, told: dict[str, Any], options: argparse.Namespace
) -> dict[str, Any] | None:
    knee_per_s = options.knee or told["knee"]["knees_per_s"][bench.targets[0].name]
    if knee_per_s is None:
        print("no overload: no rate keeps the first target")
        return None
    return await scenarios.overload(bench, knee_per_s, options.seed)


async def _recorded(bench: Bench, options: argparse.Namespace) -> dict[str, Any]:
    requests, arrivals = read_trace(options.recorded, choose_mix(options), options.seed)
    unloaded = await scenarios.calibrate(bench.session, requests, options.calibration_repeats)
    recorded = replace(bench, trace=requests, unloaded=unloaded)
    await scenarios.settle(recorded)
    run = await scenarios.run_arrivals(recorded, arrivals)
    summary = summarize(run, bench.targets)
    scenarios.print_progress("recorded", summary)
    return summary


async def _unloaded(session: Any, trace: Any, options: argparse.Namespace) -> Unloaded:
    if options.unloaded:
        return read_unloaded(json.loads(options.unloaded.read_text()))
    print("measuring unloaded times, one request at a time", flush=True)
    unloaded = await scenarios.calibrate(session, trace, options.calibration_repeats)
    if options.write_unloaded:
        options.write_unloaded.parent.mkdir(parents=True, exist_ok=True)
        options.write_unloaded.write_text(json.dumps(write_unloaded(unloaded), indent=2))
    return unloaded


def choose_mix(options: argparse.Namespace) -> Mix:
    """The mix that was named, with what the command line changes."""
    mix = replace(MIXES[options.mix], image_to_image_share=options.image_to_image)
    if options.cancelled is not None:
        mix = replace(mix, cancelled_share=options.cancelled)
    if options.sizes:
        mix = replace(mix, sizes=weigh_sizes(options.sizes.split(",")))
    return mix


def write_unloaded(unloaded: Unloaded) -> dict[str, Any]:
    """As JSON."""
    return {kind: asdict(line) for kind, line in unloaded.lines.items()}


def read_unloaded(told: dict[str, Any]) -> Unloaded:
    """From JSON."""
    return Unloaded({kind: Line(**line) for kind, line in told.items()})


def has_void(report: dict[str, Any]) -> bool:
    """Whether the client fell behind in any run."""
    runs = [*report.get("sweep", []), *report.get("knee", {}).get("runs", [])]
    runs += [report[name] for name in ("server", "recorded") if name in report]
    return any(run["void"] for run in runs)


def print_table(report: dict[str, Any]) -> None:
    """For people."""
    print(f"\n{describe(report['facts'])}")
    if offline := report.get("offline"):
        print(
            f"offline: {offline['throughput_per_s']:.2f} requests/s, "
            f"{offline['images_per_s']:.2f} images/s, {offline['rows_per_s']:.0f} rows/s"
        )
    if "sweep" in report:
        _print_sweep(report)
    for name, knee_per_s in report.get("knee", {}).get("knees_per_s", {}).items():
        print(f"goodput at {name}: {shown(knee_per_s)} requests/s")
    if overload := report.get("overload"):
        print(
            f"overload: goodput {overload['goodput_over_knee']:.2f} of the knee, admitted in time "
            f"{shown(overload['admitted_in_time'])}, {overload['refused']} refused "
            f"(p99 {shown(overload['refusal_p99_s'], 3)} s), recovered after "
            f"{shown(overload['recovery_s'], 1)} s"
        )


def _print_sweep(report: dict[str, Any]) -> None:
    columns: tuple[tuple[str, Callable[[dict[str, Any]], str]], ...] = (
        ("load", lambda run: f"{run['factor']:.1f}x"),
        ("offered/s", lambda run: shown(run["offered_rate_per_s"])),
        ("served/s", lambda run: shown(run["throughput_per_s"])),
        *(
            (target["name"].replace(" unloaded", ""), _in_time(target["name"]))
            for target in report["targets"]
        ),
        ("p50 s", lambda run: shown(run["latency_s"]["p50"])),
        ("p95 s", lambda run: shown(run["latency_s"]["p95"])),
        ("p99 s", lambda run: shown(run["latency_s"]["p99"])),
        ("rows", lambda run: shown(run["occupancy"].get("rows_per_forward"), 1)),
        ("refused", lambda run: str(run["counts"].get("refused", 0))),
        ("failed", lambda run: str(run["counts"].get("failed", 0))),
    )
    print("  ".join(f"{name:>9}" for name, _ in columns))
    for run in report["sweep"]:
        void = "  VOID" if run["void"] else ""
        print("  ".join(f"{shape(run):>9}" for _, shape in columns) + void)


def _in_time(target: str) -> Callable[[dict[str, Any]], str]:
    return lambda run: f"{run['in_time'][target]:.0%}"


if __name__ == "__main__":
    raise SystemExit(main())
