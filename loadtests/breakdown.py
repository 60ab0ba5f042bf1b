"""Where the time of a request over HTTP goes, under load: flame graphs of every process.

    pip install py-spy
    python -m loadtests.breakdown [--seconds 30] [--out out/breakdown/breakdown.json]

The service is kept saturated with the mixed trace of the race. The CPU seconds of each of its
processes are the system's own count, and so are those of the engine's threads; py-spy samples what
their Python is doing. Samples of an engine are divided by what their stacks say, and its CPU
seconds by these shares. Flame graphs of a replica and of the ingress lie beside the JSON, to look
around in with a browser.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing.pool import Pool
from operator import itemgetter
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import torch
from stepserve.models.catalogue import EMBEDDED
from stepserve.pipelines.loading.folders import LoadedModel, load_model

from loadtests.engine_bench import denoiser_step_s, over_neighbours
from loadtests.load import scenarios
from loadtests.load.client import Target, open_session, send_windowed
from loadtests.load.contenders import FULL_QUEUE, contenders, running
from loadtests.load.trace import HOMOGENEOUS, MIXED, TraceRequest, draw_trace
from loadtests.results.facts import take_facts
from loadtests.results.measures import steady_per_s

# Sampling takes CPU time from a machine that has none left.
SAMPLES_PER_S = 15
SETTLE_S = 8.0
FLAME_S = 10
BARE_ROWS = (8, 16, 32)
BARE_S = 4.0
TRACE_REQUESTS = 4000

# What a process is, by its command line.
REPLICA = "replica"
ROLES = (
    (REPLICA, "ray::ServeReplica:stepserve-model"),
    ("ingress", "ray::ServeReplica:stepserve:ingress"),
    ("proxy", "ray::ProxyActor"),
    ("controller", "ray::ServeController"),
    ("Ray's daemons", "ray"),
)
# This side of the wire, in place of process ids.
CLIENT, SPIES = -1, -2
OURS = {CLIENT: "the client that sends the load", SPIES: "py-spy"}
# What a stack of an engine is about: the first of these whose place is in any frame of it.
PARTS = (
    ("denoiser forwards", "unet_2d_condition.py"),
    ("decoding latents", "autoencoder_kl.py"),
    ("encoding prompts", "modeling_clip.py"),
    ("writing image files", "pipelines/requests/images.py"),
    ("scheduler steps", "diffusers/schedulers/"),
    ("diffusers' pipelines, besides", "diffusers/pipelines/"),
    ("engine: stacking and splitting", "engine/calls/stacking.py"),
    ("engine: deciding", "service/stepserve/engine/scheduling/"),
)
# An engine's thread, and the roots of pipelines' own stacks on it.
ENGINE = (
    "service/stepserve/engine/loop/engine.py",
    "service/stepserve/engine/tracks/track.py",
    "pipelines/adapters/cache.py",
)


@dataclass(frozen=True)
class Share:
    """CPU time of one part.

    Args:
        of_machine: of all cores' time.
        ms_per_request: CPU milliseconds.
    """

    part: str
    of_machine: float
    ms_per_request: float


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write."""
    options = parse_options(arguments)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    cores = len(psutil.Process().cpu_affinity())
    contender = contenders(cores)["stepserve"]
    with multiprocessing.get_context("spawn").Pool(cores) as pool:
        by_rows = {rows: bare_rows_per_s(pool, cores, rows) for rows in BARE_ROWS}
        bare = partial(bare_rows_per_s, pool, cores, max(by_rows, key=lambda rows: by_rows[rows]))
        with running(contender, options.out.with_suffix(".log"), more=FULL_QUEUE) as url:
            report = asyncio.run(measure(url, cores, options, bare))
    report |= {"facts": take_facts(), "bare_rows_per_s": by_rows}
    options.out.write_text(json.dumps(report, indent=2))
    print_report(report)
    return 0


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=int, default=30)
    parser.add_argument("--in-flight", type=int, default=32)
    parser.add_argument("--requests", type=int, default=128, help="of each homogeneous run")
    parser.add_argument("--turns", type=int, default=5, help="of the service and the bare denoiser")
    parser.add_argument("--out", type=Path, default=Path("out/breakdown/breakdown.json"))
    options = parser.parse_args(arguments)
    if shutil.which("py-spy", path=str(Path(sys.executable).parent)) is None:
        parser.error("needs py-spy: pip install py-spy")
    return options


async def measure(
    url: str, cores: int, options: argparse.Namespace, bare: Callable[[], float]
) -> dict[str, Any]:
    """Saturate the service, and look at its processes meanwhile."""
    trace = draw_trace(MIXED, TRACE_REQUESTS, seed=0)
    alike = draw_trace(HOMOGENEOUS, options.requests, seed=0)
    async with open_session(Target(url)) as session:
        await scenarios.wait_until_serving(session, trace[0])
        ours, theirs = await in_turns(session, alike, options, bare)
        load = asyncio.create_task(send_windowed(session, trace, options.in_flight))
        await asyncio.sleep(SETTLE_S)
        before = requests_ended(await metrics_of(session))
        processes = roles_of(psutil.Process().children(recursive=True))
        before_s = cpu_s(processes), engine_s(processes)
        stacks, seconds = await asyncio.to_thread(sample, processes, options)
        ended = requests_ended(await metrics_of(session)) - before
        process_s, engine_thread_s = [
            {key: after[key] - known[key] for key in after}
            for known, after in zip(before_s, (cpu_s(processes), engine_s(processes)), strict=True)
        ]
        await asyncio.to_thread(draw_flames, processes, options)
        load.cancel()
    roles = {process.pid: role for process, role in processes.items()} | OURS
    shares = shares_of(roles, process_s, engine_thread_s, stacks, seconds * cores, ended)
    return {
        "seconds": seconds,
        "requests": ended,
        "homogeneous_rows_per_s": statistics.median(ours),
        "over_bare": statistics.median(over_neighbours(ours, theirs)),
        "shares": [vars(share) for share in shares],
    }


async def in_turns(
    session: aiohttp.ClientSession,
    trace: Sequence[TraceRequest],
    options: argparse.Namespace,
    bare: Callable[[], float],
) -> tuple[list[float], list[float]]:
    """Rows a second over HTTP, and of the bare denoiser before the first and after each."""
    ours, theirs = [], [await asyncio.to_thread(bare)]
    for _ in range(options.turns):
        ours.append(await rows_per_second(session, trace, options.in_flight))
        theirs.append(await asyncio.to_thread(bare))
    return ours, theirs


async def rows_per_second(
    session: aiohttp.ClientSession, trace: Sequence[TraceRequest], in_flight: int
) -> float:
    """Denoiser rows a second of requests that are all alike, while the service is saturated."""
    outcomes = await send_windowed(session, trace, in_flight)
    per_s = steady_per_s(outcomes, [1.0] * len(trace), in_flight)
    if per_s is None:
        raise ValueError(f"{len(trace)} requests are too few for {in_flight} in flight")
    return trace[0].rows * trace[0].denoiser_calls * per_s


async def metrics_of(session: aiohttp.ClientSession) -> str:
    """The page of metrics."""
    async with session.get("/metrics") as response:
        return await response.text()


def requests_ended(metrics: str) -> float:
    """Image requests that were answered since the service started."""
    lines = [line for line in metrics.splitlines() if line.startswith("stepserve_requests_total")]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def roles_of(processes: Iterable[psutil.Process]) -> dict[psutil.Process, str]:
    """What each process of the service is; others are left out."""
    found = {}
    for process in processes:
        try:
            command = " ".join(process.cmdline())
        except psutil.Error:
            continue
        role = next((role for role, sign in ROLES if sign in command), None)
        if role is not None and process.pid != psutil.Process().pid:
            found[process] = role
    return found


def cpu_s(processes: Iterable[psutil.Process]) -> dict[int, float]:
    """CPU seconds that each has used, by process id, and what this side of the wire has."""
    served = {p.pid: sum(p.cpu_times()[:2]) for p in processes}
    return served | {CLIENT: time.process_time(), SPIES: spies_s()}


def spies_s() -> float:
    """CPU seconds that py-spy has used so far."""
    return sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])


def engine_s(processes: Mapping[psutil.Process, str]) -> dict[int, float]:
    """CPU seconds that the engine thread of each replica has used, by process id."""
    return {p.pid: _nicest_s(p) for p, role in processes.items() if role == REPLICA}


def _nicest_s(process: psutil.Process) -> float:
    """CPU seconds of the threads that step back behind all others, as engines do."""
    used_s: Counter[int] = Counter()
    for thread in process.threads():
        niceness = os.getpriority(os.PRIO_PROCESS, thread.id)
        used_s[niceness] += thread.user_time + thread.system_time
    return used_s[max(used_s)]


def sample(
    processes: Mapping[psutil.Process, str], options: argparse.Namespace
) -> tuple[dict[int, Counter[tuple[str, ...]]], float]:
    """Stacks of the Python processes, by process id, and for how many seconds."""
    watched = [p for p, role in processes.items() if role != "Ray's daemons"]
    files = {p.pid: options.out.with_name(f"stacks-{p.pid}.txt") for p in watched}
    started_s = time.monotonic()
    spies = [
        start_spy(pid, "raw", file, options.seconds, "--full-filenames")
        for pid, file in files.items()
    ]
    for spy in spies:
        spy.wait()
    seconds = time.monotonic() - started_s
    return {pid: read_stacks(file) for pid, file in files.items() if file.exists()}, seconds


def draw_flames(processes: Mapping[psutil.Process, str], options: argparse.Namespace) -> None:
    """Images of a replica's and of the ingress's stacks."""
    for wanted in (REPLICA, "ingress"):
        pid = next(process.pid for process, role in processes.items() if role == wanted)
        file = options.out.with_name(f"flame-{wanted}.svg")
        if start_spy(pid, "flamegraph", file, FLAME_S).wait():
            raise RuntimeError(f"py-spy could not draw {file}")
        # Its title is the command that drew it.
        file.write_text(file.read_text().replace(f"{Path(sys.executable).parent}/", ""))


def start_spy(
    pid: int, format_name: str, file: Path, seconds: int, *more: str
) -> subprocess.Popen[bytes]:
    """py-spy, beside a process, for some seconds."""
    spy = str(Path(sys.executable).with_name("py-spy"))
    when = ["--pid", str(pid), "--duration", str(seconds), "--rate", str(SAMPLES_PER_S)]
    # Else it stops the process each time it looks.
    when.append("--nonblocking")
    what = ["--format", format_name, "--output", str(file), "--nolineno", *more]
    silent = subprocess.DEVNULL
    return subprocess.Popen([spy, "record", *when, *what], stdout=silent, stderr=silent)


def read_stacks(file: Path) -> Counter[tuple[str, ...]]:
    """Samples by stack, outermost frame first."""
    stacks: Counter[tuple[str, ...]] = Counter()
    for line in file.read_text().splitlines():
        frames, _, count = line.rpartition(" ")
        stacks[tuple(frames.split(";"))] += int(count)
    return stacks


def part_of(stack: Sequence[str]) -> str:
    """What a stack of an engine is about."""
    for part, place in PARTS:
        if any(place in frame for frame in stack):
            return part
    return "engine, besides"


def shares_of(
    roles: Mapping[int, str],
    used_s: Mapping[int, float],
    engines_s: Mapping[int, float],
    stacks: Mapping[int, Counter[tuple[str, ...]]],
    machine_s: float,
    requests: float,
) -> list[Share]:
    """CPU time by part: an engine's divided by its samples, that of others as a whole.

    Args:
        roles: of processes, by id, as all that follows.
        used_s: CPU seconds.
        engines_s: those of them that engine threads had.
        stacks: samples.
        machine_s: seconds times cores.
        requests: answered meanwhile.
    """
    seconds: dict[str, float] = defaultdict(float)
    for pid, cpu in used_s.items():
        engine = engines_s.get(pid, 0.0)
        seconds["Ray and events in the replica" if engine else roles[pid]] += cpu - engine
        samples: Counter[str] = Counter()
        for stack, count in stacks.get(pid, Counter()).items():
            if any(place in frame for place in ENGINE for frame in stack):
                samples[part_of(stack)] += count
        for part, count in samples.items():
            seconds[part] += engine * count / samples.total()
    seconds["nobody"] = machine_s - sum(seconds.values())
    return [
        Share(part, cpu / machine_s, 1000 * cpu / max(requests, 1))
        for part, cpu in sorted(seconds.items(), key=itemgetter(1), reverse=True)
    ]


def bare_rows_per_s(pool: Pool, cores: int, rows: int) -> float:
    """Denoiser rows a second of nothing but forwards, one process of one thread on each core."""
    return sum(pool.map(bare_loop, [rows] * cores, chunksize=1))


@cache
def resident_model() -> LoadedModel:
    """Loaded once in each process."""
    return load_model("emoji", EMBEDDED)


def bare_loop(rows: int) -> float:
    """Rows a second of one thread that does nothing else."""
    torch.set_num_threads(1)
    model = resident_model()
    # As the engine runs it.
    with torch.inference_mode():
        step_s = denoiser_step_s(model, rows, repeats=5)
        repeats = max(int(BARE_S / step_s), 5)
        # Those that were held up count for a rate.
        return rows / denoiser_step_s(model, rows, repeats, statistics.mean)


def print_report(report: dict[str, Any]) -> None:
    """For people."""
    print(f"{report['requests']:.0f} requests in {report['seconds']:.0f} s")
    for share in report["shares"]:
        print(
            f"  {share['part']:32}{share['of_machine']:7.1%}"
            f"{share['ms_per_request']:9.1f} ms a request"
        )
    print(f"requests of 20 steps, all alike: {report['homogeneous_rows_per_s']:.0f} rows a second")
    for rows, rate in report["bare_rows_per_s"].items():
        print(f"bare denoiser, {rows} rows: {rate:.0f} rows a second")
    print(f"over HTTP / bare, in turns: {report['over_bare']:.2f}")


if __name__ == "__main__":
    raise SystemExit(main())
