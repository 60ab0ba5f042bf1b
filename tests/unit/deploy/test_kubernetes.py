"""The manifests build, and agree with what the service and KubeRay understand."""

from __future__ import annotations

import importlib.util

import pytest
import yaml
from manifests import FOLDER, OVERLAYS, groups, pods, ray_service, serve_config, settings_of
from ray.serve.schema import LoggingConfig, ServeApplicationSchema, ServeDeploySchema
from stepserve.ray_serve.applications import INGRESS_APPLICATION, model_application

APP = "stepserve.ray_serve.cluster_app"
DRAIN = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
MARGIN_S = 15


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_serve_understands_its_configuration(overlay: str):
    config = serve_config(overlay)

    ServeDeploySchema.model_validate(config)
    # Serve itself takes unknown keys without a word.
    assert set(config) <= set(ServeDeploySchema.model_fields)
    assert set(config["logging_config"]) <= set(LoggingConfig.model_fields)
    for application in config["applications"]:
        assert set(application) <= set(ServeApplicationSchema.model_fields)
    ingress, *models = config["applications"]
    assert (ingress["name"], ingress["import_path"]) == (INGRESS_APPLICATION, f"{APP}:ingress")
    assert {model["import_path"] for model in models} == {f"{APP}:model"}
    # By their names the ingress finds them.
    served = settings_of(overlay)
    assert {m["name"] for m in models} == {model_application(name) for name in served.models}
    assert served.default_model in served.models


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_who_drains_is_given_the_time(overlay: str):
    """An engine's drain < the node's < the pod's: whoever is inside ends first."""
    drain_s = max(model.engine.drain_s for model in settings_of(overlay).models.values())
    for group in groups(overlay):
        pod = group["template"]["spec"]
        (container,) = [c for c in pod["containers"] if c["name"].startswith("ray-")]
        node_s = next(int(v["value"]) for v in container["env"] if v["name"] == DRAIN)
        assert drain_s + MARGIN_S <= node_s
        assert node_s + MARGIN_S <= pod["terminationGracePeriodSeconds"]
        # Ray's own way of ending would be cut short by `ray stop`.
        assert "lifecycle" not in container


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_are_restricted(overlay: str):
    """As the namespace demands: KubeRay's own init container takes after the worker's."""
    for pod in pods(overlay):
        security = pod.spec["securityContext"]
        assert security["runAsNonRoot"]
        assert security["runAsUser"] == (999 if pod.name == "stepserve-redis" else 10001)
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod.containers:
            inside = container["securityContext"]
            assert inside["readOnlyRootFilesystem"]
            assert not inside["allowPrivilegeEscalation"]
            assert inside["capabilities"] == {"drop": ["ALL"]}
            assert "/tmp" in [mount["mountPath"] for mount in container["volumeMounts"]]
            assert "memory" in container["resources"]["limits"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_head_shows_serve_and_every_pod_its_metrics(overlay: str):
    for group in groups(overlay):
        ports = {
            port["name"]: port["containerPort"]
            for port in group["template"]["spec"]["containers"][0]["ports"]
        }
        assert ports["serve"] == serve_config(overlay)["http_options"]["port"]
        assert ports["metrics"] == int(group["rayStartParams"]["metrics-export-port"])


def test_prometheus_rule_is_made_from_the_rules():
    spec = importlib.util.spec_from_file_location("rule", FOLDER / "prometheus_rule.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    assert yaml.safe_load(module.FILE.read_text()) == module.prometheus_rule()


def test_upgrades_step_no_further_than_they_surge():
    upgrade = ray_service("incremental-upgrade")["upgradeStrategy"]["clusterUpgradeOptions"]
    assert 0 < upgrade["stepSizePercent"] <= upgrade["maxSurgePercent"]
    assert ray_service("incremental-upgrade")["rayClusterConfig"]["enableInTreeAutoscaling"]
