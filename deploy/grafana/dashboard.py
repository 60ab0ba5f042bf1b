"""Writes stepserve.json: `python deploy/grafana/dashboard.py`.

It is read from top to bottom: are users served, how full are the batches, where does time go,
is it scaling.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("stepserve.json")
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
WIDTH, HEIGHT, PANELS_A_ROW = 8, 8, 3
MODEL = 'model=~"$model"'
IMAGES = f'route=~"/v1/images/.*", {MODEL}'
RATE = "[$__rate_interval]"


@dataclass(frozen=True)
class Panel:
    """One panel: queries by legend, and how values are shown."""

    title: str
    help: str
    queries: dict[str, str]
    unit: str = "short"
    kind: str = "timeseries"
    stacked: bool = False
    most: float | None = None
    thresholds: dict[str, float] = field(default_factory=dict)


def rate(name: str, *by: str, labels: str = MODEL) -> str:
    """The rate of a counter, summed up by labels."""
    return (
        f"sum by ({', '.join(by or ('model',))}) (rate(stepserve_{name}_total{{{labels}}}{RATE}))"
    )


def quantile(share: float, name: str, *by: str, labels: str = MODEL) -> str:
    """A quantile of a histogram."""
    groups = ", ".join((*(by or ("model",)), "le"))
    buckets = f"rate(stepserve_{name}_bucket{{{labels}}}{RATE})"
    return f"histogram_quantile({share}, sum by ({groups}) ({buckets}))"


SERVED = (
    Panel(
        "Requests by outcome",
        "HTTP requests for images a second. Investigate every outcome but ok.",
        {"{{model}} {{outcome}}": rate("http_requests", "model", "outcome", labels=IMAGES)},
        "reqps",
        stacked=True,
    ),
    Panel(
        "Failing share",
        "Responses with 5xx as a share of all, missed deadlines apart. Alert: StepserveErrors.",
        {"{{model}}": f"stepserve:http_errors:ratio_rate5m{{{MODEL}}}"},
        "percentunit",
        thresholds={"red": 0.02},
    ),
    Panel(
        "Seconds to the image",
        "From acceptance to the finished image.",
        {
            "{{model}} p50": quantile(0.5, "request_duration_seconds"),
            "{{model}} p95": quantile(0.95, "request_duration_seconds"),
        },
        "s",
    ),
    Panel(
        "Seconds to the first step",
        "From acceptance to the first denoising step: joining the running batch takes one step.",
        {
            "{{model}} p50": quantile(0.5, "time_to_first_step_seconds"),
            "{{model}} p95": quantile(0.95, "time_to_first_step_seconds"),
        },
        "s",
    ),
    Panel(
        "Refusals by reason",
        "server_full: more replicas are needed. not_ready: none is warm. rate_limit_exceeded: "
        "an API key is used up. Withheld: images that the model's own safety checker flagged.",
        {
            "{{model}} {{reason}}": rate("refusals", "model", "reason", labels='model=~"$model|"'),
            "{{model}} withheld": rate("content_filtered_images", "model"),
        },
        "reqps",
        stacked=True,
    ),
    Panel(
        "Deadlines",
        "Requests with a deadline, by whether it was met. Alert: StepserveDeadlinesMissed.",
        {"{{model}} {{result}}": rate("deadlines", "model", "result")},
        "reqps",
        stacked=True,
    ),
)
BATCHES = (
    Panel(
        "Rows of a forward",
        "Rows that share one forward, on average. Guidance takes two rows an image.",
        {
            "{{model}} {{stage}}": f"{rate('rows', 'model', 'stage')} / "
            f"{rate('forwards', 'model', 'stage')}"
        },
    ),
    Panel(
        "Occupancy of denoiser forwards",
        "Rows as a share of the row limit. Low while requests wait: they do not share.",
        {
            "{{model}} p50": quantile(0.5, "batch_occupancy_ratio"),
            "{{model}} p90": quantile(0.9, "batch_occupancy_ratio"),
        },
        "percentunit",
        most=1,
    ),
    Panel(
        "Denoising steps and images",
        "Steps of all requests a second, those that step caches skipped, and finished images.",
        {
            "{{model}} steps": rate("denoising_steps"),
            "{{model}} skipped": rate("skipped_denoiser_calls"),
            "{{model}} images": rate("images"),
        },
        "ops",
    ),
    Panel(
        "Padded rows",
        "Padding rows, which belong to no request, as a share of all rows.",
        # Where nothing was ever padded there is no such series.
        {
            "{{model}}": f"1 - {rate('rows')} / (({rate('rows')} + {rate('padded_rows')})"
            f" or {rate('rows')})"
        },
        "percentunit",
        most=1,
    ),
    Panel(
        "Repeated forwards",
        "Shared forwards that raised, those without enough memory, and requests whose replica was "
        "lost.",
        {
            "{{model}} repeated": rate("forward_retries"),
            "{{model}} memory": rate("out_of_memory"),
            "{{model}} replica lost": rate("request_retries"),
        },
        "ops",
    ),
    Panel(
        "Steps saved by cancelling",
        "Steps that were not run because the client had left or the deadline had passed.",
        {"{{model}}": rate("cancelled_steps_saved")},
        "ops",
    ),
)
TIME = (
    Panel(
        "Seconds in the queue",
        "From acceptance to the start of the pipeline call; the first to grow under overload.",
        {
            "{{model}} p50": quantile(0.5, "queue_wait_seconds"),
            "{{model}} p95": quantile(0.95, "queue_wait_seconds"),
        },
        "s",
    ),
    Panel(
        "Stages of a request, p50",
        "Seconds in forwards of each stage; they are shared with others.",
        {"{{model}} {{stage}}": quantile(0.5, "stage_duration_seconds", "model", "stage")},
        "s",
        stacked=True,
    ),
    Panel(
        "Forwards a second of device time",
        "Seconds inside forwards, by stage, as a share of each second and replica.",
        {
            "{{model}} {{stage}}": f"{rate('forward_seconds', 'model', 'stage')} / on (model) "
            f"group_left () count by (model) (stepserve_row_limit{{{MODEL}}})"
        },
        "percentunit",
        stacked=True,
    ),
    Panel(
        "Engines busy",
        "Share of the time that engines are busy. Near 100 %, more load only makes queues longer.",
        {"{{model}}": f"stepserve:engine_busy:ratio_rate5m{{{MODEL}}}"},
        "percentunit",
        most=1,
    ),
    Panel(
        "Engine time outside forwards",
        "Share of the engine's busy time that stacking, splitting and schedulers take.",
        {"{{model}}": f"1 - {rate('forward_seconds')} / {rate('engine_busy_seconds')}"},
        "percentunit",
        most=1,
    ),
    Panel(
        "Error of the cost model",
        "Relative error of the predicted seconds of a forward. Alert: StepserveCostModelWrong.",
        {"{{model}} {{stage}} p50": quantile(0.5, "cost_model_error_ratio", "model", "stage")},
        "percentunit",
    ),
)
SCALING = (
    Panel(
        "Warm replicas",
        "Replicas that reported in the last seconds.",
        {"{{model}}": f"count by (model) (stepserve_row_limit{{{MODEL}}})"},
    ),
    Panel(
        "Backlog",
        "Estimated seconds until all requests in flight are finished: what autoscaling follows.",
        {"{{model}} {{replica}}": f"stepserve_backlog_seconds{{{MODEL}}}"},
        "s",
    ),
    Panel(
        "Images pending",
        "As a share of the limit beyond which requests are refused.",
        {
            "{{model}} {{replica}}": f"stepserve_images_pending{{{MODEL}}} / "
            f"stepserve_images_limit{{{MODEL}}}"
        },
        "percentunit",
        most=1,
        thresholds={"red": 0.9},
    ),
    Panel(
        "Starts of replicas",
        "In the last half hour. Alert: StepserveRestarts.",
        {"{{model}}": f"sum by (model) (increase(stepserve_replica_starts_total{{{MODEL}}}[30m]))"},
    ),
    Panel(
        "Seconds to load a model",
        "Loading and warming up: how much later than needed a new replica helps.",
        {"{{model}} {{replica}}": f"stepserve_model_load_seconds{{{MODEL}}}"},
        "s",
    ),
    Panel(
        "Memory of devices",
        "On CPU that of the process.",
        {"{{model}} {{replica}} {{kind}}": f"stepserve_device_memory_bytes{{{MODEL}}}"},
        "bytes",
    ),
)
ROWS = {
    "Are users served?": SERVED,
    "How full are the batches?": BATCHES,
    "Where does time go?": TIME,
    "Is it scaling?": SCALING,
}


def dashboard() -> dict[str, Any]:
    """The dashboard as Grafana imports it."""
    return {
        "uid": "stepserve",
        "title": "Stepserve",
        "tags": ["stepserve"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {"list": _variables()},
        "panels": _panels(),
    }


def _variables() -> list[dict[str, Any]]:
    query = "label_values(stepserve_requests_in_flight, model)"
    return [
        {"name": "datasource", "type": "datasource", "query": "prometheus"},
        {
            "name": "model",
            "type": "query",
            "datasource": SOURCE,
            "query": query,
            "definition": query,
            "refresh": 2,
            "multi": True,
            "includeAll": True,
            "allValue": ".+",
            "current": {"text": "All", "value": "$__all"},
        },
    ]


def _panels() -> list[dict[str, Any]]:
    drawn: list[dict[str, Any]] = []
    y = 0
    for title, panels in ROWS.items():
        place = {"x": 0, "y": y, "w": WIDTH * PANELS_A_ROW, "h": 1}
        drawn.append({"type": "row", "title": title, "gridPos": place, "panels": []})
        y += 1
        for index, panel in enumerate(panels):
            line, column = divmod(index, PANELS_A_ROW)
            place = {"x": column * WIDTH, "y": y + line * HEIGHT, "w": WIDTH, "h": HEIGHT}
            drawn.append(_panel(panel) | {"gridPos": place})
        y += -(-len(panels) // PANELS_A_ROW) * HEIGHT
    return [panel | {"id": number} for number, panel in enumerate(drawn, 1)]


def _panel(panel: Panel) -> dict[str, Any]:
    targets = [
        {"refId": chr(ord("A") + i), "datasource": SOURCE, "expr": expr, "legendFormat": legend}
        for i, (legend, expr) in enumerate(panel.queries.items())
    ]
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.help,
        "datasource": SOURCE,
        "targets": targets,
        "fieldConfig": {"defaults": _defaults(panel), "overrides": []},
        "options": {
            "legend": {"displayMode": "list", "placement": "bottom"},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
    }


def _defaults(panel: Panel) -> dict[str, Any]:
    steps = [{"color": "green", "value": None}]
    steps += [{"color": colour, "value": value} for colour, value in panel.thresholds.items()]
    custom: dict[str, Any] = {"fillOpacity": 10, "showPoints": "never"}
    if panel.stacked:
        custom |= {"stacking": {"mode": "normal", "group": "A"}, "fillOpacity": 40}
    if panel.thresholds:
        custom["thresholdsStyle"] = {"mode": "line"}
    defaults: dict[str, Any] = {
        "unit": panel.unit,
        "min": 0,
        "custom": custom,
        "thresholds": {"mode": "absolute", "steps": steps},
    }
    return defaults if panel.most is None else defaults | {"max": panel.most}


if __name__ == "__main__":
    FILE.write_text(json.dumps(dashboard(), indent=2) + "\n")
