"""What metrics and logs are told of HTTP exchanges."""

from __future__ import annotations

import asyncio
import json
import logging
from dataclasses import replace

import httpx
import pytest
from api_fakes import (
    EMOJI,
    SETTINGS,
    Blocking,
    FakeBackend,
    Generate,
    finish,
    make_store,
    raising,
)
from stepserve.api import create_app
from stepserve.api.auth.access import Access
from stepserve.api.auth.keys import ApiKey, KeyRing, hash_key
from stepserve.api.auth.usage import LocalUsage
from stepserve.api.exchange_context import Exchange
from stepserve.api.observe.access_log import AccessLog
from stepserve.api.observe.exchanges import Observation
from stepserve.domain.errors import GenerationFailedError, ServerFullError
from stepserve.domain.events import Failed, Outcome
from stepserve.domain.model_status import ModelStatus
from stepserve.domain.requests import GenerationRequest
from stepserve.telemetry.logs import JsonFormatter

GENERATIONS = "/v1/images/generations"
TRACE = "0af7651916cd43dd8448eb211c80319c"


async def no_metrics() -> str:
    return "stepserve_x 1\n"


class Watched:
    """An app in memory, and all exchanges it told of."""

    def __init__(self, keys: tuple[ApiKey, ...] = (), metrics=no_metrics) -> None:
        self.backend = FakeBackend()
        self.exchanges: list[Exchange] = []
        observation = Observation((self.exchanges.append, AccessLog()), metrics)
        access = Access(KeyRing(keys), LocalUsage(lambda: 0.0))
        app = create_app(self.backend, SETTINGS, make_store(), access, observation)
        transport = httpx.ASGITransport(app=app)
        self.client = httpx.AsyncClient(transport=transport, base_url="http://test")

    async def post(self, headers: dict[str, str] | None = None, **body: object) -> Exchange:
        await self.client.post(GENERATIONS, json={"prompt": "cat"} | body, headers=headers)
        return self.exchanges[-1]


async def test_a_image_that_was_made():
    headers = {"X-Request-ID": "mine", "traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}
    told = await Watched().post(headers)

    assert (told.method, told.route, told.status, told.outcome) == ("POST", GENERATIONS, 200, "ok")
    assert (told.request_id, told.trace_id, told.notes.model) == ("mine", TRACE, "emoji")
    assert told.notes.timings.denoise_s == 0.25
    assert told.duration_s > 0


async def test_an_alias_counts_for_its_model():
    watched = Watched()
    aliased = replace(EMOJI, aliases=("gpt-image-1",))
    watched.backend.statuses = [ModelStatus(aliased, ready=True)]
    told = await watched.post(model="gpt-image-1")

    assert (told.status, told.notes.model, told.notes.generation.model) == (200, "emoji", "emoji")


@pytest.mark.parametrize(
    ("error", "status", "outcome", "is_refusal"),
    [
        (ServerFullError("full", 3), 429, "server_full", True),
        (GenerationFailedError("no"), 500, "generation_failed", False),
    ],
)
async def test_errors_are_told_by_their_code(error, status, outcome, is_refusal):
    watched = Watched()
    watched.backend.generate_with(raising(error))
    told = await watched.post()

    assert (told.status, told.outcome, told.notes.is_refusal) == (status, outcome, is_refusal)


async def test_a_model_that_is_not_served_names_no_series():
    told = await Watched().post(model="made-up-name")

    assert (told.status, told.outcome, told.notes.model) == (404, "model_not_found", "")


@pytest.mark.parametrize(
    ("url", "route"),
    [
        ("/v1/models/emoji", "/v1/models/{id}"),
        ("/v1/requests/some-id", "/v1/requests/{id}"),
        ("/any/thing/at/all", "unmatched"),
        ("/healthz", "/healthz"),
        ("/playground/api.js", "/playground"),
    ],
)
async def test_routes_are_templates(url: str, route: str):
    watched = Watched()
    await watched.client.get(url)

    assert watched.exchanges[-1].route == route


async def test_who_is_refused_before_the_router_is_told_too():
    key = ApiKey(name="app", sha256=hash_key("secret"), requests_per_minute=1)
    watched = Watched((key,))
    without = await watched.post()
    first = await watched.post({"Authorization": "Bearer secret"})
    second = await watched.post({"Authorization": "Bearer secret"})

    assert (without.route, without.outcome) == (GENERATIONS, "invalid_api_key")
    assert (first.outcome, first.caller) == ("ok", "app")
    assert (second.outcome, second.notes.is_refusal) == ("rate_limit_exceeded", True)


async def test_streams_are_told_once_they_end():
    told = await Watched().post(stream=True)

    assert (told.status, told.outcome, told.notes.timings.denoise_s) == (200, "ok", 0.25)


async def test_a_stream_that_fails_is_no_success():
    watched = Watched()

    async def fail(request):
        from stepserve.domain.events import Accepted, Failed

        yield Accepted(request.id, 0, 0.5)
        yield Failed(request.id, GenerationFailedError("no"))

    watched.backend.stream_with = fail
    told = await watched.post(stream=True)

    assert (told.status, told.outcome) == (200, "generation_failed")


async def test_a_client_that_left():
    watched = Watched()
    blocking = Blocking()
    watched.backend.generate_with(blocking)
    task = asyncio.create_task(watched.post())
    await asyncio.to_thread(blocking.began.wait, 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    (told,) = watched.exchanges
    assert (told.status, told.outcome) == (499, "request_cancelled")


async def test_metrics_are_shown_or_not():
    shown = await Watched().client.get("/metrics")
    hidden = await Watched(metrics=None).client.get("/metrics")

    assert (shown.status_code, shown.text) == (200, "stepserve_x 1\n")
    assert shown.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert hidden.status_code == 404


async def test_one_access_line_without_the_prompt(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    await Watched().post({"X-Request-ID": "mine"}, prompt="a secret wish", seed=1)

    (record,) = [r for r in caplog.records if r.name == "stepserve.api.observe.access_log"]
    line = JsonFormatter().format(record)
    told = json.loads(line)
    assert "secret wish" not in line
    assert told["message"] == f"POST {GENERATIONS} 200"
    assert (told["request_id"], told["model"], told["size"]) == ("mine", "emoji", "64x64")
    assert told["denoise_s"] == 0.25
    assert "trace_id" not in told


async def test_of_several_prompts_it_is_told_how_many_failed(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    watched = Watched()
    prompts = ["a wish", "", "a hope"]
    watched.backend.generate_with(full_of("a hope"))
    told = await watched.post(prompt=None, prompts=prompts)
    (record,) = [r for r in caplog.records if r.name == "stepserve.api.observe.access_log"]
    AccessLog(prompts=True)(told)

    fields = vars(record)["fields"]
    assert (told.status, told.outcome, told.notes.is_refusal) == (200, "ok", False)
    assert (told.notes.failures, told.notes.refusals) == (
        ["invalid_value", "server_full"],
        ["server_full"],
    )
    assert (fields["prompt_count"], fields["failed_count"]) == (3, 2)
    assert "prompt" not in fields
    assert vars(caplog.records[-1])["fields"]["prompt"] == prompts


def full_of(prompt: str) -> Generate:
    async def generate(request: GenerationRequest) -> Outcome:
        if request.prompt == prompt:
            return Failed(request.id, ServerFullError("full", 3))
        return await finish(request)

    return generate


async def test_prompts_are_told_where_the_operator_wants(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    watched = Watched()
    AccessLog(prompts=True)(await watched.post(prompt="a wish"))

    assert vars(caplog.records[-1])["fields"]["prompt"] == "a wish"


async def test_probes_are_quiet(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    watched = Watched()
    for url in ("/healthz", "/readyz", "/metrics", "/playground/api.js"):
        await watched.client.get(url)

    assert [r for r in caplog.records if r.name == "stepserve.api.observe.access_log"] == []
