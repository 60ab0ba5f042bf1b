"""Each pair that must talk can, and strangers reach nothing."""

from __future__ import annotations

import pytest
from manifests import OVERLAYS, PRODUCTION, objects, pod, pods
from network_policies import End, reaches

GCS, DASHBOARD, SERVE, METRICS, REDIS, AGENT = 6379, 8265, 8000, 8080, 6379, 52365
OPERATOR = {"app.kubernetes.io/component": "kuberay-operator"}
PROMETHEUS = {"app.kubernetes.io/name": "prometheus"}
STRANGER = End({"app": "web"}, namespace="other")
PUBLIC, METADATA = End(address="203.0.113.7"), End(address="169.254.169.254")
DNS = End({"k8s-app": "kube-dns"}, namespace="kube-system")


def end(overlay: str, name: str) -> End:
    return End(pod(overlay, name).labels)


def allowed(overlay: str, source: End, target: End, port: int, protocol: str = "TCP") -> bool:
    return reaches(objects(overlay, "NetworkPolicy"), source, target, port, protocol)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_ray_talks_to_itself_and_strangers_reach_none_of_it(overlay: str):
    head, worker = end(overlay, "head"), end(overlay, "worker")
    for port in (GCS, DASHBOARD, SERVE, METRICS, AGENT, 10001, 31234):
        assert allowed(overlay, worker, head, port)
        assert allowed(overlay, head, worker, port)
        assert allowed(overlay, worker, worker, port)
        for stranger in (STRANGER, End({"app": "web"}), End({"app": "web"}, "default"), PUBLIC):
            assert not allowed(overlay, stranger, head, port)
            assert not allowed(overlay, stranger, worker, port)


@pytest.mark.parametrize("overlay", OVERLAYS)
@pytest.mark.parametrize("namespace", ["default", "kuberay-operator", "kuberay-system"])
def test_the_operator_reaches_the_dashboard_of_the_head_from_where_it_runs(
    overlay: str, namespace: str
):
    """Charts and kustomize install it to `default`; its pod alone is let in from there."""
    operator = End(OPERATOR, namespace)
    assert allowed(overlay, operator, end(overlay, "head"), DASHBOARD)
    for port in (GCS, SERVE, AGENT, 10001):
        assert not allowed(overlay, operator, end(overlay, "head"), port)
    assert not allowed(overlay, operator, end(overlay, "worker"), DASHBOARD)
    assert not allowed(overlay, End({"app": "web"}, namespace), end(overlay, "head"), DASHBOARD)
    assert not allowed(overlay, End(OPERATOR, "other"), end(overlay, "head"), DASHBOARD)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_clients_and_gateways_reach_serve_alone(overlay: str):
    client = End({"app": "web"}, "other", {"stepserve/clients": "true"})
    # Controllers of the Gateway API label the proxies that they make so.
    gateway = End({"gateway.networking.k8s.io/gateway-name": "stepserve-gateway"})
    for caller in (client, gateway):
        assert allowed(overlay, caller, end(overlay, "worker"), SERVE)
        assert not allowed(overlay, caller, end(overlay, "head"), SERVE)
        assert not allowed(overlay, caller, end(overlay, "worker"), METRICS)
        assert not allowed(overlay, caller, end(overlay, "head"), DASHBOARD)
    # A gateway's own pods are not held up from talking to their clients and their controller.
    assert allowed(overlay, PUBLIC, gateway, 443)
    assert allowed(overlay, gateway, End({"app": "istiod"}, "istio-system"), 15012)


@pytest.mark.parametrize("overlay", OVERLAYS)
@pytest.mark.parametrize("namespace", ["monitoring", "prometheus-system"])
def test_prometheus_scrapes_every_ray_pod(overlay: str, namespace: str):
    for name in ("head", "worker"):
        assert allowed(overlay, End(PROMETHEUS, namespace), end(overlay, name), METRICS)
        assert not allowed(overlay, End(PROMETHEUS, namespace), end(overlay, name), GCS)
        assert not allowed(overlay, End({"app": "web"}, namespace), end(overlay, name), METRICS)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_names_can_be_asked_for_everywhere(overlay: str):
    for source in pods(overlay):
        if source.name == "stepserve-redis":
            continue
        for protocol in ("UDP", "TCP"):
            for server in (DNS, End(address="169.254.20.10")):
                assert allowed(overlay, End(source.labels), server, 53, protocol), source.name
        assert not allowed(overlay, End(source.labels), PUBLIC, 53, "UDP")


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_traces_go_to_collectors(overlay: str):
    for labels in (
        {"app.kubernetes.io/component": "opentelemetry-collector"},
        {"app.kubernetes.io/name": "opentelemetry-collector"},
    ):
        for port in (4317, 4318):
            worker = end(overlay, "worker")
            assert allowed(overlay, worker, End(labels, "observability"), port)
            assert not allowed(overlay, worker, STRANGER, port)


@pytest.mark.parametrize("overlay", PRODUCTION)
def test_what_leaves_the_cluster_is_https(overlay: str):
    """Results of workers, models that the Job fetches, and the head to Kubernetes' own API."""
    for name in ("worker", "prefetch", "head"):
        source = end(overlay, name)
        assert allowed(overlay, source, PUBLIC, 443)
        assert not allowed(overlay, source, PUBLIC, 80)
        assert not allowed(overlay, source, METADATA, 80)
        assert not allowed(overlay, source, STRANGER, 80)
    assert allowed(overlay, end(overlay, "head"), End(address="10.0.0.1"), 6443)
    assert not allowed(overlay, end(overlay, "worker"), End(address="10.0.0.1"), 6443)
    assert not allowed(overlay, end(overlay, "worker"), METADATA, 443)


def test_without_results_elsewhere_workers_leave_nothing():
    assert not allowed("cpu-dev", end("cpu-dev", "worker"), PUBLIC, 443)


@pytest.mark.parametrize("overlay", PRODUCTION)
def test_nobody_calls_the_job_and_it_calls_nobody_here(overlay: str):
    job = end(overlay, "prefetch")
    for other in (end(overlay, "head"), end(overlay, "worker"), STRANGER):
        assert not allowed(overlay, other, job, SERVE)
        assert not allowed(overlay, job, other, SERVE)


def test_redis_is_for_the_head_and_its_cleaner_alone():
    overlay = "high-availability"
    redis = end(overlay, "stepserve-redis")
    assert allowed(overlay, end(overlay, "head"), redis, REDIS)
    assert allowed(overlay, end(overlay, "redis-cleanup"), redis, REDIS)
    for stranger in (end(overlay, "worker"), end(overlay, "prefetch"), STRANGER, PUBLIC):
        assert not allowed(overlay, stranger, redis, REDIS)
    assert not allowed(overlay, redis, PUBLIC, 443)
