"""Mixed requests for pictures: `locust -f loadtests/locustfile.py --host http://127.0.0.1:8000`."""

from __future__ import annotations

import random

from locust import HttpUser, between, task

PROMPTS = ("red heart", "rocket on a blue background", "pizza", "sunflower", "cat face")
SCHEDULERS = ("DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler")
GENERATIONS = "/v1/images/generations"


class Painter(HttpUser):
    """Somebody who asks for pictures, looks at them, and asks for more."""

    wait_time = between(0.5, 3)

    @task(6)
    def quick(self) -> None:
        """Few steps, urgent."""
        self._draw("quick", num_inference_steps=random.randint(4, 10), priority="interactive")

    @task(3)
    def usual(self) -> None:
        """As most requests are."""
        self._draw("usual", num_inference_steps=random.randint(15, 30))

    @task(1)
    def many(self) -> None:
        """Several pictures with many steps, when there is time."""
        self._draw("many", num_inference_steps=50, n=4, priority="batch")

    def _draw(self, name: str, **wanted: object) -> None:
        body = {
            "prompt": random.choice(PROMPTS),
            "seed": random.randrange(2**31),
            "scheduler": random.choice(SCHEDULERS),
            "guidance_scale": random.choice((1.0, 4.0)),
        }
        with self.client.post(
            GENERATIONS, json=body | wanted, name=name, catch_response=True
        ) as answer:
            # A full server says so: that is an answer, not a failure.
            if answer.status_code == 429:
                answer.success()
