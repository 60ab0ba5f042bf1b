from __future__ import annotations

import json

import httpx
import pytest
from api_fakes import FakeBackend, client_for
from stepserve.config import HttpSettings, Settings

PAGE = "https://page.example"
GENERATIONS = "/v1/images/generations"
BODY = json.dumps({"prompt": "heart"}).encode()
FROM_ELSEWHERE = {"Sec-Fetch-Site": "cross-site", "Origin": "https://other.example"}
# What a browser sends without asking the server first.
UNASKED = ["text/plain", "application/x-www-form-urlencoded", "text/plain;charset=UTF-8"]


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
@pytest.mark.parametrize("media_type", [*UNASKED, "application/json"])
async def test_no_page_from_elsewhere_makes_the_service_work(
    client: httpx.AsyncClient, backend: FakeBackend, site: str, media_type: str
):
    headers = FROM_ELSEWHERE | {"Sec-Fetch-Site": site, "Content-Type": media_type}

    response = await client.post(GENERATIONS, content=BODY, headers=headers)

    assert (response.status_code, response.json()["error"]["code"]) == (403, "cross_site_request")
    assert "https://other.example" in response.json()["error"]["message"]
    assert backend.requests == []


async def test_a_request_of_a_page_from_elsewhere_that_names_no_page_is_refused(
    client: httpx.AsyncClient,
):
    response = await client.post(
        GENERATIONS, content=BODY, headers={"Sec-Fetch-Site": "cross-site"}
    )

    assert response.status_code == 403


@pytest.mark.parametrize("site", ["same-origin", "none"])
async def test_the_playground_and_the_address_bar_may_call(client: httpx.AsyncClient, site: str):
    headers = {"Sec-Fetch-Site": site, "Content-Type": "application/json"}

    response = await client.post(GENERATIONS, content=BODY, headers=headers)

    assert response.status_code == 200


@pytest.mark.parametrize("origins", [(PAGE,), ("*",)])
async def test_pages_that_are_named_may_call(backend: FakeBackend, origins: tuple[str, ...]):
    async with client_for(backend, Settings(http=HttpSettings(cors_origins=origins))) as client:
        headers = {"Sec-Fetch-Site": "cross-site", "Origin": PAGE}
        headers["Content-Type"] = "application/json"

        response = await client.post(GENERATIONS, content=BODY, headers=headers)

    assert response.status_code == 200


async def test_links_may_be_followed_from_elsewhere(client: httpx.AsyncClient):
    response = await client.get("/healthz", headers=FROM_ELSEWHERE)

    assert response.status_code == 200
