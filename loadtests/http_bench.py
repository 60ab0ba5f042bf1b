"""What HTTP and Ray Serve add to one request on an idle server, beside the plain pipeline call.

    python -m loadtests.http_bench [--repeats 20] [--url http://127.0.0.1:8000]

Without --url a service is started for the measurement. Plain calls and HTTP requests take turns.
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
from stepserve.domain.requests import GenerationRequest
from stepserve.models.catalogue import EMBEDDED
from stepserve.pipelines.loading.folders import load_model

from loadtests.engine_bench import mixed_requests, plain_call

READY_TIMEOUT_S = 180
STEPS = 20


@contextmanager
def running_service() -> Iterator[str]:
    """A service on a free port of this machine, stopped at the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "stepserve.cli", "serve", "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_ready(url)
        yield url
    finally:
        process.terminate()
        process.wait(60)


def wait_until_ready(url: str) -> None:
    """Poll /readyz."""
    deadline_s = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline_s:
        try:
            if httpx.get(f"{url}/readyz", trust_env=False).status_code == httpx.codes.OK:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise TimeoutError(f"{url} was not ready within {READY_TIMEOUT_S} s")


def http_call(client: httpx.Client, request: GenerationRequest) -> None:
    """The same request as JSON."""
    response = client.post(
        "/v1/images/generations",
        json={
            "prompt": request.prompt,
            "seed": request.seed,
            "num_inference_steps": request.num_inference_steps,
            "guidance_scale": request.guidance_scale,
            "scheduler": request.scheduler,
        },
    )
    response.raise_for_status()


def measure(url: str, pipeline: Any, repeats: int) -> dict[str, Any]:
    """Medians of `repeats` plain calls and HTTP requests in turns."""
    request = replace(mixed_requests()[0], num_inference_steps=STEPS, guidance_scale=4.0)
    plain_s, http_s = [], []
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
        for turn in range(-3, repeats):
            seconds = [_timed(plain_call, pipeline, request), _timed(http_call, client, request)]
            if turn >= 0:
                plain_s.append(seconds[0])
                http_s.append(seconds[1])
    plain, http = statistics.median(plain_s), statistics.median(http_s)
    return {"plain_s": plain, "http_s": http, "added_ms": 1000 * (http - plain)}


def _timed(call: Any, *args: Any) -> float:
    started_s = time.perf_counter()
    call(*args)
    return time.perf_counter() - started_s


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--url")
    parser.add_argument("--out", type=Path, default=Path("out/bench-http.json"))
    options = parser.parse_args()
    pipeline = load_model("emoji", EMBEDDED).pipeline
    if options.url:
        report = measure(options.url, pipeline, options.repeats)
    else:
        with running_service() as url:
            report = measure(url, pipeline, options.repeats)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2))
    print(f"{'single request, plain call':36}{1000 * report['plain_s']:>11.1f} ms")
    print(f"{'single request through HTTP':36}{1000 * report['http_s']:>11.1f} ms")
    print(f"{'added by HTTP and Ray Serve':36}{report['added_ms']:>11.1f} ms   <= 40 ms")


if __name__ == "__main__":
    main()
