"""Whatever a route raises is answered from the error table."""

from __future__ import annotations

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from stepserve.api.bodies.schemas import ImageRequest
from stepserve.api.bodies.validation import invalid_request
from stepserve.api.errors import (
    MalformedJsonError,
    MethodNotAllowedError,
    UnknownRouteError,
    error_response,
)
from stepserve.api.http.methods import allowed_methods
from stepserve.api.request_id import request_id_of
from stepserve.domain.checks.wording import shown
from stepserve.domain.errors import InvalidRequestError, StepserveError

PREFLIGHT = "Access-Control-Request-Method"
"""A browser asks whether a page from elsewhere may call. Where it gets here, no page may."""


def add_error_handlers(app: FastAPI) -> None:
    """Make `app` answer our errors, FastAPI's and the router's in one shape."""
    for error_class in (StepserveError, RequestValidationError, HTTPException):
        app.add_exception_handler(error_class, _response)


async def _response(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException) and error.status_code == 405:
        return _respond_to_method(request)
    response = error_response(_translate(request, error), request_id_of(request.scope))
    if isinstance(error, HTTPException):
        response.headers.update(error.headers or {})
    return response


def _respond_to_method(request: Request) -> Response:
    """Tell the methods of a path: as an error, unless that was the question."""
    allowed = allowed_methods(request.app, request.scope)
    if request.method == "OPTIONS" and PREFLIGHT not in request.headers:
        return Response(status_code=204, headers={"Allow": ", ".join([*allowed, "OPTIONS"])})
    told = ", ".join(allowed)
    url = f"{request.method} {shown(request.url.path)}"
    error = MethodNotAllowedError(f"cannot {url}; use {told}")
    response = error_response(error, request_id_of(request.scope))
    response.headers["Allow"] = told
    return response


def _translate(request: Request, error: Exception) -> Exception:
    if isinstance(error, RequestValidationError):
        return invalid_request(error, ImageRequest)
    if not isinstance(error, HTTPException):
        return error
    url = f"{request.method} {shown(request.url.path)}"
    match error.status_code:
        case 404:
            return UnknownRouteError(f"no such URL: {url}; see /docs for those there are")
        case 400:
            # FastAPI's word for JSON that fails otherwise: not UTF-8, too deep, endless digits.
            return MalformedJsonError("the body is not valid JSON in UTF-8")
    return InvalidRequestError(error.detail)
