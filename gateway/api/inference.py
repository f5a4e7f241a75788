"""What every inference route does: check the key, read the body, make an Ask of it, run the turn."""

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import aiohttp
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from config.defaults import Settings
from gateway.api.credentials import authenticate
from gateway.api.services import CORS, HEALTH, KEYED_TURNS, LIFECYCLE, REQUEST_ID, SETTINGS
from gateway.edge.handover import ClientProtocol
from gateway.errors import ApiError, BadRequest, BodyTooLarge, RequestTimeout
from gateway.hints import hints_of
from gateway.idempotent import HEADER, key_of
from gateway.relay.downstream import ClientGone, HttpDownstream, Relayed
from gateway.turn import Ask

log = logging.getLogger("poolgate.turns")

SCOPE = "inference"
"""What a key must be allowed to do."""

JSON_TYPES = ("application/json", "application/octet-stream")
"""Octet-stream is what aiohttp calls a body without a Content-Type; OpenAI takes one."""


AskOf = Callable[[bytes, Settings], Ask]
"""Decodes a route's body into what it asks. Raises BadRequest."""


async def infer(request: web.Request, ask_of: AskOf) -> web.StreamResponse:
    """Run one turn for `request`, which came through aiohttp."""
    app = request.app
    principal = await authenticate(request, SCOPE)
    key = key_of(request.headers.get(HEADER))
    is_here = request.content.is_eof()
    body = await read_body(request)
    if not is_here:  # it may have taken minutes, in which the key was revoked or its limits were changed
        principal = await authenticate(request, SCOPE)
    ask = ask_of(body, app[SETTINGS])
    ask.hints = hints_of(request.headers.get)
    protocol = request.protocol
    assert isinstance(protocol, ClientProtocol)
    down = HttpDownstream(
        protocol, is_http_11=request.version >= (1, 1), stall_s=app[SETTINGS].client_stall_s,
        keep_alive=request.keep_alive and not app[HEALTH].is_draining,
        own_lines=app[CORS].lines(request.headers.get("Origin")),
    )  # fmt: skip
    request_id = request[REQUEST_ID]
    try:
        if key is None:
            await app[LIFECYCLE].run(ask, principal, request_id, down)
        else:
            turns = app[KEYED_TURNS]
            request_hash = turns.request_hash(request.method, request.path, body)
            await turns.run(ask, principal, request_id, down, key=key, request_hash=request_hash)
    except ClientGone:
        return Relayed(down, whole=False)
    except ApiError:
        raise
    except Exception as error:
        if not down.is_started:
            raise
        log_crash(request_id, error)
        return Relayed(down, whole=False)
    return Relayed(down, whole=True)


def log_crash(request_id: str, error: Exception) -> None:
    """A turn whose answer had begun broke, by a fault of ours."""
    extra = {"action": "turn_crashed", "request_id": request_id}
    log.error("a turn failed inside poolgate", exc_info=error, extra=extra)


async def read_body(request: web.Request, bytes_max: int | None = None) -> bytes:
    """The whole body, at most `bytes_max` (the setting `body_bytes_max`), within `body_timeout_s`.

    Counted as it comes, so a body without a length is bounded as well; a length that says more is refused unread.
    """
    settings = request.app[SETTINGS]
    limit = bytes_max or settings.body_bytes_max
    if request.content_length is not None and request.content_length > limit:
        raise _too_large(limit)
    if request.content_type not in JSON_TYPES:
        raise BadRequest(
            "Send the body as 'Content-Type: application/json'.", code="unsupported_content_type"
        )
    if request.headers.get("Content-Encoding", "identity").strip().lower() != "identity":
        raise BadRequest("Send the body without Content-Encoding.", code="unsupported_content_encoding")
    content = request.content
    try:
        if content.is_eof():  # it came with the head, as small ones do: no timer is needed
            body = content.read_nowait()
            if len(body) > limit:
                raise _too_large(limit)
            return body
        return await _body_to_come(request, limit, settings.body_timeout_s)
    except TimeoutError:
        raise RequestTimeout from None
    except (web.RequestPayloadError, aiohttp.ClientPayloadError, HttpProcessingError):
        raise BadRequest("The request body is not what its headers say.") from None


async def _body_to_come(request: web.Request, limit: int, timeout_s: float) -> bytes:
    body = bytearray()
    async with asyncio.timeout(timeout_s):
        async for piece in request.content.iter_any():
            body += piece
            if len(body) > limit:
                raise _too_large(limit)
    return bytes(body)


def _too_large(limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"The request body is too large: at most {limit} bytes.")


def stream_options(body: dict[str, Any]) -> tuple[bool, bool]:
    """What usage the client wants (in the end, in every event); the body then asks the engine for all of it."""
    options = body.get("stream_options") or {}
    wants_usage = bool(options.get("include_usage"))
    wants_every = wants_usage and bool(options.get("continuous_usage_stats"))
    body["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    return wants_usage, wants_every
