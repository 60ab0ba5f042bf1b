"""The socket that outlives the processes which answer at it."""

from __future__ import annotations

import resource
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from stepserve.ray_serve import listen_socket
from stepserve.ray_serve.listen_socket import (
    AddressTakenError,
    held_listen_socket,
    receive_listen_socket,
    rest,
)

from loadtests.load.contenders import free_port

HOST = "127.0.0.1"
GREETER = """
import sys
from stepserve.ray_serve.listen_socket import receive_listen_socket
connection, _ = receive_listen_socket(sys.argv[1]).accept()
connection.sendall(sys.argv[2].encode())
"""


@contextmanager
def no_descriptor_left() -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Standard input, output and error are there, and nothing new may have a number above.
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def greet(listen_path: str, words: str) -> None:
    """From a process of its own, which ends after one connection."""
    subprocess.run([sys.executable, "-c", GREETER, listen_path, words], check=True, timeout=60)


def test_whoever_connects_before_there_is_anybody_is_answered_by_who_comes() -> None:
    port = free_port()
    with (
        held_listen_socket(HOST, port) as listen_path,
        socket.create_connection((HOST, port), timeout=60) as early,
    ):
        greet(listen_path, "welcome")
        assert early.recv(100) == b"welcome"


def test_the_queue_outlives_one_that_took_from_it() -> None:
    port = free_port()
    with held_listen_socket(HOST, port) as listen_path:
        with socket.create_connection((HOST, port), timeout=60) as first:
            greet(listen_path, "one")
            assert first.recv(100) == b"one"
        with socket.create_connection((HOST, port), timeout=60) as second:
            greet(listen_path, "two")
            assert second.recv(100) == b"two"


def test_several_take_turns() -> None:
    port = free_port()
    with (
        held_listen_socket(HOST, port) as listen_path,
        receive_listen_socket(listen_path) as one,
        receive_listen_socket(listen_path) as other,
    ):
        for taker in (one, other, one):
            with socket.create_connection((HOST, port), timeout=5) as client:
                taker.settimeout(5)
                connection, address = taker.accept()
                with connection:
                    assert address == client.getsockname()


def test_a_borrower_that_leaves_at_once_does_not_keep_it_from_others() -> None:
    with held_listen_socket(HOST, free_port()) as listen_path:
        for _ in range(3):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as hasty:
                hasty.connect(listen_path)
        receive_listen_socket(listen_path).close()


def test_it_is_handed_out_again_after_a_time_without_descriptors() -> None:
    tired = threading.Event()

    def note_and_rest(closed: threading.Event) -> None:
        tired.set()
        rest(closed)

    with (
        held_listen_socket(HOST, free_port(), rest=note_and_rest) as listen_path,
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as first,
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as second,
    ):
        second.settimeout(5)
        with no_descriptor_left():
            # The kernel has set one descriptor aside for the borrower that is waited for.
            first.connect(listen_path)
            second.connect(listen_path)
            assert tired.wait(5)
        assert second.recv(1)


def test_a_holder_that_is_silent_is_not_waited_for_for_ever(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(listen_socket, "RECEIVE_TIMEOUT_S", 0.05)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as silent:
        silent.bind(str(tmp_path / "listen_path"))
        silent.listen()
        with pytest.raises(TimeoutError):
            receive_listen_socket(str(tmp_path / "listen_path"))


def test_an_address_belongs_to_one_service() -> None:
    port = free_port()
    with (
        held_listen_socket(HOST, port),
        pytest.raises(AddressTakenError, match=f"cannot listen on {HOST} port {port}"),
    ):
        held_listen_socket(HOST, port).__enter__()
    with held_listen_socket(HOST, port) as listen_path:
        receive_listen_socket(listen_path).close()


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(AddressTakenError, match=r"cannot listen on 192\.0\.2\.1 port 8000"):
        held_listen_socket("192.0.2.1", 8000).__enter__()


def test_nothing_is_handed_out_once_the_service_has_stopped() -> None:
    with held_listen_socket(HOST, free_port()) as listen_path:
        pass
    with pytest.raises(OSError, match="No such file"):
        receive_listen_socket(listen_path)
