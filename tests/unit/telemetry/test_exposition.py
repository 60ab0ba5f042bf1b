from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families
from stepserve.telemetry.exposition import merge

SCOPE = 'otel_scope_name="x",otel_scope_version=""'


def page(worker: str, count: int, node: str = "10.0.0.1") -> str:
    labels = f'Component="w",NodeAddress="{node}",Version="2",WorkerId="{worker}",model="e",{SCOPE}'
    return f"""\
# HELP ray_stepserve_images_total Images.
# TYPE ray_stepserve_images_total counter
ray_stepserve_images_total{{{labels}}} {count}.0
# HELP ray_stepserve_queue_wait_seconds Wait.
# TYPE ray_stepserve_queue_wait_seconds histogram
ray_stepserve_queue_wait_seconds_bucket{{{labels},le="1.0"}} {count}.0
ray_stepserve_queue_wait_seconds_bucket{{{labels},le="+Inf"}} {count}.0
ray_stepserve_queue_wait_seconds_count{{{labels}}} {count}.0
ray_stepserve_queue_wait_seconds_sum{{{labels}}} {count}.5
# HELP ray_stepserve_queue_wait_seconds_exact_sum_total Exact sum.
# TYPE ray_stepserve_queue_wait_seconds_exact_sum_total counter
ray_stepserve_queue_wait_seconds_exact_sum_total{{{labels}}} 0.25
# HELP ray_stepserve_row_limit Limit of "rows" \\\\ more.
# TYPE ray_stepserve_row_limit gauge
ray_stepserve_row_limit{{{labels},replica="{worker}"}} 16.0
# HELP ray_node_cpu_count Not ours.
# TYPE ray_node_cpu_count gauge
ray_node_cpu_count{{{labels}}} 2.0
# HELP ray_serve_num_http_requests_total Serve's.
# TYPE ray_serve_num_http_requests_total counter
ray_serve_num_http_requests_total{{{labels}}} 4.0
"""


def samples(text: str) -> dict[tuple[str, ...], float]:
    return {
        (s.name, *sorted(f"{k}={v}" for k, v in s.labels.items())): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }


def joined(*pages: str) -> str:
    """As an agent tells it: each family once, with the series of all processes."""
    lines: dict[str, list[str]] = {}
    for text in pages:
        for line in text.splitlines():
            name = line.split()[2] if line.startswith("#") else line.split("{")[0]
            kept = lines.setdefault(name, [])
            if line not in kept:
                kept.append(line)
    return "\n".join(line for kept in lines.values() for line in kept) + "\n"


def test_processes_of_a_node_are_added_up_and_nodes_stay_apart():
    first = joined(page("a", 3), page("b", 4))
    merged = samples(merge({"10.0.0.1": first, "10.0.0.2": page("c", 5, "10.0.0.2")}))

    images = "stepserve_images_total"
    assert merged[images, "model=e", "node=10.0.0.1"] == 7
    assert merged[images, "model=e", "node=10.0.0.2"] == 5
    wait = "stepserve_queue_wait_seconds"
    assert merged[f"{wait}_bucket", "le=1.0", "model=e", "node=10.0.0.1"] == 7
    assert merged[f"{wait}_count", "model=e", "node=10.0.0.1"] == 7


def test_sums_of_histograms_are_the_exact_ones():
    merged = samples(merge({"n": joined(page("a", 3), page("b", 4))}))

    assert merged["stepserve_queue_wait_seconds_sum", "model=e", "node=n"] == 0.5
    assert not any("exact" in key[0] for key in merged)


def test_gauges_of_replicas_stay_apart():
    merged = samples(merge({"n": joined(page("a", 3), page("b", 4))}))

    for replica in "ab":
        assert merged["stepserve_row_limit", "model=e", "node=n", f"replica={replica}"] == 16


def test_only_ours_and_serves():
    names = {key[0] for key in samples(merge({"n": page("a", 1)}))}

    assert "ray_serve_num_http_requests_total" in names
    assert not any("cpu" in name for name in names)


def test_a_node_that_does_not_respond_is_counted():
    merged = samples(merge({"n": page("a", 1), "m": None}))

    assert merged["stepserve_metrics_unreachable_nodes",] == 1
    assert merged["stepserve_images_total", "model=e", "node=n"] == 1


def test_texts_with_quotes_and_backslashes_survive():
    text = merge({"n": page("a", 1)})

    (limit,) = [f for f in text_string_to_metric_families(text) if "row_limit" in f.name]
    assert limit.documentation == 'Limit of "rows" \\ more.'
