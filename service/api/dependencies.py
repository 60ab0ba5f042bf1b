"""What routes are given: the collaborators, and the checks before a body is looked at."""

from __future__ import annotations

import secrets
from email.message import Message
from typing import Annotated, cast

from fastapi import Depends, Request

from service.api.backend import Backend, ModelStatus
from service.api.errors import UnsupportedMediaTypeError
from service.api.middleware import request_id_of
from service.api.settings import ApiSettings
from service.domain.errors import NotReadyError, UnknownModelError
from service.domain.limits import did_you_mean, shown

READY_RETRY_S = 5.0
"""When to ask a loading model again: loading takes seconds to minutes."""


def get_backend(request: Request) -> Backend:
    """Return the backend the app was made with."""
    return cast(Backend, request.app.state.backend)


def get_settings(request: Request) -> ApiSettings:
    """Return the settings the app was made with."""
    return cast(ApiSettings, request.app.state.settings)


def make_generation_id(request: Request) -> str:
    """Return an id that is unique even where two clients send the same `X-Request-ID`."""
    return f"{request_id_of(request.scope)}-{secrets.token_hex(4)}"


def require_json(request: Request) -> None:
    """Refuse a body that is not declared as JSON.

    Raises:
        UnsupportedMediaTypeError: the `Content-Type` is missing or another one.
    """
    given = request.headers.get("content-type", "")
    header = Message()
    header["content-type"] = given
    if header.get_content_type() != "application/json":
        got = shown(given) if given else "none"
        raise UnsupportedMediaTypeError(f"Content-Type must be 'application/json', got {got}")


BackendDep = Annotated[Backend, Depends(get_backend)]
SettingsDep = Annotated[ApiSettings, Depends(get_settings)]
GenerationId = Annotated[str, Depends(make_generation_id)]


async def find_model(backend: Backend, model_id: str) -> ModelStatus:
    """Return the status of one model.

    Raises:
        UnknownModelError: no such model; the message lists those there are.
    """
    statuses = {status.capabilities.id: status for status in await backend.models()}
    if model_id not in statuses:
        raise UnknownModelError(
            f"no model {shown(model_id)}{did_you_mean(model_id, statuses)} "
            f"(served: {', '.join(statuses) or 'none'})",
            "model",
        )
    return statuses[model_id]


def require_ready(statuses: list[ModelStatus]) -> None:
    """Return if every model takes requests.

    Raises:
        NotReadyError: names the models that do not, and why.
    """
    waiting = [status for status in statuses if not status.ready]
    if waiting or not statuses:
        parts = [
            f"{status.capabilities.id} ({status.detail or 'no reason given'})" for status in waiting
        ]
        raise NotReadyError(f"not ready: {', '.join(parts) or 'no model is served'}", READY_RETRY_S)
