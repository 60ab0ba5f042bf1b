"""Whatever a route raises is answered from the error table."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from service.api.errors import (
    MalformedJsonError,
    MethodNotAllowedError,
    UnknownRouteError,
    error_response,
)
from service.api.middleware import request_id_of
from service.api.schemas import ImageRequest
from service.api.validation import invalid_request
from service.domain.errors import InvalidRequestError, StepserveError
from service.domain.limits import shown


def add_error_handlers(app: FastAPI) -> None:
    """Make `app` answer our errors, FastAPI's and the router's in one shape."""
    for error_class in (StepserveError, RequestValidationError, HTTPException):
        app.add_exception_handler(error_class, _answer)


async def _answer(request: Request, error: Exception) -> JSONResponse:
    ours = _translate(request, error)
    response = error_response(ours, request_id_of(request.scope))
    if isinstance(error, HTTPException):
        response.headers.update(error.headers or {})  # "Allow" of a 405
    return response


def _translate(request: Request, error: Exception) -> Exception:
    if isinstance(error, RequestValidationError):
        return invalid_request(error, ImageRequest)
    if isinstance(error, HTTPException):
        return _translate_routing(request, error)
    return error


def _translate_routing(request: Request, error: HTTPException) -> InvalidRequestError:
    url = f"{request.method} {shown(request.url.path)}"
    match error.status_code:
        case 404:
            return UnknownRouteError(f"no such URL: {url}; see /docs for those there are")
        case 405:
            allowed = (error.headers or {}).get("Allow", "another method")
            return MethodNotAllowedError(f"cannot {url}; use {allowed}")
        case 400:
            # FastAPI's word for JSON that fails otherwise: not UTF-8, too deep, endless digits.
            return MalformedJsonError("the body is not valid JSON in UTF-8")
    return InvalidRequestError(error.detail)
