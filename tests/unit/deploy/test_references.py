"""What manifests refer to exists: in the same build, in the image, or where the guide makes it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.routing import APIRoute
from manifests import (
    DOCKERFILE,
    OVERLAYS,
    PRODUCTION,
    Object,
    build,
    cluster,
    groups,
    head_variables,
    image_variables,
    names,
    objects,
    pods,
    selects,
    serve_config,
    settings_of,
    walk,
)
from monitoring_files import ROOT
from stepserve import __version__
from stepserve.api.routes import health
from stepserve.ray_serve.cluster_app import settings_from

GUIDE = (ROOT / "docs" / "operations.md").read_text()
LEAST_RAY_WITH_TOKENS = (2, 52)


def guide_secrets() -> dict[str, set[str]]:
    """Secrets that the guide has an operator make, and their keys."""
    commands = re.findall(r"create secret generic (\S+)(.*)", GUIDE.replace("\\\n", " "))
    return {
        name: set(re.findall(r"--from-literal=([\w.-]+)=", rest))
        | {path.split("=")[0] for path in re.findall(r"--from-file=(\S+)", rest)}
        for name, rest in commands
    }


def secret_keys(overlay: str) -> Iterator[tuple[str, str]]:
    """Secrets that must be there for pods to start, and the keys in them."""
    for key, value in walk(list(build(overlay))):
        if key == "secretKeyRef" and not value.get("optional"):
            yield value["name"], value["key"]
        if key == "secret" and "secretName" in value:
            yield from ((value["secretName"], item["key"]) for item in value["items"])
        assert key != "secretRef", "a whole Secret as variables: nobody can tell what is in it"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_secrets_have_the_keys_that_are_asked_for(overlay: str):
    known = {
        secret["metadata"]["name"]: {*secret.get("data", {}), *secret.get("stringData", {})}
        for secret in objects(overlay, "Secret")
    } or guide_secrets()
    asked = list(secret_keys(overlay))
    assert asked
    for name, key in asked:
        assert key in known.get(name, set()), f"{name} has no {key}"


def test_secrets_are_referred_to():
    """But for those of a cluster for trying, none is in the repository."""
    for overlay in PRODUCTION:
        assert not objects(overlay, "Secret")


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_accounts_volumes_and_maps_exist(overlay: str):
    for key, value in walk(list(build(overlay))):
        if key == "serviceAccountName":
            assert value in names(overlay, "ServiceAccount")
        if key == "claimName":
            assert value in names(overlay, "PersistentVolumeClaim")
        assert not key.startswith("configMap")
    for pod in pods(overlay):
        claimed = [c["metadata"]["name"] for c in claim_templates(overlay, pod.name)]
        volumes = {volume["name"] for volume in pod.spec["volumes"]} | set(claimed)
        for container in pod.containers:
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes


def claim_templates(overlay: str, name: str) -> list[Object]:
    return [
        template
        for owner in objects(overlay, "StatefulSet")
        if owner["metadata"]["name"] == name
        for template in owner["spec"].get("volumeClaimTemplates", ())
    ]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_selectors_select(overlay: str):
    for item in build(overlay):
        for selector in selectors(item):
            assert any(selects(selector, pod.labels) for pod in pods(overlay)), selector


def selectors(item: Object) -> Iterator[Object]:
    """Those that must find pods of the same build."""
    if item["kind"] == "NetworkPolicy":
        yield item["spec"]["podSelector"]
    if item["kind"] in ("PodDisruptionBudget", "PodMonitor", "StatefulSet"):
        yield item["spec"]["selector"]
    if item["kind"] == "Service":
        yield {"matchLabels": item["spec"]["selector"]}
    yield from (value for key, value in walk(item) if key == "labelSelector")


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_ports_that_are_named_exist(overlay: str):
    for item in build(overlay):
        if item["kind"] == "PodMonitor":
            wanted = {endpoint["port"] for endpoint in item["spec"]["podMetricsEndpoints"]}
            assert_named(overlay, item["spec"]["selector"], wanted)
        if item["kind"] == "Service":
            wanted = {port["targetPort"] for port in item["spec"]["ports"]}
            assert_named(overlay, {"matchLabels": item["spec"]["selector"]}, wanted)
    for pod in pods(overlay):
        for container in pod.containers:
            probed = {
                value["port"]
                for key, value in walk(container)
                if key in ("httpGet", "tcpSocket", "grpc")
            }
            assert probed <= {port["name"] for port in container.get("ports", ())}


def assert_named(overlay: str, selector: Object, wanted: set[str]) -> None:
    for pod in pods(overlay):
        if selects(selector, pod.labels):
            names_of = {p["name"] for c in pod.containers for p in c.get("ports", ())}
            assert wanted <= names_of, pod.name


def test_redis_is_where_ray_looks_for_it():
    overlay = "high-availability"
    options = cluster(overlay)["gcsFaultToleranceOptions"]
    host, port = options["redisAddress"].split(":")
    (service,) = [s for s in objects(overlay, "Service") if s["metadata"]["name"] == host]
    assert int(port) in {p["port"] for p in service["spec"]["ports"]}
    (server,) = [
        p for p in pods(overlay) if selects({"matchLabels": service["spec"]["selector"]}, p.labels)
    ]
    (variable,) = server.containers[0]["env"]
    assert variable["valueFrom"] == options["redisPassword"]["valueFrom"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_images_are_of_this_version_and_of_this_ray(overlay: str):
    tag = __version__ if overlay == "cpu-dev" else f"{__version__}-cuda"
    images = {c["image"] for pod in pods(overlay) for c in pod.containers}
    assert {image for image in images if image.startswith("stepserve")} == {f"stepserve:{tag}"}
    assert not [image for image in images if image.endswith(":latest") or ":" not in image]
    pinned = re.search(r"^ray(?:\[\w+\])?==(\S+)", (ROOT / "constraints.txt").read_text(), re.M)
    assert pinned is not None
    assert cluster(overlay)["rayVersion"] == pinned[1]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_ray_asks_everybody_for_a_token(overlay: str):
    """KubeRay makes one for each cluster, and sets it unless a container says otherwise."""
    options = cluster(overlay)["authOptions"]
    assert options == {"mode": "token"}
    version = tuple(int(part) for part in cluster(overlay)["rayVersion"].split(".")[:2])
    assert version >= LEAST_RAY_WITH_TOKENS
    for pod in pods(overlay):
        for container in pod.containers:
            variables = {v["name"] for v in container.get("env", ())}
            assert not variables & {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_no_argument_is_overruled_by_the_image_unsaid(overlay: str):
    """Variables win over arguments, and the image has some."""
    for application in serve_config(overlay)["applications"]:
        args = application["args"]
        for name, value in image_variables().items():
            section, key = name.removeprefix("STEPSERVE_").lower().split("__")
            if name not in head_variables(overlay) and key in (args.get(section) or {}):
                assert settings_from(args, {}) == settings_from(args, {name: value}), name


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_folder_for_results_can_be_written_where_it_is_checked_and_where_it_is_used(overlay: str):
    address = settings_of(overlay).results.address
    if address.startswith("s3://"):
        return
    for group in groups(overlay):
        container = group["template"]["spec"]["containers"][0]
        mounts = {m["mountPath"]: m for m in container["volumeMounts"]}
        assert not mounts[address].get("readOnly")


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_files_that_settings_name_are_mounted(overlay: str):
    settings = settings_of(overlay)
    spec = groups(overlay)[0]["template"]["spec"]
    volumes = {v["name"]: v for v in spec["volumes"]}
    files = {
        f"{mount['mountPath']}/{item['path']}"
        for mount in spec["containers"][0]["volumeMounts"]
        if "secret" in volumes[mount["name"]]
        for item in volumes[mount["name"]]["secret"]["items"]
    }
    assert {settings.auth.keys_file, settings.results.secret_file} == files
    # Environments of processes are shown in more places than files.
    assert settings.results.secret is None


def test_results_are_where_every_replica_sees_them():
    for overlay in PRODUCTION:
        settings = settings_of(overlay)
        assert settings.http.ingress_replicas > 1
        assert settings.results.address.startswith("s3://")
        (account,) = [
            item
            for item in objects(overlay, "ServiceAccount")
            if item["metadata"]["name"] == "stepserve"
        ]
        # Credentials that last an hour, for the pods that write; no keys that last.
        assert "eks.amazonaws.com/role-arn" in account["metadata"]["annotations"]
        workers = groups(overlay)[1:]
        assert {g["template"]["spec"]["serviceAccountName"] for g in workers} == {"stepserve"}
        assert not [v for k, v in walk(list(build(overlay))) if k == "name" and "AWS_" in str(v)]


@pytest.mark.parametrize("overlay", PRODUCTION)
def test_the_head_has_no_credentials_for_results_beside_those_of_the_autoscaler(overlay: str):
    head: dict[str, Any] = groups(overlay)[0]["template"]["spec"]
    autoscaled = cluster(overlay).get("enableInTreeAutoscaling", False)
    assert head["automountServiceAccountToken"] is autoscaled
    # KubeRay makes an account that may scale the cluster, and binds it to whoever is named here.
    assert ("serviceAccountName" in head) is not autoscaled


def test_what_is_probed_is_answered():
    """The image's own health check, and what KubeRay's probes are made of."""
    probed = re.findall(r"http://127.0.0.1:8000(/\S*?)\"", DOCKERFILE)
    answered = {r.path for r in health.router.routes if isinstance(r, APIRoute)}
    assert probed
    assert set(probed) <= answered
    installed = re.findall(r"apt-get install .*", DOCKERFILE)[-1].split()
    assert {"bash", "wget"} <= set(installed)
