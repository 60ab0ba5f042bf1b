"""Several models in one service: added, updated and removed while it runs; asleep and awake."""

from __future__ import annotations

import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from local_hub import REVISION, LocalHub, local_hub
from running_service import QUICKLY_LOADED, Service
from stepserve.models.catalogue import EMBEDDED

GENERATIONS = "/v1/images/generations"
PATIENCE_S = 180.0
HUB_ID = "somebody/emoji"
# One core each: several models at once with a team of threads each would wait for one another.
# Long enough for a machine that is busy to finish what is in flight.
LIGHT = {"num_cpus": 0.1, "engine": QUICKLY_LOADED | {"drain_s": 45}}
SLEEPY = {
    "autoscaling": {
        "min_replicas": 0,
        "max_replicas": 2,
        "target_backlog_s": 2.0,
        "upscale_delay_s": 0.5,
        "downscale_delay_s": 2.0,
    }
}


class Many:
    """A service whose models are in a file."""

    def __init__(self, folder: Path, hub: LocalHub) -> None:
        self.folder = folder
        self.config = folder / "stepserve.yaml"
        self.models: dict[str, Any] = {
            "steady": deepcopy(LIGHT) | {"aliases": ["gpt-image-1"]},
            "broken": deepcopy(LIGHT) | {"path": str(folder / "nowhere")},
            "sleepy": SLEEPY | deepcopy(LIGHT),
        }
        self.write()
        variables = {
            "STEPSERVE_CONFIG": str(self.config),
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(folder / "cache"),
        }
        self.service = Service(folder, variables=variables)

    def write(self) -> None:
        self.config.write_text(yaml.safe_dump({"models": self.models}))

    def apply(self) -> None:
        """Write what is wanted now, and tell the service."""
        self.write()
        self.service.send(signal.SIGHUP)

    def told(self) -> dict[str, dict[str, Any]]:
        response = httpx.get(f"{self.service.url}/v1/models", timeout=30)
        return {model["id"]: model for model in response.json()["data"]}

    def wait(self, until: Callable[[dict[str, dict[str, Any]]], bool]) -> dict[str, dict[str, Any]]:
        deadline_s = time.monotonic() + PATIENCE_S
        while not until(told := self.told()):
            details = {name: (model["ready"], model["detail"]) for name, model in told.items()}
            assert time.monotonic() < deadline_s, details
            time.sleep(0.2)
        return told

    def draw(self, model: str, **changes: Any) -> httpx.Response:
        body = {"prompt": "pizza", "model": model, "num_inference_steps": 4} | changes
        return httpx.post(self.service.url + GENERATIONS, json=body, timeout=PATIENCE_S)

    def replicas(self, model: str) -> int:
        return len(self.batch(model))

    def batch(self, model: str) -> list[dict[str, Any]]:
        response = httpx.get(f"{self.service.url}/v1/models/{model}/batch", timeout=30)
        return response.json()["replicas"]

    def readiness_while_draining(self) -> dict[str, str]:
        """Why models are not ready, as load balancers hear it from the beginning of the end."""
        with httpx.Client(base_url=self.service.url, timeout=5, trust_env=False) as client:
            while not (told := client.get("/readyz").json().get("not_ready")):
                time.sleep(0.05)
        return told

    def wait_until_in_flight(self, *models: str) -> None:
        deadline_s = time.monotonic() + PATIENCE_S
        while not all(any(r["requests"] for r in self.batch(model)) for model in models):
            assert time.monotonic() < deadline_s
            time.sleep(0.05)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Many]:
    with local_hub(HUB_ID, EMBEDDED) as hub:
        running = Many(tmp_path_factory.mktemp("many"), hub)
        running.service.start()
        yield running
        running.service.kill()


class Traffic:
    """Clients that draw one image after another with a model, for as long as a block runs."""

    def __init__(self, many: Many, model: str, clients: int = 1, steps: int = 4) -> None:
        self.many, self.model, self.steps = many, model, steps
        self.statuses: list[int] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(clients)]

    def __enter__(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            drawn = self.many.draw(self.model, num_inference_steps=self.steps)
            self.statuses.append(drawn.status_code)


def test_one_that_cannot_be_loaded_says_why_and_the_rest_serve(many: Many) -> None:
    told = many.told()
    assert told["steady"]["ready"]
    assert not told["broken"]["ready"]
    assert "no diffusers pipeline in its folder" in told["broken"]["detail"]
    assert "it is tried again" in told["broken"]["detail"]
    # Where that folder is, is for the operator.
    assert str(many.folder) not in httpx.get(f"{many.service.url}/v1/models").text
    where = many.folder / "nowhere"
    assert f"model broken cannot be loaded: no diffusers pipeline in {where}" in many.service.log

    ready = httpx.get(f"{many.service.url}/readyz").json()
    assert (set(ready["models"]), set(ready["not_ready"])) == ({"steady", "sleepy"}, {"broken"})
    assert many.draw("steady").status_code == 200
    refused = many.draw("broken")
    assert refused.status_code == 503
    assert "no diffusers pipeline in its folder" in refused.json()["error"]["message"]
    assert str(many.folder) not in refused.text


def test_one_that_failed_is_tried_again_at_a_reload_and_once_its_folder_changes(many: Many) -> None:
    many.apply()
    deadline_s = time.monotonic() + PATIENCE_S
    while "tried again: broken\n" not in many.service.log:
        assert time.monotonic() < deadline_s
        time.sleep(0.1)
    many.wait(lambda told: "no diffusers pipeline" in told["broken"]["detail"])
    shutil.copytree(EMBEDDED, many.folder / "nowhere")
    many.wait(lambda told: told["broken"]["ready"])
    assert many.draw("broken").status_code == 200
    assert many.draw("steady").status_code == 200


@pytest.mark.slow
def test_a_model_sleeps_wakes_and_grows(many: Many) -> None:
    told = many.wait(lambda told: "asleep" in told["sleepy"]["detail"])
    assert told["sleepy"]["ready"]
    assert told["sleepy"]["detail"].startswith("asleep: the next request waits ")
    assert many.replicas("sleepy") == 0

    assert many.draw("sleepy").status_code == 200
    with Traffic(many, "sleepy", clients=8, steps=100) as traffic:
        deadline_s = time.monotonic() + PATIENCE_S
        while many.replicas("sleepy") < 2:
            assert time.monotonic() < deadline_s
            time.sleep(0.2)
    assert set(traffic.statuses) == {200}


def test_models_are_added_updated_and_removed_beside_the_traffic_of_others(many: Many) -> None:
    with Traffic(many, "steady") as traffic:
        fetched = {"path": HUB_ID, "revision": REVISION, "aliases": ["dall-e-3"]}
        many.models["fetched"] = deepcopy(LIGHT) | fetched
        many.models["steady"]["engine"]["max_pending_images"] = 5
        many.apply()
        many.wait(lambda told: bool(told.get("fetched", {}).get("ready")))
        assert many.draw("fetched").status_code == 200
        # The new limit: beside the traffic's own image six more are too many.
        full = {"n": 6, "num_inference_steps": 1}
        deadline_s = time.monotonic() + PATIENCE_S
        while many.draw("steady", **full).status_code != 429:
            assert time.monotonic() < deadline_s
            time.sleep(0.2)

        del many.models["broken"]
        many.apply()
        many.wait(lambda told: "broken" not in told)
        assert many.draw("broken").status_code == 404
        for alias, model in (("gpt-image-1", "steady"), ("dall-e-3", "fetched")):
            assert many.draw(alias).json()["model"] == model
            shown = httpx.get(f"{many.service.url}/v1/models/{alias}").json()
            assert (shown["id"], shown["aliases"]) == (model, [alias])
    assert set(traffic.statuses) <= {200, 429}
    # Only beside six at once it may be refused.
    assert traffic.statuses.count(200) > 10
    assert "added: fetched\nupdated: steady\n" in many.service.log
    assert "\nremoved: broken\n" in many.service.log


def test_a_file_that_is_wrong_changes_nothing(many: Many) -> None:
    many.models["steady"]["replicas"] = -1
    many.apply()
    deadline_s = time.monotonic() + PATIENCE_S
    while "nothing is changed" not in many.service.log:
        assert time.monotonic() < deadline_s
        time.sleep(0.1)
    many.models["steady"]["replicas"] = 1
    many.write()
    assert many.draw("steady").status_code == 200


def test_all_models_finish_what_they_have_in_flight_while_one_sleeps(many: Many) -> None:
    many.wait(lambda told: "asleep" in told["sleepy"]["detail"])
    loaded = ("steady", "fetched")
    with ThreadPoolExecutor(3) as pool:
        drawing = [pool.submit(many.draw, model, num_inference_steps=100) for model in loaded]
        many.wait_until_in_flight(*loaded)
        not_ready = pool.submit(many.readiness_while_draining)
        many.service.stop(signal.SIGINT)
        assert set(not_ready.result().values()) == {"draining"}
        assert [one.result().status_code for one in drawing] == [200, 200]
