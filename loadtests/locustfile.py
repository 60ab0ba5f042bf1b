"""Users as they come: single shots, bursts, editors, streamers, and those who do not wait.

    locust -f loadtests/locustfile.py --host http://127.0.0.1:8000 --headless \
        --users 10 --run-time 2m --load-shape ramp --html out/load.html

Every user begins tasks at a constant rate (`--user-rate`), as far as its answers come in time: for
arrivals that never wait for answers there is `loadtests.bench`. Every answer is checked: images
are decoded, their size and seeds compared. Headless, the last lines say whether the test passed,
and the exit code says it too.

In the statistics, `REFUSED` are answers 429 and 503, `LEFT` are clients that did not wait, and
`METRIC` are times that the server told: the wait in its queue and until the first denoising step.
"""

from __future__ import annotations

import random
import time
from typing import Any

import gevent
from gevent.pool import Group
from locust import HttpUser, LoadTestShape, constant_throughput, events, tag, task
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment
from locust.runners import WorkerRunner
from requests.exceptions import Timeout

from loadtests.load.http_shape import EDITS, GENERATIONS, REFUSED, read_server_timing
from loadtests.load.response_checks import (
    complaint_about_image,
    complaint_about_images,
    read_events,
)
from loadtests.load.shapes import SHAPES, users_at
from loadtests.load.trace import Mix, TraceRequest, draw_trace

BURST = 4
EDITS_OF_AN_IMAGE = 3
STRENGTH = 0.6
PARTIAL_IMAGES = 2
SHORTEST_PATIENCE_S, LONGEST_PATIENCE_S = 0.05, 1.0
LONGEST_RETRY_S = 5.0
RESPONSE_TIMEOUT_S = 600.0
METRIC, REFUSAL, LEFT = "METRIC", "REFUSED", "LEFT"
TOLD_APART = (METRIC, REFUSAL, LEFT)


@events.init_command_line_parser.add_listener
def add_options(parser: LocustArgumentParser) -> None:
    """What there is beside locust's own options."""
    parser.add_argument("--load-shape", choices=sorted(SHAPES), default="steady")
    parser.add_argument("--user-rate", type=float, default=0.5, help="tasks a second of one user")
    parser.add_argument("--sizes", default="64x64,48x48,96x96", help="sizes that the model can do")
    parser.add_argument("--most-steps", type=int, default=100, help="longer requests are cut")
    parser.add_argument("--step-cache", help="easycache, magcache or off (default: the model's)")
    parser.add_argument("--api-key", default="", is_secret=True)
    parser.add_argument(
        "--max-failures", type=float, default=0.0, help="share that passes the test"
    )
    parser.add_argument(
        "--max-refusals", type=float, default=1.0, help="share that passes the test"
    )
    parser.add_argument("--max-p95-s", type=float, default=0.0, help="of answers; 0: no limit")


class ChosenShape(LoadTestShape):
    """The shape that `--load-shape` names, over `--users` and `--run-time`."""

    use_common_options = True

    def tick(self) -> tuple[int, float] | None:
        """Users now, and how many are started a second."""
        options = self.runner.environment.parsed_options
        run_time_s = float(options.run_time or 60)
        users = users_at(
            options.load_shape, self.get_run_time(), run_time_s, options.num_users or 1
        )
        return None if users is None else (users, float(max(users, options.spawn_rate or 1)))


class StepserveUser(HttpUser):
    """What all users do alike: send, check the answer, and heed a refusal."""

    abstract = True

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        self.options = environment.parsed_options
        self.client.trust_env = False
        if self.options.api_key:
            self.client.headers["Authorization"] = f"Bearer {self.options.api_key}"

    def wait_time(self) -> float:
        """Until the next task, so that they begin at a constant rate."""
        wait_s: float = constant_throughput(self.options.user_rate)(self)
        return wait_s

    def draw(self) -> dict[str, Any]:
        """The body of a request like those of the benchmark's trace."""
        mix = Mix(sizes=tuple((size, 1.0) for size in self.options.sizes.split(",")))
        request: TraceRequest = draw_trace(mix, 1, random.getrandbits(32))[0]
        return {
            "prompt": request.prompt,
            "size": request.size,
            "num_inference_steps": min(request.num_inference_steps, self.options.most_steps),
            "guidance_scale": request.guidance_scale,
            "scheduler": request.scheduler,
            "seed": request.seed,
            "n": request.n,
            "step_cache": self.options.step_cache,
        }

    def ask(self, url: str, body: dict[str, Any], name: str) -> dict[str, Any] | None:
        """Send a request and check its answer; None if there are no right images."""
        with self.client.post(
            url, json=body, name=name, catch_response=True, timeout=RESPONSE_TIMEOUT_S
        ) as response:
            if self.was_refused(response):
                return None
            if response.status_code != 200:
                response.failure(f"status {response.status_code}: {response.text[:120]}")
                return None
            answer: dict[str, Any] = response.json()
            complaint = complaint_about_images(answer, body)
            if complaint:
                response.failure(complaint)
                return None
            self.tell_timings(response.headers.get("Server-Timing", ""))
            return answer

    def was_refused(self, response: Any) -> bool:
        """Whether the server was full. Counted apart; the user comes back when it was told to."""
        if response.status_code not in REFUSED:
            return False
        response.request_meta["request_type"] = REFUSAL
        if "Retry-After" not in response.headers:
            response.failure("a refusal without Retry-After")
            return True
        response.success()
        gevent.sleep(min(float(response.headers["Retry-After"]), LONGEST_RETRY_S))
        return True

    def tell_timings(self, server_timing: str) -> None:
        """What the server told, as statistics of their own."""
        timings = read_server_timing(server_timing)
        for stage, name in (("queue", "queue wait"), ("first-step", "time to first step")):
            if stage in timings:
                self.tell(name, timings[stage])

    def tell(self, name: str, seconds: float) -> None:
        """One value of a statistic."""
        self.environment.events.request.fire(
            request_type=METRIC,
            name=name,
            response_time=1000 * seconds,
            response_length=0,
            exception=None,
            context={},
        )


class SingleShot(StepserveUser):
    """One image request now and then."""

    weight = 5

    @tag("single")
    @task
    def make(self) -> None:
        """One request."""
        self.ask(GENERATIONS, self.draw(), "single shot")


class Burst(StepserveUser):
    """Several requests at once, as a page that shows a choice sends them."""

    weight = 2

    @tag("burst")
    @task
    def make(self) -> None:
        """Some requests for one prompt, and the answers to all."""
        body = self.draw() | {"n": 1}
        group = Group()
        for index in range(BURST):
            variant = body | {"seed": body["seed"] + index}
            group.spawn(self.ask, GENERATIONS, variant, "burst")
        group.join()


class Editor(StepserveUser):
    """Makes an image, and then changes it again and again."""

    weight = 2

    @tag("editor")
    @task
    def make_and_change(self) -> None:
        """Each edit starts from the last answer."""
        body = self.draw() | {"n": 1}
        answer = self.ask(GENERATIONS, body, "first of an editor")
        for _ in range(EDITS_OF_AN_IMAGE):
            if answer is None:
                return
            image = f"data:image/png;base64,{answer['data'][0]['b64_json']}"
            edit = body | {"image": image, "strength": STRENGTH, "seed": body["seed"] + 1}
            answer = self.ask(EDITS, edit, "edit")


class Streamer(StepserveUser):
    """Watches images appear."""

    weight = 2

    @tag("streamer")
    @task
    def watch(self) -> None:
        """A stream with partial images."""
        body = self.draw() | {"n": 1, "stream": True, "partial_images": PARTIAL_IMAGES}
        started_s = time.perf_counter()
        with self.client.post(
            GENERATIONS,
            json=body,
            name="stream",
            stream=True,
            catch_response=True,
            timeout=RESPONSE_TIMEOUT_S,
        ) as response:
            if self.was_refused(response):
                return
            if response.status_code != 200:
                response.failure(f"status {response.status_code}")
                return
            complaint = self.read(response, body, started_s)
            # locust's own time ends with the headers.
            response.request_meta["response_time"] = 1000 * (time.perf_counter() - started_s)
            if complaint:
                response.failure(complaint)

    def read(self, response: Any, body: dict[str, Any], started_s: float) -> str:
        """Read the stream to its end; what is wrong with it."""
        completed = 0
        for name, event in read_events(response.iter_lines(chunk_size=1)):
            if name == "error":
                return f"the stream ended with {event['error']['code']}"
            complaint = complaint_about_image(event["b64_json"], body)
            if complaint:
                return complaint
            if name.endswith("partial_image") and event["partial_image_index"] == 0:
                self.tell("time to first partial image", time.perf_counter() - started_s)
            completed += name.endswith("completed")
        if completed != 1:
            return f"{completed} finished images instead of 1"
        return "" if event["seed"] == body["seed"] else f"seed {event['seed']}, not {body['seed']}"


class Impatient(StepserveUser):
    """Leaves before most images are there."""

    weight = 1

    @tag("impatient")
    @task
    def leave(self) -> None:
        """Closing the connection cancels the request."""
        patience_s = random.uniform(SHORTEST_PATIENCE_S, LONGEST_PATIENCE_S)
        with self.client.post(
            GENERATIONS, json=self.draw(), name="impatient", catch_response=True, timeout=patience_s
        ) as response:
            if isinstance(response.error, Timeout):
                response.request_meta["request_type"] = LEFT
                response.success()
            elif not self.was_refused(response) and response.status_code != 200:
                response.failure(f"status {response.status_code} {response.error or ''}")


@events.quitting.add_listener
def judge(environment: Environment, **_: Any) -> None:
    """Say whether the test passed. Workers leave that to the master."""
    if isinstance(environment.runner, WorkerRunner) or environment.web_ui:
        return
    verdicts = verdicts_on(environment)
    for passed, text in verdicts:
        print(f"{'pass' if passed else 'FAIL'}: {text}")
    passed = all(passed for passed, _ in verdicts)
    print("the load test PASSED" if passed else "the load test FAILED", flush=True)
    environment.process_exit_code = 0 if passed else 1


def verdicts_on(environment: Environment) -> list[tuple[bool, str]]:
    """What the test had to show, and whether it did."""
    options, entries = environment.parsed_options, list(environment.stats.entries.values())
    responses = [entry for entry in entries if entry.method not in TOLD_APART]
    refused = sum(entry.num_requests for entry in entries if entry.method == REFUSAL)
    left = sum(entry.num_requests for entry in entries if entry.method == LEFT)
    failed = sum(entry.num_failures for entry in entries)
    asked = sum(entry.num_requests for entry in responses) + refused
    answered = sum(entry.num_requests - entry.num_failures for entry in responses)
    failed_share, refused_share = (count / max(asked, 1) for count in (failed, refused))
    verdicts = [
        (answered > 0, f"{answered} right answers; {left} clients left before theirs"),
        (failed_share <= options.max_failures, f"{failed} failures ({failed_share:.1%})"),
        (refused_share <= options.max_refusals, f"{refused} refusals ({refused_share:.1%})"),
    ]
    if options.max_p95_s:
        p95_s = max((e.get_response_time_percentile(0.95) for e in responses), default=0) / 1000
        verdicts.append((p95_s <= options.max_p95_s, f"the worst p95 is {p95_s:.2f} s"))
    return verdicts
