"""How the door says no: every error as the OpenAI protocol shapes it, with the HTTP status that fits."""

from __future__ import annotations

import logging
from http import HTTPStatus
from math import ceil
from typing import TYPE_CHECKING, Any, cast

import msgspec
from starlette.exceptions import HTTPException
from starlette.responses import Response

from .. import errors

if TYPE_CHECKING:
    from starlette.requests import Request

__all__ = ["Refusal", "error_body", "on_error", "on_refusal", "on_unexpected"]

log = logging.getLogger(__name__)

ANSWERS: tuple[tuple[type[errors.WhisperFastError], int, str, str], ...] = (
    (errors.IdReused, 422, "invalid_request_error", "idempotency_key_reused"),
    (errors.InvalidMessage, 400, "invalid_request_error", "invalid_message"),
    (errors.Busy, 409, "conflict_error", "busy"),
    (errors.Quarantined, 422, "invalid_request_error", "quarantined"),
    (errors.Interrupted, 409, "conflict_error", "interrupted"),
    (errors.Overloaded, 503, "overloaded_error", "overloaded"),
    (errors.DeadlineExceeded, 504, "timeout_error", "deadline_exceeded"),
    (errors.Closed, 503, "server_error", "shutting_down"),
    (errors.StoreFull, 507, "server_error", "store_full"),
    (errors.StoreError, 503, "server_error", "store_unavailable"),
    (errors.LLMRateLimited, 429, "rate_limit_error", "rate_limit_exceeded"),
    (errors.LLMTimeout, 504, "timeout_error", "llm_timeout"),
    (errors.LLMMisconfigured, 502, "upstream_error", "llm_misconfigured"),
    (errors.LLMRejected, 502, "upstream_error", "llm_rejected"),
    (errors.LLMProtocolError, 502, "upstream_error", "llm_protocol_error"),
    (errors.LLMError, 502, "upstream_error", "llm_unavailable"),
    (errors.WhisperFastError, 500, "server_error", "internal_error"),
)
"""Error class, HTTP status, OpenAI `type`, OpenAI `code`; the first class that fits is taken."""


class Refusal(HTTPException):
    """What the door refuses before the engine is asked; raised by routes, answered by `on_refusal`."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.code = code
        self.param = param


def shaped(message: str, kind: str, code: str | None, param: str | None = None) -> bytes:
    """Return `{"error": {...}}` as JSON."""
    return msgspec.json.encode({"error": {"message": message, "type": kind, "param": param, "code": code}})


def looked_up(error: errors.WhisperFastError) -> tuple[int, str, str]:
    return next((status, kind, code) for cls, status, kind, code in ANSWERS if isinstance(error, cls))


def error_body(error: errors.WhisperFastError) -> bytes:
    """Return the JSON of one of our errors, for a stream that has already begun."""
    _, kind, code = looked_up(error)
    return shaped(str(error), kind, code)


def answer(status: int, body: bytes, headers: Any = None) -> Response:
    return Response(body, status, headers, media_type="application/json")


async def on_error(request: Request, error: Exception) -> Response:
    """Answer one of our own errors; `Retry-After` is in whole seconds, rounded up."""
    error = cast(errors.WhisperFastError, error)  # the class it is registered for
    status, _, code = looked_up(error)
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        log.warning("a request was answered with %d %s", status, code)
    headers = None if error.retry_after is None else {"retry-after": str(max(1, ceil(error.retry_after)))}
    return answer(status, error_body(error), headers)


async def on_refusal(request: Request | None, error: Exception) -> Response:
    """Answer a Refusal, and the router's own 404 and 405."""
    error = cast(HTTPException, error)  # the class it is registered for
    code = error.code if isinstance(error, Refusal) else HTTPStatus(error.status_code).name.lower()
    param = error.param if isinstance(error, Refusal) else None
    kind = "authentication_error" if error.status_code == HTTPStatus.UNAUTHORIZED else "invalid_request_error"
    return answer(error.status_code, shaped(error.detail, kind, code, param), error.headers)


async def on_unexpected(request: Request, error: Exception) -> Response:
    """Answer a fault of ours without its text, which may hold what a user said; the server logs it."""
    return answer(500, shaped("an unexpected fault; the server's log holds it", "server_error", "internal_error"))
