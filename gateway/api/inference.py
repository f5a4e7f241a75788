"""What every inference route does: check the key, read the body, make an Ask of it, run the turn."""

import logging
from collections.abc import Callable
from typing import Any

from aiohttp import web

from gateway.api.credentials import authenticate
from gateway.api.services import LIFECYCLE, REQUEST_ID, SETTINGS
from gateway.errors import ApiError, BadRequest, BodyTooLarge
from gateway.relay.downstream import ClientGone, HttpDownstream, Relayed
from gateway.turn import Ask

log = logging.getLogger("poolgate.turns")

JSON_TYPES = ("application/json", "application/octet-stream")
"""Octet-stream is what aiohttp calls a body without a Content-Type; OpenAI takes one."""


async def infer(request: web.Request, ask_of: Callable[[bytes, web.Request], Ask]) -> web.StreamResponse:
    """Run one turn for `request`; `ask_of` decodes its body."""
    principal = await authenticate(request, "inference")
    ask = ask_of(await read_body(request), request)
    down = HttpDownstream(request)
    try:
        await request.app[LIFECYCLE].run(ask, principal, request[REQUEST_ID], down)
    except ClientGone:
        return Relayed(down, whole=False)
    except ApiError:
        raise
    except Exception:
        if not down.is_started:
            raise
        log.exception(
            "a turn failed inside poolgate",
            extra={"action": "turn_crashed", "request_id": request[REQUEST_ID]},
        )
        return Relayed(down, whole=False)
    return Relayed(down, whole=True)


async def read_body(request: web.Request) -> bytes:
    """The whole body, at most `body_bytes_max`; a length that says more is refused before it is read."""
    limit = request.app[SETTINGS].body_bytes_max
    too_large = f"The request body is too large: at most {limit} bytes."
    if request.content_length is not None and request.content_length > limit:
        raise BodyTooLarge(too_large)
    if request.content_type not in JSON_TYPES:
        raise BadRequest(
            "Send the body as 'Content-Type: application/json'.", code="unsupported_content_type"
        )
    try:
        return await request.read()
    except web.HTTPRequestEntityTooLarge:
        raise BodyTooLarge(too_large) from None


def stream_options(body: dict[str, Any]) -> tuple[bool, bool]:
    """What usage the client wants (in the end, in every event); the body then asks the engine for all of it."""
    options = body.get("stream_options") or {}
    wants_usage = bool(options.get("include_usage"))
    wants_every = wants_usage and bool(options.get("continuous_usage_stats"))
    body["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    return wants_usage, wants_every
