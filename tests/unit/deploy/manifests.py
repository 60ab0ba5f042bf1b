"""What the overlays build, and the pods that Kubernetes and KubeRay make of it."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import yaml
from monitoring_files import ROOT
from stepserve.config import Settings
from stepserve.ray_serve.cluster_app import settings_from

FOLDER = ROOT / "deploy" / "kubernetes"
OVERLAYS = ("cpu-dev", "gpu", "high-availability", "incremental-upgrade", "queueing")
PRODUCTION = OVERLAYS[1:]
NAMESPACE = "stepserve"
DOCKERFILE = (ROOT / "Dockerfile").read_text()

Object = dict[str, Any]


@dataclass(frozen=True)
class Pod:
    """A pod as it is made: `least` and `most` of its kind run."""

    name: str
    labels: Mapping[str, str]
    spec: Object
    least: int = 1
    most: int = 1

    @property
    def containers(self) -> list[Object]:
        """Init containers first."""
        return [*self.spec.get("initContainers", ()), *self.spec["containers"]]


@cache
def build(overlay: str) -> tuple[Object, ...]:
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


def objects(overlay: str, kind: str) -> list[Object]:
    return [item for item in build(overlay) if item["kind"] == kind]


def names(overlay: str, kind: str) -> set[str]:
    return {item["metadata"]["name"] for item in objects(overlay, kind)}


def ray_service(overlay: str) -> Object:
    (found,) = objects(overlay, "RayService")
    return found["spec"]


def cluster(overlay: str) -> Object:
    return ray_service(overlay)["rayClusterConfig"]


def serve_config(overlay: str) -> Object:
    return yaml.safe_load(ray_service(overlay)["serveConfigV2"])


def groups(overlay: str) -> list[Object]:
    return [cluster(overlay)["headGroupSpec"], *cluster(overlay)["workerGroupSpecs"]]


def pods(overlay: str) -> list[Pod]:
    """Ray's pods, with the labels that KubeRay gives them, and those of Jobs and StatefulSets."""
    made = [_ray_pod(group, index) for index, group in enumerate(groups(overlay))]
    if "gcsFaultToleranceOptions" in cluster(overlay):
        made.append(_ray_pod(groups(overlay)[0], 0, "redis-cleanup"))
    for owner in (*objects(overlay, "Job"), *objects(overlay, "StatefulSet")):
        template = owner["spec"]["template"]
        made.append(
            Pod(owner["metadata"]["name"], template["metadata"]["labels"], template["spec"])
        )
    return made


def pod(overlay: str, name: str) -> Pod:
    """The first whose name begins so."""
    return next(found for found in pods(overlay) if found.name.startswith(name))


def _ray_pod(group: Object, index: int, kind: str = "") -> Pod:
    kind = kind or ("worker" if index else "head")
    name = group.get("groupName", kind)
    labels = {
        "app.kubernetes.io/name": "kuberay",
        "app.kubernetes.io/created-by": "kuberay-operator",
        "ray.io/is-ray-node": "yes",
        "ray.io/cluster": "stepserve-abcde",
        "ray.io/node-type": kind,
        "ray.io/group": name,
    }
    template = group["template"]
    given = template.get("metadata", {}).get("labels", {})
    least, most = group.get("minReplicas", 1), group.get("maxReplicas", 1)
    return Pod(
        kind if not index else f"{kind}-{name}", given | labels, template["spec"], least, most
    )


def image_variables() -> dict[str, str]:
    """Settings that the image brings along as environment variables."""
    stage = DOCKERFILE[DOCKERFILE.rindex("\nFROM ") :]
    return dict(re.findall(r"\b(STEPSERVE_\w+)=(\S+)", stage))


def head_variables(overlay: str) -> dict[str, str]:
    """Those of the head's container; what comes from secrets is made up."""
    container = groups(overlay)[0]["template"]["spec"]["containers"][0]
    return {v["name"]: v.get("value", "x" * 32) for v in container["env"]}


def settings_of(overlay: str) -> Settings:
    """Those of the ingress, with the models of the other applications."""
    variables = image_variables() | head_variables(overlay)
    ingress, *others = (
        settings_from(a["args"], variables) for a in serve_config(overlay)["applications"]
    )
    models = {model_id: s for other in others for model_id, s in other.models.items()}
    return ingress.model_copy(update={"models": models})


def selects(selector: Object, labels: Mapping[str, str]) -> bool:
    """Whether a label selector selects; the empty one selects all."""
    matches = selector.get("matchLabels") or {}
    expressions = selector.get("matchExpressions") or ()
    return all(labels.get(key) == value for key, value in matches.items()) and all(
        _holds(expression, labels) for expression in expressions
    )


def _holds(expression: Object, labels: Mapping[str, str]) -> bool:
    key, operator = expression["key"], expression["operator"]
    if operator == "Exists":
        return key in labels
    assert operator == "In", operator
    return labels.get(key) in expression["values"]


def walk(node: Any) -> Iterator[tuple[str, Any]]:
    """Every key and value inside, at any depth."""
    if isinstance(node, list):
        for item in node:
            yield from walk(item)
    if isinstance(node, dict):
        for key, value in node.items():
            yield key, value
            yield from walk(value)
