"""Looks at a running service as a client sees it, and says what to do where something is wrong."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from stepserve import __version__
from stepserve.usual_bodies import usual_body

IMAGE_TIMEOUT_S = 300.0
TIMEOUT_S = 10.0
MOST_CLOCK_SKEW_S = 5.0
MOST_RESIDENT_SHARE = 0.9


@dataclass(frozen=True)
class Finding:
    """What one check found; `advice` says what to do where it is not well."""

    name: str
    well: bool
    told: str
    advice: str = ""


Check = Callable[[httpx.Client], Finding]


def examine(url: str, api_key: str | None = None) -> Iterator[Finding]:
    """Check a service step by step. Ends early where nobody answers."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    with httpx.Client(base_url=url, headers=headers, timeout=TIMEOUT_S, trust_env=False) as client:
        for check in CHECKS:
            finding = _try(check, client)
            yield finding
            if check is _reachability and not finding.well:
                return


def _try(check: Check, client: httpx.Client) -> Finding:
    try:
        return check(client)
    except (httpx.HTTPError, ValueError, KeyError) as error:
        told = f"{type(error).__name__}: {error}"
        if isinstance(error, httpx.HTTPStatusError):
            told = _refusal(error.response)
        return Finding(check.__name__.removeprefix("_"), False, told, _advice(client, error))


def _refusal(response: httpx.Response) -> str:
    """What an answer says of an error, in the service's own words where it has some."""
    status = f"status {response.status_code}"
    try:
        message = response.json()["error"]["message"]
    except (ValueError, LookupError, TypeError):
        return f"{status} from {response.request.url}"
    return f"{message} ({status}, request {response.headers.get('x-request-id', 'without an id')})"


def _advice(client: httpx.Client, error: Exception) -> str:
    if isinstance(error, httpx.ConnectError):
        return f"nobody listens at {client.base_url}: is the service started, and this its address?"
    if isinstance(error, httpx.TimeoutException):
        return "it takes too long to answer: see docs/runbooks/stepserve-down.md"
    if isinstance(error, httpx.HTTPStatusError) and error.response.status_code == 401:
        return "give an API key: --api-key, or STEPSERVE_API_KEY"
    return "the log of the service says more, under the request id of the answer"


def _get(client: httpx.Client, path: str) -> httpx.Response:
    return client.get(path).raise_for_status()


def _reachability(client: httpx.Client) -> Finding:
    started_s = time.perf_counter()
    _get(client, "/healthz")
    elapsed_ms = (time.perf_counter() - started_s) * 1000
    return Finding("reachability", True, f"{client.base_url} answers in {elapsed_ms:.0f} ms")


def _version(client: httpx.Client) -> Finding:
    served = _get(client, "/healthz").json()["version"]
    advice = f"this command is of {__version__}: use the service's own, or upgrade one of them"
    return Finding("version", served == __version__, f"the service is {served}", advice)


def _clock(client: httpx.Client) -> Finding:
    given = _get(client, "/healthz").headers.get("date")
    if given is None:
        return Finding("clock", True, "the service does not tell its time")
    skew_s = abs(parsedate_to_datetime(given).timestamp() - time.time())
    advice = "set the clocks by NTP: signed links and log lines rest on them"
    return Finding("clock", skew_s <= MOST_CLOCK_SKEW_S, f"{skew_s:.0f} s apart", advice)


def _readiness(client: httpx.Client) -> Finding:
    response = client.get("/readyz")
    if response.status_code != httpx.codes.OK:
        message = response.json()["error"]["message"]
        return Finding("readiness", False, message, "see docs/runbooks/no-replica.md")
    models = _get(client, "/v1/models").json()["data"]
    told = ", ".join(f"{model['id']} on {_device(model)}" for model in models)
    return Finding("readiness", True, told)


def _results(client: httpx.Client) -> Finding:
    # A service that is not ready tells nothing of it.
    told = client.get("/readyz").json().get("results", "")
    advice = "make room in results.address, or let the service write there: docs/operations.md"
    return Finding("results", not told, told or "links to images can be made", advice)


def _device(model: dict[str, dict[str, str] | None]) -> str:
    fingerprint = model.get("fingerprint")
    return fingerprint["device"] if fingerprint else "an unknown device"


def _metrics(client: httpx.Client) -> Finding:
    values = _samples(_get(client, "/metrics").text)
    missing = values.get("stepserve_metrics_unreachable_nodes", 0.0)
    told = f"{len(values)} series of ours" + (f", {missing:.0f} nodes missing" if missing else "")
    return Finding("metrics", not missing, told, "see docs/runbooks/metrics-missing.md")


def _memory(client: httpx.Client) -> Finding:
    values = _samples(_get(client, "/metrics").text)
    by_kind = {
        kind: sum(
            value
            for name, value in values.items()
            if name.startswith("stepserve_device_memory_bytes") and f'kind="{kind}"' in name
        )
        for kind in ("resident", "used", "total")
    }
    used_bytes, total_bytes = by_kind["used"] or by_kind["resident"], by_kind["total"]
    told = f"{used_bytes / 2**30:.1f} GiB in use"
    if not total_bytes:
        return Finding("memory", True, told)
    well = used_bytes <= MOST_RESIDENT_SHARE * total_bytes
    told = f"{told} of {total_bytes / 2**30:.1f}"
    return Finding("memory", well, told, "see docs/runbooks/out-of-memory.md")


def _image(client: httpx.Client) -> Finding:
    body = _image_body(client)
    if body is None:
        return Finding("image", True, "not tried: every model needs an image to begin with")
    started_s = time.perf_counter()
    response = client.post("/v1/images/generations", json=body, timeout=IMAGE_TIMEOUT_S)
    response.raise_for_status()
    elapsed_s = time.perf_counter() - started_s
    return Finding("image", bool(response.json()["data"]), f"made in {elapsed_s:.2f} s")


def _image_body(client: httpx.Client) -> dict[str, Any] | None:
    """What to ask for: of the default model where none is known, else of one that can be asked."""
    response = client.get("/v1/models")
    models = response.json()["data"] if response.status_code == httpx.codes.OK else []
    bodies = ((model["id"], usual_body(model, "red heart")) for model in models)
    found = next(({"model": name, **body} for name, body in bodies if body is not None), None)
    if models and found is None:
        return None
    # Without a priority: a key may be kept from asking for one.
    return {"num_inference_steps": 4, **(found or {"prompt": "red heart"})}


def _samples(page: str) -> dict[str, float]:
    lines = (line for line in page.splitlines() if line.startswith("stepserve_"))
    pairs = (line.rsplit(" ", 1) for line in lines)
    return {name: float(value) for name, value in pairs}


CHECKS: tuple[Check, ...] = (
    _reachability,
    _version,
    _clock,
    _readiness,
    _results,
    _metrics,
    _memory,
    _image,
)
