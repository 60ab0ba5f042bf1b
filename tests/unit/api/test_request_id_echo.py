from __future__ import annotations

from api_fakes import FakeBackend, client_for

from service.api import ApiSettings


async def test_the_id_can_be_left_to_a_proxy(backend: FakeBackend):
    settings = ApiSettings(default_model="emoji", echo_request_id=False)
    async with client_for(backend, settings) as client:
        response = await client.get("/nowhere", headers={"X-Request-ID": "mine"})

    assert "x-request-id" not in response.headers
