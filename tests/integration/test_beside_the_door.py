"""Nobody gets in beside the door: Ray's ports, its files, and what the current folder holds."""

from __future__ import annotations

import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import grpc
import httpx
import psutil
import pytest
from running_service import STEPSERVE, Service, free_port
from stepserve.models.catalogue import EMBEDDED

SECURITY_PAGE = Path(__file__).parents[2] / "docs" / "security.md"
ROW = re.compile(r"^\| `([^`]+)` \| (\d) \|", re.MULTILINE)
LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
# Whoever imports one of these leaves a mark, and then fails as nobody would want to.
HOSTILE = (
    *("aiohttp", "grpc", "json", "multiprocessing", "numpy", "psutil", "ray", "stepserve"),
    *("setproctitle", "sitecustomize", "torch", "typer", "usercustomize", "yaml"),
)
# On loopback, where the service's Ray is; Ray would look elsewhere for it.
STRANGER = """
import os, sys
import ray
from ray._private import ray_constants
ray_constants.ENABLE_RAY_CLUSTER = False
ray.init(sys.argv[1], namespace="serve", log_to_driver=False, logging_level="CRITICAL")
@ray.remote(num_cpus=0)
def who():
    return os.getuid()
print("code ran as", ray.get(who.remote(), timeout=60))
"""
# Every gRPC server of Ray that there is in a local service, and a call of it that changes nothing.
CALLS = {
    "/ray.rpc.NodeInfoGcsService/CheckAlive",
    "/ray.rpc.NodeManagerService/GetNodeStats",
    "/ray.rpc.ObjectManagerService/Pull",
    "/ray.rpc.CoreWorkerService/GetCoreWorkerStats",
    "/ray.rpc.ReporterService/GetTraceback",
    "/ray.serve.ASGIService/HandleRequest",
}


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    for name in HOSTILE:
        (folder / name).mkdir()
        code = f"open({str(folder / 'mark')!r}, 'a').write({name!r} + chr(10))\nraise SystemExit(9)"
        (folder / name / "__init__.py").write_text(code)
    return folder


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, hostile: Path) -> Iterator[Service]:
    """Started by somebody who stands in a hostile folder, with what other clusters want."""
    service = Service(tmp_path_factory.mktemp("running"), stands_in=hostile)
    service.variables = {"RAY_ADDRESS": "", "RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": "x" * 32}
    service.start()
    yield service
    service.kill()


def processes_of(service: Service) -> list[psutil.Process]:
    assert service.process is not None
    root = psutil.Process(service.process.pid)
    return [root, *root.children(recursive=True)]


def listeners(process: psutil.Process) -> list[tuple[str, int]]:
    found = process.net_connections(kind="inet")
    return [(at.laddr.ip, at.laddr.port) for at in found if at.status == psutil.CONN_LISTEN]


def role(process: psutil.Process) -> str:
    """What the page calls a process: its own title, its script, or its program."""
    command = process.cmdline()
    scripts = [Path(part).name for part in command if part.endswith(".py")]
    title = " ".join(command).strip()
    # The rest says which replica it is, and what it does at the moment.
    if ray_title := re.match(r"ray::\w+", title):
        return ray_title[0]
    return next(iter(scripts), process.name())


def token_file(service: Service) -> Path:
    raylet = next(p for p in processes_of(service) if p.name() == "raylet")
    return Path(raylet.environ()["RAY_AUTH_TOKEN_PATH"])


def gcs_address(service: Service) -> str:
    server = next(p for p in processes_of(service) if p.name() == "gcs_server")
    return f"127.0.0.1:{listeners(server)[0][1]}"


def come_as_stranger(service: Service, **credentials: str) -> subprocess.CompletedProcess[str]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return subprocess.run(
        [sys.executable, "-c", STRANGER, gcs_address(service)],
        env=environ | {"RAY_USAGE_STATS_ENABLED": "0"} | credentials,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize(
    "credentials",
    [{"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}],
    ids=["no token", "another token"],
)
def test_a_stranger_runs_no_code(running: Service, credentials: dict[str, str]) -> None:
    ran = come_as_stranger(running, **credentials)
    assert ran.returncode != 0
    assert "code ran" not in ran.stdout
    assert "oken" in ran.stderr, ran.stderr


def test_its_user_may_look_inside_with_the_token(running: Service) -> None:
    """Else the refusals above could have other reasons."""
    path = str(token_file(running))
    ran = come_as_stranger(running, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=path)
    assert f"code ran as {os.getuid()}" in ran.stdout, ran.stderr


def test_what_listens_is_what_the_page_says(running: Service) -> None:
    told = {name: int(ports) for name, ports in ROW.findall(SECURITY_PAGE.read_text())}
    assert len(told) >= 8
    seen: dict[str, int] = {}
    for process in processes_of(running):
        found = listeners(process)
        assert {address for address, _ in found} <= LOOPBACK, (role(process), found)
        if found:
            seen[role(process)] = max(seen.get(role(process), 0), len(found))
    assert {name: count for name, count in seen.items() if count > told.get(name, 0)} == {}
    # A worker may or may not wait for work, and some ports have numbers that another Ray may have.
    assert set(told) - set(seen) <= {"ray::IDLE", "monitor.py", "dashboard.py"}


def test_every_port_of_ray_wants_the_token(running: Service) -> None:
    refused = set()
    for process in processes_of(running):
        for _, port in listeners(process):
            if port != running.port:
                refused |= refused_calls(port)
                assert may_be_read(port), (role(process), port)
    assert refused == CALLS


def refused_calls(port: int) -> set[str]:
    """Which calls this port has but does not answer; none is answered."""
    refused = set()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        for name in CALLS:
            with pytest.raises(grpc.RpcError) as error:
                channel.unary_unary(name)(b"", timeout=10)
            # Other ports know no such call, or do not speak gRPC.
            codes = grpc.StatusCode
            assert error.value.code() in (
                codes.UNAUTHENTICATED,
                codes.UNIMPLEMENTED,
                codes.UNAVAILABLE,
            )
            if error.value.code() == codes.UNAUTHENTICATED:
                refused.add(name)
    return refused


def may_be_read(port: int) -> bool:
    """Whether this port tells strangers nothing by HTTP but measurements."""
    try:
        response = httpx.get(f"http://127.0.0.1:{port}/logs", timeout=10, trust_env=False)
    except httpx.TransportError:
        return True
    return response.status_code == 401 or response.text.startswith("# HELP")


def test_the_token_is_seen_by_nobody_else(running: Service) -> None:
    path = token_file(running)
    token = path.read_text()
    assert len(token) == 64
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    for process in processes_of(running):
        assert token not in " ".join(process.cmdline())
        opened = [Path(file.path) for file in process.open_files()]
        sessions = [file for file in opened if "session_" in str(file)]
        assert all(file.is_relative_to(path.parent) for file in sessions)


def test_nothing_of_the_current_folder_is_imported(running: Service, hostile: Path) -> None:
    with httpx.Client(base_url=running.url, timeout=120, trust_env=False) as client:
        response = client.post("/v1/images/generations", json={"prompt": "house"})
        assert response.status_code == 200, response.text
        assert client.get("/metrics").status_code == 200
    looked = subprocess.run([STEPSERVE, "doctor", running.url], cwd=hostile, capture_output=True)
    assert looked.returncode == 0, looked.stdout.decode()
    assert not (hostile / "mark").exists(), (hostile / "mark").read_text()


def test_nothing_is_left_after_a_stop(running: Service) -> None:
    folder = token_file(running).parent
    assert running.terminate() == 0, running.log
    assert not folder.exists()


@pytest.mark.parametrize("reason", ["port", "model"])
def test_nothing_is_left_after_a_start_that_failed(tmp_path: Path, reason: str) -> None:
    """Before Ray is started, and after."""
    broken = tmp_path / "broken"
    shutil.copytree(EMBEDDED, broken)
    (broken / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"cut")
    environ = os.environ | {"STEPSERVE_MODELS__EMOJI__PATH": str(broken)}
    with tempfile.TemporaryDirectory(dir="/tmp") as base, socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        if reason == "port":
            other.listen()
        port = other.getsockname()[1] if reason == "port" else free_port()
        ended = subprocess.run(
            [STEPSERVE, "serve", "--port", str(port)],
            env=environ | {"RAY_TMPDIR": base},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert ended.returncode == 1, ended.stderr
        assert reason in ended.stderr
        assert list(Path(base).iterdir()) == []
