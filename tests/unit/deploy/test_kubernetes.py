"""The manifests build, agree with one another, and with what the service understands."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import yaml
from monitoring_files import ROOT
from ray.serve.schema import LoggingConfig, ServeApplicationSchema, ServeDeploySchema

from service.config import Settings
from service.deployments.applications import INGRESS_APPLICATION, model_application
from service.deployments.cluster_app import settings_from

APP = "service.deployments.cluster_app"
FOLDER = ROOT / "deploy" / "kubernetes"
OVERLAYS = ("cpu-dev", "gpu", "high-availability", "incremental-upgrade", "queueing")
DRAIN = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
MARGIN_S = 15


@cache
def build(overlay: str) -> tuple[dict[str, Any], ...]:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed")
    ran = subprocess.run(
        [kubectl, "kustomize", FOLDER / "overlays" / overlay],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert ran.returncode == 0, ran.stderr
    return tuple(yaml.safe_load_all(ran.stdout))


def ray_service(overlay: str) -> dict[str, Any]:
    (found,) = [item for item in build(overlay) if item["kind"] == "RayService"]
    return found["spec"]


def serve_config(overlay: str) -> dict[str, Any]:
    return yaml.safe_load(ray_service(overlay)["serveConfigV2"])


def groups(overlay: str) -> list[dict[str, Any]]:
    cluster = ray_service(overlay)["rayClusterConfig"]
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def pods(overlay: str) -> Iterator[dict[str, Any]]:
    """The pods' specs: Ray's, and those of Jobs."""
    yield from (group["template"]["spec"] for group in groups(overlay))
    jobs = [item for item in build(overlay) if item["kind"] == "Job"]
    yield from (job["spec"]["template"]["spec"] for job in jobs)


def settings_of(overlay: str) -> Settings:
    """Those of the ingress, with the models of the other applications."""
    head = groups(overlay)[0]["template"]["spec"]["containers"][0]
    # What comes from secrets is made up.
    variables = {v["name"]: v.get("value", "x" * 32) for v in head["env"]}
    ingress, *others = (
        settings_from(a["args"], variables) for a in serve_config(overlay)["applications"]
    )
    models = {model_id: s for other in others for model_id, s in other.models.items()}
    return ingress.model_copy(update={"models": models})


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
    for pod in pods(overlay):
        security = pod["securityContext"]
        assert security["runAsNonRoot"]
        assert security["runAsUser"] == 10001
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            inside = container["securityContext"]
            assert inside["readOnlyRootFilesystem"]
            assert not inside["allowPrivilegeEscalation"]
            assert inside["capabilities"] == {"drop": ["ALL"]}
            assert "/tmp" in [mount["mountPath"] for mount in container["volumeMounts"]]
            assert "memory" in container["resources"]["limits"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_volumes_that_are_mounted_exist(overlay: str):
    claims = {i["metadata"]["name"] for i in build(overlay) if i["kind"] == "PersistentVolumeClaim"}
    for pod in pods(overlay):
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        for container in pod["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= set(volumes)
        for volume in volumes.values():
            if "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] in claims


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_replicas_fit_on_the_workers(overlay: str):
    workers = ray_service(overlay)["rayClusterConfig"]["workerGroupSpecs"]
    for model in settings_of(overlay).models.values():
        assert any(_cpus(worker) >= model.num_cpus for worker in workers)
        gpus = sum(worker["maxReplicas"] * _gpus(worker) for worker in workers)
        assert gpus >= model.num_gpus * model.replicas


def _resources(worker: dict[str, Any]) -> dict[str, str]:
    return worker["template"]["spec"]["containers"][0]["resources"]["requests"]


def _cpus(worker: dict[str, Any]) -> float:
    return float(_resources(worker)["cpu"])


def _gpus(worker: dict[str, Any]) -> float:
    return float(_resources(worker).get("nvidia.com/gpu", 0))


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_head_shows_serve_and_every_pod_its_metrics(overlay: str):
    for group in groups(overlay):
        ports = {
            port["name"]: port["containerPort"]
            for port in group["template"]["spec"]["containers"][0]["ports"]
        }
        assert ports["serve"] == serve_config(overlay)["http_options"]["port"]
        assert ports["metrics"] == int(group["rayStartParams"]["metrics-export-port"])


def test_secrets_are_referred_to():
    """But for those of a cluster for trying, none is in the repository."""
    for overlay in OVERLAYS[1:]:
        assert "Secret" not in {item["kind"] for item in build(overlay)}


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
