"""Every metric of the service by name: the one table that recording, `/metrics` and docs share.

Names follow Prometheus' conventions: base units, `_total` for counters. Labels are bounded: models
that are served, routes that exist, codes of the error table; never a prompt, a seed or an id of a
request.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """Kinds of metrics, as Prometheus knows them."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True)
class Metric:
    """One metric: its name in full, what it means, and what its series differ in."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        assert (self.kind is Kind.COUNTER) == self.name.endswith("_total")
        assert (self.kind is Kind.HISTOGRAM) == bool(self.buckets)


LATENCY_BUCKETS_S = (
    *(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
    *(20.0, 30.0, 60.0, 120.0, 300.0, 600.0),
)
ROW_BUCKETS = (1.0, 2.0, 4.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0, 64.0, 128.0)
SHARE_BUCKETS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
ERROR_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


def _counter(name: str, text: str, *labels: str) -> Metric:
    return Metric(f"stepserve_{name}_total", Kind.COUNTER, text, labels)


def _gauge(name: str, text: str, *labels: str) -> Metric:
    return Metric(f"stepserve_{name}", Kind.GAUGE, text, labels)


def _histogram(name: str, buckets: tuple[float, ...], text: str, *labels: str) -> Metric:
    return Metric(f"stepserve_{name}", Kind.HISTOGRAM, text, labels, buckets)


# Seen by the ingress: what clients get.
HTTP_REQUESTS = _counter(
    "http_requests",
    "HTTP requests served, by route, model, status and outcome (ok, or the code of the error).",
    *("route", "model", "status", "outcome"),
)
HTTP_SECONDS = _histogram(
    "http_request_duration_seconds",
    LATENCY_BUCKETS_S,
    "Seconds from the arrival of an HTTP request to the last byte of its response.",
    *("route", "model"),
)
REFUSALS = _counter(
    "refusals", "Requests refused with 429 or 503 before any work, by reason.", "model", "reason"
)

# Seen by a replica: what became of accepted requests.
REQUESTS = _counter(
    "requests",
    "Accepted requests that ended, by outcome (finished, failed, cancelled, expired).",
    *("model", "outcome"),
)
IMAGES = _counter("images", "Images of finished requests.", "model")
CONTENT_FILTERED = _counter(
    "content_filtered_images",
    "Images that the model's own safety checker withheld.",
    "model",
)
QUEUE_SECONDS = _histogram(
    "queue_wait_seconds",
    LATENCY_BUCKETS_S,
    "Seconds from the acceptance of a request to the start of its pipeline call.",
    "model",
)
FIRST_STEP_SECONDS = _histogram(
    "time_to_first_step_seconds",
    LATENCY_BUCKETS_S,
    "Seconds from the acceptance of a request to its first denoising step.",
    "model",
)
STAGE_SECONDS = _histogram(
    "stage_duration_seconds",
    LATENCY_BUCKETS_S,
    "Seconds that finished requests spent in forwards of a stage (encode, denoise, decode).",
    *("model", "stage"),
)
REQUEST_SECONDS = _histogram(
    "request_duration_seconds",
    LATENCY_BUCKETS_S,
    "Seconds from the acceptance of a request to its end in the engine.",
    *("model", "outcome"),
)
DEADLINES = _counter(
    "deadlines", "Requests with a deadline that ended, by result (met, missed).", "model", "result"
)
STEPS_SAVED = _counter(
    "cancelled_steps_saved",
    "Denoising steps that were not run because the request was cancelled or expired.",
    "model",
)

# Seen by a replica: what the engine does.
FORWARDS = _counter("forwards", "Forwards of the model's modules.", "model", "stage")
CALLS = _counter(
    "forward_calls", "Module calls of requests, batched into forwards.", "model", "stage"
)
ROWS = _counter("rows", "Rows of requests in forwards, without padding.", "model", "stage")
PADDED_ROWS = _counter(
    "padded_rows", "Padding rows of forwards, which belong to no request.", "model", "stage"
)
FORWARD_SECONDS = _counter("forward_seconds", "Seconds spent inside forwards.", "model", "stage")
BUSY_SECONDS = _counter(
    "engine_busy_seconds", "Seconds that the engine was busy, forwards included.", "model"
)
STEPS = _counter(
    "denoising_steps",
    "Denoising steps that ran, of all requests; not those that a step cache skipped.",
    "model",
)
SKIPPED_CALLS = _counter(
    "skipped_denoiser_calls",
    "Denoiser calls of ended requests that their step cache skipped, by its method.",
    *("model", "method"),
)
BATCH_ROWS = _histogram(
    "batch_rows", ROW_BUCKETS, "Rows of requests in one forward.", "model", "stage"
)
OCCUPANCY = _histogram(
    "batch_occupancy_ratio",
    SHARE_BUCKETS,
    "Rows of a denoiser forward as a share of the row limit at that time.",
    "model",
)
RETRIES = _counter(
    "forward_retries", "Batched forwards that raised and were run again in halves.", "model"
)
OUT_OF_MEMORY = _counter("out_of_memory", "Forwards that ran out of device memory.", "model")
COST_ERROR = _histogram(
    "cost_model_error_ratio",
    ERROR_BUCKETS,
    "Relative error of the predicted seconds of a forward.",
    *("model", "stage"),
)
REQUEST_RETRIES = _counter(
    "request_retries", "Requests retried on another replica because theirs was lost.", "model"
)

# How things stand. A replica's values vanish some seconds after the replica.
BACKLOG_SECONDS = _gauge(
    "backlog_seconds",
    "Estimated seconds until all requests in flight are finished.",
    "model",
    "replica",
)
IN_FLIGHT = _gauge("requests_in_flight", "Requests accepted and not yet ended.", "model", "replica")
IMAGES_PENDING = _gauge(
    "images_pending", "Images of requests accepted and not yet ended.", "model", "replica"
)
IMAGE_LIMIT = _gauge(
    "images_limit", "Most images pending; requests beyond it are refused.", "model", "replica"
)
ROW_LIMIT = _gauge("row_limit", "Most rows of one shared denoiser forward.", "model", "replica")
REPLICA_STARTS = _counter(
    "replica_starts", "Replicas that finished their warm-up, restarts included.", "model"
)
LOAD_SECONDS = _gauge(
    "model_load_seconds",
    "Seconds that a replica took to load the model and warm up.",
    "model",
    "replica",
)
MEMORY_BYTES = _gauge(
    "device_memory_bytes",
    "Memory of a replica's device, by kind: allocated and reserved by torch, used by all "
    "processes, and total on accelerators; resident (of the process) on CPU. Of it, controls is "
    "the weights of control networks that are loaded, and adapters the files of LoRA adapters that "
    "are loaded and what is stacked of them for rows.",
    *("model", "replica", "kind"),
)
BUILD = _gauge("build_info", "Always 1; the labels say which version runs.", "version", "process")

METRICS = tuple(value for value in dict(globals()).values() if isinstance(value, Metric))
