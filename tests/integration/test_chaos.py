"""What is done to two replicas under load: nothing is lost, and a seed keeps its image."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import chaos
import httpx
import psutil
import pytest
import yaml
from chaos import GENERATIONS, INGRESS, REPLICA, Load, busiest, processes_of, wait
from running_service import Service

STUCK_AFTER_S = 3
# A busy machine takes some seconds to notice; faults of this kind that were found took fifty.
RECOVERED_S = 8.0
# Of requests that a replica had in flight when it hung: 3 s until it ends itself, and made anew.
SLOWEST_S = 10.0
SLOW_S = 6.0
FULL_S = 15.0


class Pair:
    """A service with two replicas of one thread each, whose settings are in a file."""

    def __init__(self, folder: Path) -> None:
        self.config = folder / "stepserve.yaml"
        self.settings: dict[str, Any] = {
            "replicas": 2,
            "num_cpus": 0.5,
            "engine": {"threads": 1, "stuck_after_s": STUCK_AFTER_S, "drain_s": 20},
        }
        self._write()
        variables = {"STEPSERVE_CONFIG": str(self.config)}
        self.service = Service(folder, variables=variables, limit_waiting=False)

    @property
    def url(self) -> str:
        return self.service.url

    @property
    def root(self) -> psutil.Process:
        assert self.service.process is not None
        return psutil.Process(self.service.process.pid)

    def replicas(self) -> list[psutil.Process]:
        return processes_of(self.root, REPLICA)

    def apply(self, **changes: Any) -> None:
        """Write other settings, and tell the service."""
        self.settings |= changes
        self._write()
        self.root.send_signal(signal.SIGHUP)

    def is_idle(self) -> bool:
        """Whether its replicas tell that they have nothing in flight."""
        told = chaos.replicas_told(self.url)
        return told is not None and not any(replica["requests"] for replica in told)

    def _write(self) -> None:
        self.config.write_text(yaml.safe_dump({"models": {"emoji": self.settings}}))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    running = Pair(tmp_path_factory.mktemp("pair"))
    running.service.start()
    yield running
    running.service.kill()


def kill(pair: Pair) -> None:
    busiest(pair.replicas()).kill()


def hang(pair: Pair) -> None:
    chaos.hang_engine(busiest(pair.replicas()))


def hang_whole(pair: Pair) -> None:
    chaos.hang_process(busiest(pair.replicas()))


def slow(pair: Pair) -> None:
    chaos.slow_down(busiest(pair.replicas()), SLOW_S)


def redeploy(pair: Pair) -> None:
    """All replicas are replaced, one after another."""
    before = set(pair.replicas())
    pair.apply(engine=pair.settings["engine"] | {"max_pending_images": 80})
    wait(
        lambda: len(now := set(pair.replicas())) == 2 and not now & before,
        "the replicas were not replaced",
    )


def scale_down(pair: Pair) -> None:
    """A new one takes the place of two."""
    pair.apply(replicas=1)
    wait(lambda: len(pair.replicas()) == 1, "no replica went")


@pytest.mark.parametrize(
    ("number", "fault"), list(enumerate([kill, hang, hang_whole, slow, redeploy, scale_down]))
)
def test_nobody_sees_it(
    pair: Pair, say: Callable[[str], None], number: int, fault: Callable[[Pair], None]
) -> None:
    chaos.wait_for_replicas(pair.url, pair.settings["replicas"])
    retried = chaos.retried_at(pair.url)
    with Load(pair.url, first_seed=1000 * (number + 1)) as load:
        time.sleep(1.0)
        load.breaks_now()
        fault(pair)
        load.wait_for_answers_after(8)
    if fault in (kill, hang, hang_whole):
        wait(lambda: chaos.retried_at(pair.url) > retried, "no request was tried again")
    say(load.tell(fault.__name__, chaos.retried_at(pair.url) - retried))
    load.check()
    assert fault not in (hang, hang_whole) or load.slowest_s < SLOWEST_S
    # Those two break nothing, but load models beside the load, which takes all cores there are.
    assert fault in (redeploy, scale_down) or load.recovery_s < RECOVERED_S


def test_a_stream_goes_on_on_another_replica(pair: Pair) -> None:
    pair.apply(replicas=2)
    chaos.wait_for_replicas(pair.url, 2)
    body = {"prompt": "pizza", "num_inference_steps": 400, "stream": True, "previews": 8}
    names = []
    with (
        httpx.Client(trust_env=False, timeout=120) as client,
        client.stream("POST", pair.url + GENERATIONS, json=body) as response,
    ):
        for line in response.iter_lines():
            if line.startswith("event: "):
                names.append(line.removeprefix("event: image_generation."))
                if len(names) == 2:
                    busiest(pair.replicas()).kill()
    assert names == ["partial_image"] * 8 + ["completed"]


def test_a_client_of_a_killed_ingress_gets_the_same_image_when_it_asks_again(
    pair: Pair, say: Callable[[str], None]
) -> None:
    """The connections that it held end. New ones wait until there is another ingress."""
    chaos.wait_for_replicas(pair.url, 2)
    with Load(pair.url, first_seed=9000, repeat=True) as load:
        time.sleep(1.0)
        load.breaks_now()
        processes_of(pair.root, INGRESS)[0].kill()
        load.wait_for_answers_after(8)
    say(load.tell("ingress killed", 0))
    load.check()
    # Each client notices once at most (one may be between two requests): nobody was refused, and
    # nobody was told what is not so.
    assert {error.status for error in load.errors} == {0}
    assert len(load.errors) <= load.clients
    assert not any("ConnectError" in error.text for error in load.errors)


def test_work_of_a_killed_ingress_stops(pair: Pair) -> None:
    chaos.wait_for_replicas(pair.url, 2)
    body = {"prompt": "pizza", "num_inference_steps": 1000, "n": 8}
    with ThreadPoolExecutor() as pool:
        making = pool.submit(httpx.post, pair.url + GENERATIONS, json=body, timeout=120)
        time.sleep(1.5)
        os.kill(processes_of(pair.root, INGRESS)[0].pid, signal.SIGKILL)
        with pytest.raises(httpx.TransportError):
            making.result()
    wait(pair.is_idle, "nobody waits for it, and it still runs")
