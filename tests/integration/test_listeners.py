"""Nobody gets in beside the API: Ray's ports, its files, and what the current folder holds."""

from __future__ import annotations

import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
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


def processes_of(service: Service) -> list[psutil.Process]:
    return [service.root, *service.root.children(recursive=True)]


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


def gcs_address(service: Service) -> str:
    server = next(p for p in processes_of(service) if p.name() == "gcs_server")
    return f"127.0.0.1:{listeners(server)[0][1]}"


def come_as_stranger(address: str, **credentials: str) -> subprocess.CompletedProcess[str]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return subprocess.run(
        [sys.executable, "-c", STRANGER, address],
        env=environ | {"RAY_USAGE_STATS_ENABLED": "0"} | credentials,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture(scope="module")
def strangers(service: Service) -> dict[str, subprocess.CompletedProcess[str]]:
    """What became of those that came; all at once, as Ray lets who is refused wait."""
    credentials = {
        "no token": {"RAY_AUTH_MODE": "disabled"},
        "another token": {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64},
        "the token": {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(service.token_file())},
    }
    address = gcs_address(service)
    with ThreadPoolExecutor(len(credentials)) as pool:
        coming = {
            name: pool.submit(come_as_stranger, address, **given)
            for name, given in credentials.items()
        }
        return {name: future.result() for name, future in coming.items()}


@pytest.mark.parametrize("who", ["no token", "another token"])
def test_a_stranger_runs_no_code(
    strangers: dict[str, subprocess.CompletedProcess[str]], who: str
) -> None:
    ran = strangers[who]
    assert ran.returncode != 0
    assert "code ran" not in ran.stdout
    assert "oken" in ran.stderr, ran.stderr


def test_its_user_may_look_inside_with_the_token(
    strangers: dict[str, subprocess.CompletedProcess[str]],
) -> None:
    """Else the refusals above could have other reasons."""
    ran = strangers["the token"]
    assert f"code ran as {os.getuid()}" in ran.stdout, ran.stderr


def test_what_listens_is_what_the_page_says(service: Service) -> None:
    told = {name: int(ports) for name, ports in ROW.findall(SECURITY_PAGE.read_text())}
    assert len(told) >= 8
    seen: dict[str, int] = {}
    for process in processes_of(service):
        found = listeners(process)
        assert {address for address, _ in found} <= LOOPBACK, (role(process), found)
        if found:
            seen[role(process)] = max(seen.get(role(process), 0), len(found))
    assert {name: count for name, count in seen.items() if count > told.get(name, 0)} == {}
    # A worker may or may not wait for work, and some ports have numbers that another Ray may have.
    assert set(told) - set(seen) <= {"ray::IDLE", "monitor.py", "dashboard.py"}


def test_every_port_of_ray_wants_the_token(service: Service) -> None:
    refused = set()
    for process in processes_of(service):
        for _, port in listeners(process):
            if port != service.port:
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


def test_the_token_is_seen_by_nobody_else(service: Service) -> None:
    path = service.token_file()
    token = path.read_text()
    assert len(token) == 64
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    for process in processes_of(service):
        assert token not in " ".join(process.cmdline())
        opened = [Path(file.path) for file in process.open_files()]
        sessions = [file for file in opened if "session_" in str(file)]
        assert all(file.is_relative_to(path.parent) for file in sessions)


def test_nothing_of_the_current_folder_is_imported(service: Service, hostile: Path) -> None:
    with httpx.Client(base_url=service.url, timeout=120, trust_env=False) as client:
        response = client.post("/v1/images/generations", json={"prompt": "house"})
        assert response.status_code == 200, response.text
        assert client.get("/metrics").status_code == 200
    looked = subprocess.run([STEPSERVE, "doctor", service.url], cwd=hostile, capture_output=True)
    assert looked.returncode == 0, looked.stdout.decode()
    assert not (hostile / "mark").exists(), (hostile / "mark").read_text()


@pytest.mark.parametrize("reason", ["port", pytest.param("model", marks=pytest.mark.slow)])
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
