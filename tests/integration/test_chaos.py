"""What is done to two replicas under load: nothing is lost, and a seed keeps its image."""

from __future__ import annotations

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
from hearing import LONG, all_hear_of_the_end, open_client, wait_until_known
from running_service import QUICKLY_LOADED, Service
from stepserve.ray_serve.local.server import ONE_WISH_S

STUCK_AFTER_S = 3
# A busy machine takes some seconds to notice; faults of this kind that were found took fifty.
RECOVERED_S = 8.0
# Of requests that a replica had in flight when it hung: 3 s until it ends itself, and made anew.
SLOWEST_S = 10.0
SLOW_S = 6.0
STREAM = "stream"
STOPPED = "request abandoned is cancelled: its ingress is gone"


class Pair:
    """A service with two replicas of one thread each, whose settings are in a file."""

    def __init__(self, folder: Path) -> None:
        self.config = folder / "stepserve.yaml"
        self.settings: dict[str, Any] = {
            "replicas": 2,
            "num_cpus": 0.5,
            "engine": QUICKLY_LOADED | {"stuck_after_s": STUCK_AFTER_S, "drain_s": 55},
        }
        self._write()
        variables = {
            "STEPSERVE_CONFIG": str(self.config),
            # Which requests were tried again is counted on `/metrics` a second later, not five.
            "RAY_metrics_report_interval_ms": "1000",
        }
        self.service = Service(folder, variables=variables)

    @property
    def url(self) -> str:
        return self.service.url

    @property
    def root(self) -> psutil.Process:
        return self.service.root

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
    """A new one takes the place of two. Those tests that follow need no more."""
    pair.apply(replicas=1)
    wait(lambda: len(pair.replicas()) == 1, "no replica went")


def test_nobody_sees_that_one_is_killed(pair: Pair, say: Callable[[str], None]) -> None:
    """A stream goes on on the other as well, and tells nothing twice."""
    chaos.wait_for_replicas(pair.url, 2)
    retried = chaos.retried_at(pair.url)
    with ThreadPoolExecutor(1) as pool, open_client(pair.service) as client:
        streaming = pool.submit(stream_of_previews, pair)
        wait_until_known(client, STREAM)
        # Nobody else is served yet.
        victim = busiest(pair.replicas())
        with Load(pair.url, first_seed=0) as load:
            load.wait_for_answers(2)
            assert not streaming.done()
            load.breaks_now()
            victim.kill()
            load.wait_for_answers_after(8)
        told = streaming.result()
    assert told == ["partial_image"] * 8 + ["completed"]
    wait(lambda: chaos.retried_at(pair.url) > retried, "no request was tried again")
    say(load.tell("kill", chaos.retried_at(pair.url) - retried))
    load.check()
    assert load.recovery_s < RECOVERED_S


def stream_of_previews(pair: Pair) -> list[str]:
    """The names of its events."""
    body = LONG | {"num_inference_steps": 400, "stream": True, "previews": 8}
    headers = {"X-Request-ID": STREAM}
    with open_client(pair.service) as client:
        response = client.post(GENERATIONS, json=body, headers=headers)
    lines = [line for line in response.text.splitlines() if line.startswith("event: ")]
    return [line.removeprefix("event: image_generation.") for line in lines]


@pytest.mark.parametrize(
    ("number", "fault"),
    [
        (0, hang),
        (1, hang_whole),
        pytest.param(2, slow, marks=pytest.mark.slow),
        pytest.param(3, redeploy, marks=pytest.mark.slow),
        (4, scale_down),
    ],
)
def test_nobody_sees_it(
    pair: Pair, say: Callable[[str], None], number: int, fault: Callable[[Pair], None]
) -> None:
    chaos.wait_for_replicas(pair.url, pair.settings["replicas"])
    retried = chaos.retried_at(pair.url)
    # Those two break nothing, but load models, which takes all cores that the load leaves.
    few = fault in (redeploy, scale_down)
    with Load(pair.url, 1000 * (number + 1), clients=2 if few else 6) as load:
        load.wait_for_answers(2)
        load.breaks_now()
        fault(pair)
        load.wait_for_answers_after(8)
    if fault in (hang, hang_whole):
        wait(lambda: chaos.retried_at(pair.url) > retried, "no request was tried again")
    say(load.tell(fault.__name__, chaos.retried_at(pair.url) - retried))
    load.check()
    assert fault not in (hang, hang_whole) or load.slowest_s < SLOWEST_S
    assert few or load.recovery_s < RECOVERED_S


def test_work_of_a_killed_ingress_stops_and_who_asks_again_gets_the_same_image(
    pair: Pair, say: Callable[[str], None]
) -> None:
    """The connections that it held end. New ones wait until there is another ingress."""
    with ThreadPoolExecutor(1) as pool, open_client(pair.service) as client:
        headers = {"X-Request-ID": "abandoned"}
        making = pool.submit(
            httpx.post, pair.url + GENERATIONS, json=LONG, headers=headers, timeout=120
        )
        wait_until_known(client, "abandoned")
        with Load(pair.url, first_seed=9000, repeat=True) as load:
            load.wait_for_answers(2)
            assert not making.done()
            load.breaks_now()
            processes_of(pair.root, INGRESS)[0].kill()
            load.wait_for_answers_after(8)
        with pytest.raises(httpx.TransportError):
            making.result()
    say(load.tell("ingress killed", 0))
    load.check()
    # Each client notices once at most (it may be between two requests): nobody was refused, and
    # nobody was told what is not so.
    assert {error.status for error in load.errors} <= {0}
    assert len(load.errors) <= load.clients
    assert not any("ConnectError" in error.text for error in load.errors)
    wait(lambda: STOPPED in pair.service.log, "nobody waits for it, and it still runs")
    wait(pair.is_idle, "something still runs")


def test_asked_twice_to_stop_it_waits_for_nothing_and_still_tells_everybody(pair: Pair) -> None:
    def stop() -> None:
        began_s = time.monotonic()
        pair.service.send(signal.SIGTERM)
        wait(lambda: "once more stops at once" in pair.service.log, "it does not stop")
        # Sooner, it would be one signal that came by two ways.
        time.sleep(ONE_WISH_S + 0.5)
        pair.service.stop()
        assert time.monotonic() - began_s < 30

    all_hear_of_the_end(pair.service, 3, stop)
