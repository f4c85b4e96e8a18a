"""The body of a request: read up to a limit, decoded and checked in one pass."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect

from .refusal import Refusal

if TYPE_CHECKING:
    from starlette.requests import Request

__all__ = ["BODY_BYTES", "decoded", "read"]

BODY_BYTES = 4 << 20
"""Largest body: a message is at most `max_text_bytes`, the rest is room for history, tools and images."""

SURROGATE = re.compile("[\ud800-\udfff]")
PLACE = re.compile(r" - at `(?:key in )?\$\.?([^`]*)`$")
T = TypeVar("T")


async def read(request: Request, limit: int = BODY_BYTES) -> bytes:
    """Return the body; raises Refusal 413 as soon as it is known to exceed `limit` bytes."""
    announced = request.headers.get("content-length", "")
    if announced.isascii() and announced.isdigit() and int(announced) > limit:
        raise too_large(limit)
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit:
                raise too_large(limit)
    except ClientDisconnect:  # nobody is left to read the answer
        raise Refusal(400, "the body broke off", code="incomplete_body") from None
    return bytes(body)


def too_large(limit: int) -> Refusal:
    return Refusal(413, f"the body is larger than {limit} bytes", code="request_too_large")


def decoded(body: bytes, kind: type[T]) -> tuple[T, dict[str, Any]]:
    r"""Return the body as a `kind`, and all its fields as they came, unknown ones too.

    Raises Refusal 400 that says what was found and where. Escapes of lone surrogates (`"\ud800"`), which JavaScript
    sends when it cuts an emoji in two, become U+FFFD.
    """
    try:
        fields = msgspec.json.decode(body, type=dict[str, Any])
        return msgspec.convert(fields, kind), fields
    except msgspec.ValidationError as error:
        raise invalid(str(error)) from None
    except msgspec.DecodeError as error:
        if b"\\ud" not in body.lower():
            raise malformed(str(error)) from None
        return decoded(mended(body), kind)
    except (UnicodeDecodeError, RecursionError) as error:
        raise malformed(str(error)) from None


def mended(body: bytes) -> bytes:
    """Return the same JSON without lone surrogates, by way of the library that allows them."""
    try:
        text = json.dumps(json.loads(body), ensure_ascii=False, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise malformed(str(error)) from None
    return SURROGATE.sub("\ufffd", text).encode()


def malformed(reason: str) -> Refusal:
    return Refusal(400, f"the body is not JSON: {reason}", code="invalid_json")


def invalid(reason: str) -> Refusal:
    place = PLACE.search(reason)
    return Refusal(400, reason, code="invalid_type", param=place[1] if place and place[1] else None)
