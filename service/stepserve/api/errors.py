"""The one table from error class to HTTP response, and the response's shape (OpenAI's).

Only answers of status 500 hide their message: what a pipeline or a bug raised may name paths,
so it goes to the log, under the request id that the caller is told.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.types import Receive, Scope, Send

from stepserve.api.exchange_context import exchange_context_of
from stepserve.api.results.space import ResultsUnavailableError
from stepserve.api.results.store import LinkExpiredError, ResultNotFoundError, WrongSignatureError
from stepserve.domain.errors import (
    BodyTooLargeError,
    CancelledError,
    ContentFilteredError,
    EndedError,
    ExpiredError,
    GenerationFailedError,
    InvalidRequestError,
    NotReadyError,
    RefusedError,
    RequestIdInUseError,
    ServerFullError,
    StepserveError,
    StoppedError,
    UnknownModelError,
    UnknownRequestError,
    UnmeetableDeadlineError,
    forget_frames,
)

logger = logging.getLogger(__name__)

MAX_RETRY_AFTER_S = 3600
STOPPED_RETRY_S = 5.0
"""When another server may be up in the place of one that stopped."""


class MalformedJsonError(InvalidRequestError):
    """The request body is not valid JSON."""


class MalformedFormError(InvalidRequestError):
    """The request body is not a valid form."""


class MalformedBodyError(InvalidRequestError):
    """The request body is not compressed as it says."""


class UnknownCharsetError(InvalidRequestError):
    """The texts of the request body are not in UTF-8."""


class UnsupportedMediaTypeError(InvalidRequestError):
    """The request body is declared as something that this URL does not take."""


class UnsupportedCodingError(UnsupportedMediaTypeError):
    """The request body is compressed in a way that nobody reads here."""

    codings = ("gzip", "deflate")


class MalformedHttpError(InvalidRequestError):
    """What arrived is not HTTP/1.1."""


class UrlTooLongError(InvalidRequestError):
    """The URL is longer than the limit."""


class HeadersTooLargeError(InvalidRequestError):
    """The headers are more than the limit, or more bytes."""


class SlowRequestError(InvalidRequestError):
    """The request did not arrive in time."""


class TooManyConnectionsError(RefusedError):
    """As many connections as the server holds are open."""


class TooManyBodiesError(RefusedError):
    """As many bytes of bodies as the server holds are being received."""


class UnknownRouteError(InvalidRequestError):
    """No such URL."""


class CrossSiteError(InvalidRequestError):
    """A page from elsewhere sent the request, from a browser."""


class MethodNotAllowedError(InvalidRequestError):
    """The URL exists, but not with this method."""


class UnauthorizedError(StepserveError):
    """The request has no API key, or a wrong one."""


class KeyLimitError(RefusedError):
    """The API key has used up what it may."""


class RequestTimedOutError(EndedError):
    """The request took longer than the server allows."""


class ErrorDetail(BaseModel):
    """What went wrong; `param` names the field at fault where there is one."""

    message: str
    type: str
    param: str | None = None
    code: str
    expected_s: float | None = Field(
        default=None,
        exclude_if=lambda value: value is None,
        description="Where a deadline was refused: the least that could be promised now, in "
        "seconds.",
    )


class PromptError(ErrorDetail):
    """Why one prompt of several has no images, as it would have been told if sent alone."""

    status: int = Field(description="The HTTP status that it would have had alone.")
    retry_after_s: int | None = Field(
        default=None,
        exclude_if=lambda value: value is None,
        description="Whole seconds after which a new try is likely to succeed.",
    )


@dataclass(frozen=True)
class ErrorKind:
    """How one class of errors is told over HTTP: status, `error.type` and `error.code`."""

    status: int
    type: str
    code: str


TABLE: dict[type[StepserveError], ErrorKind] = {
    InvalidRequestError: ErrorKind(400, "invalid_request_error", "invalid_value"),
    MalformedJsonError: ErrorKind(400, "invalid_request_error", "invalid_json"),
    MalformedFormError: ErrorKind(400, "invalid_request_error", "invalid_form"),
    MalformedBodyError: ErrorKind(400, "invalid_request_error", "invalid_body"),
    UnknownCharsetError: ErrorKind(400, "invalid_request_error", "unsupported_charset"),
    UnknownModelError: ErrorKind(404, "invalid_request_error", "model_not_found"),
    UnknownRequestError: ErrorKind(404, "invalid_request_error", "request_not_found"),
    UnauthorizedError: ErrorKind(401, "authentication_error", "invalid_api_key"),
    ResultNotFoundError: ErrorKind(404, "invalid_request_error", "result_not_found"),
    UnknownRouteError: ErrorKind(404, "invalid_request_error", "unknown_url"),
    WrongSignatureError: ErrorKind(403, "invalid_request_error", "invalid_signature"),
    CrossSiteError: ErrorKind(403, "invalid_request_error", "cross_site_request"),
    LinkExpiredError: ErrorKind(410, "invalid_request_error", "result_expired"),
    MethodNotAllowedError: ErrorKind(405, "invalid_request_error", "method_not_allowed"),
    RequestIdInUseError: ErrorKind(409, "invalid_request_error", "request_id_in_use"),
    SlowRequestError: ErrorKind(408, "invalid_request_error", "request_timeout"),
    MalformedHttpError: ErrorKind(400, "invalid_request_error", "invalid_http"),
    UrlTooLongError: ErrorKind(414, "invalid_request_error", "url_too_long"),
    HeadersTooLargeError: ErrorKind(431, "invalid_request_error", "headers_too_large"),
    BodyTooLargeError: ErrorKind(413, "invalid_request_error", "body_too_large"),
    UnsupportedMediaTypeError: ErrorKind(415, "invalid_request_error", "unsupported_media_type"),
    KeyLimitError: ErrorKind(429, "rate_limit_error", "rate_limit_exceeded"),
    ServerFullError: ErrorKind(429, "rate_limit_error", "server_full"),
    UnmeetableDeadlineError: ErrorKind(429, "rate_limit_error", "deadline_unmeetable"),
    # The client has left, so nobody reads it; the status is for logs (nginx's "client closed").
    CancelledError: ErrorKind(499, "cancelled", "request_cancelled"),
    StepserveError: ErrorKind(500, "server_error", "internal_error"),
    ContentFilteredError: ErrorKind(400, "image_generation_user_error", "moderation_blocked"),
    GenerationFailedError: ErrorKind(500, "server_error", "generation_failed"),
    NotReadyError: ErrorKind(503, "server_error", "not_ready"),
    ResultsUnavailableError: ErrorKind(503, "server_error", "results_unavailable"),
    TooManyConnectionsError: ErrorKind(503, "server_error", "too_many_connections"),
    TooManyBodiesError: ErrorKind(503, "server_error", "too_many_bodies"),
    RefusedError: ErrorKind(503, "server_error", "refused"),
    StoppedError: ErrorKind(503, "server_error", "server_stopped"),
    ExpiredError: ErrorKind(504, "server_error", "deadline_exceeded"),
    RequestTimedOutError: ErrorKind(504, "server_error", "timeout"),
}


def kind_of(error: Exception) -> ErrorKind:
    """Return the row of the nearest class in the table; anything unexpected is a 500."""
    rows = (TABLE[base] for base in type(error).__mro__ if base in TABLE)
    return next(rows, TABLE[StepserveError])


class ErrorResponse(JSONResponse):
    """Tells an error, and notes it."""

    def __init__(self, error: Exception, request_id: str) -> None:
        body = {"error": error_detail(error, request_id).model_dump()}
        super().__init__(body, status_code=kind_of(error).status, headers=_headers(error))
        # Frames that have this response among their locals would live on with all that they hold.
        forget_frames(error)
        self._error = error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        note_error(scope, self._error)
        await super().__call__(scope, receive, send)


def note_error(scope: Scope, error: Exception) -> None:
    """Let metrics and logs know how an exchange ended."""
    notes = exchange_context_of(scope)
    notes.error_code = kind_of(error).code
    notes.is_refusal = isinstance(error, RefusedError)


def note_failure(scope: Scope, error: Exception) -> None:
    """Let metrics and logs know of the error of one prompt of several."""
    notes, code = exchange_context_of(scope), kind_of(error).code
    notes.failures.append(code)
    if isinstance(error, RefusedError):
        notes.refusals.append(code)


def error_response(error: Exception, request_id: str) -> JSONResponse:
    """Return the HTTP response for `error`; a status of 500 is logged with its cause."""
    return ErrorResponse(error, request_id)


def error_detail(error: Exception, request_id: str) -> ErrorDetail:
    """Return what the caller is told of `error`; a status of 500 is logged with its cause."""
    kind = kind_of(error)
    return ErrorDetail(
        message=_public_message(error, kind, request_id),
        type=kind.type,
        param=_field_of(error),
        code=kind.code,
        expected_s=error.expected_s if isinstance(error, UnmeetableDeadlineError) else None,
    )


def prompt_error(error: Exception, request_id: str) -> PromptError:
    """Return what the caller is told of the error of one prompt of several."""
    detail = error_detail(error, request_id)
    status, after_s = kind_of(error).status, _retry_after_s(error)
    return PromptError(**vars(detail), status=status, retry_after_s=after_s)


def common_error(errors: Sequence[Exception]) -> Exception:
    """Return the error of a call whose prompts all failed.

    What goes away by itself comes first, as a new try then may succeed for some; after that the
    one with the highest status.
    """
    return max(errors, key=lambda error: (_retry_after_s(error) is not None, kind_of(error).status))


def _field_of(error: Exception) -> str | None:
    if isinstance(error, InvalidRequestError | UnmeetableDeadlineError):
        return error.field
    return None


def _public_message(error: Exception, kind: ErrorKind, request_id: str) -> str:
    if kind.status != 500:
        return str(error)
    logger.error("request %s failed", request_id, exc_info=error)
    return f"the server failed on this request; its log says why, under request id {request_id}"


def _headers(error: Exception) -> dict[str, str]:
    if isinstance(error, UnauthorizedError):
        return {"WWW-Authenticate": "Bearer"}
    if isinstance(error, UnsupportedCodingError):
        return {"Accept-Encoding": ", ".join(error.codings)}
    after_s = _retry_after_s(error)
    return {} if after_s is None else {"Retry-After": str(after_s)}


def _retry_after_s(error: Exception) -> int | None:
    """Seconds after which a new try is likely to succeed; None where that is not known."""
    if not isinstance(error, RefusedError | StoppedError):
        return None
    after_s = error.retry_after_s if isinstance(error, RefusedError) else STOPPED_RETRY_S
    # HTTP knows whole seconds only, and 0 would invite a tight loop.
    return math.ceil(min(max(after_s, 1), MAX_RETRY_AFTER_S))
