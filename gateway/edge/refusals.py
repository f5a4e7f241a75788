"""The edge of the HTTP server: a request id for every request, and every failure in its surface's own shape."""

import logging
from collections.abc import Awaitable, Callable
from http import HTTPStatus

from aiohttp import web
from aiohttp.http_exceptions import LineTooLong

from config.metrics import Metrics
from gateway.api.routes import surface_of
from gateway.api.services import CORS, HEALTH, METRICS, REFUSED_KEYS, REQUEST_ID
from gateway.edge.cors import PREFLIGHT, VISIBLE
from gateway.errors import (
    ApiError,
    BadRequest,
    BodyTooLarge,
    HeadersTooLarge,
    InvalidApiKey,
    MethodNotAllowed,
    NotFound,
    RateLimited,
    Surface,
    render,
)
from gateway.relay.downstream import Relayed
from gateway.turn import new_request_id

log = logging.getLogger("poolgate.edge")

OF_STATUS: dict[int, type[ApiError]] = {
    404: NotFound,
    405: MethodNotAllowed,
    413: BodyTooLarge,
    429: RateLimited,
    431: HeadersTooLarge,
}

SERVER = "poolgate"
"""Instead of aiohttp's, which tells its version and Python's."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@web.middleware
async def edge(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Name the request; turn whatever it raises into an answer; say what every answer says."""
    app = request.app
    request_id = request[REQUEST_ID] = new_request_id()
    origin = request.headers.get("Origin")
    try:
        if (
            request.method == "OPTIONS"
            and "Access-Control-Request-Method" in request.headers
            and app[CORS].allows(origin)
        ):
            response: web.StreamResponse = _preflight(request)
        else:
            response = await handler(request)
    except ApiError as error:
        if isinstance(error, InvalidApiKey):
            app[REFUSED_KEYS].add(request.transport, ",".join(request.headers.getall("X-Forwarded-For", ())))
        response = refuse(error, surface_of(request.path), request_id, app[METRICS])
    except web.HTTPException as error:
        response = error if error.status < 400 else refuse(
            _of_http(error), surface_of(request.path), request_id, app[METRICS]
        )  # fmt: skip
    except Exception:
        log.exception(
            "a request failed inside poolgate",
            extra={"action": "request_crashed", "request_id": request_id, "path": _route_of(request)},
        )
        response = refuse(ApiError(), surface_of(request.path), request_id, app[METRICS])
    if not isinstance(response, Relayed) and not response.prepared:
        response.headers["x-request-id"] = request_id
        response.headers["server"] = SERVER
        response.headers.update(app[CORS].fields(origin))
        if app[HEALTH].is_draining:
            response.force_close()
    if isinstance(response, web.HTTPException):  # aiohttp wants it raised
        raise response
    return response


def _route_of(request: web.Request) -> str:
    """The path as it is declared: in a request's own path a key may stand."""
    resource = request.match_info.route.resource
    return "" if resource is None else resource.canonical


def _preflight(request: web.Request) -> web.Response:
    """A browser asks whether its page may send a request of this kind."""
    asked = request.headers.get("Access-Control-Request-Headers", "")
    headers = PREFLIGHT | ({"access-control-allow-headers": asked} if VISIBLE.fullmatch(asked) else {})
    return web.Response(status=204, headers=headers)


def refuse(error: ApiError, surface: Surface, request_id: str, metrics: Metrics) -> web.Response:
    """The answer that says `error`."""
    status, headers, body = refusal(error, surface, request_id, metrics)
    return web.Response(body=body, status=status, headers=headers)


def refusal(
    error: ApiError, surface: Surface, request_id: str, metrics: Metrics
) -> tuple[int, dict[str, str], bytes]:
    """Its status, headers and body; it is counted."""
    metrics.refusals.labels(error.wire_code or error.type).inc()
    status, headers, body = render(error, surface, request_id)
    return status, {**headers, "content-type": "application/json", "server": SERVER}, body


def bad_request_handler(metrics: Metrics) -> Callable[[int, BaseException | None, str | None], web.Response]:
    """Answers what never became a request: no path is known, so the shape is OpenAI's, which most clients here read."""

    def handle(status: int, exc: BaseException | None, _message: str | None) -> web.Response:
        if isinstance(exc, LineTooLong) or "Too many" in str(exc):
            error: ApiError = HeadersTooLarge()
        elif isinstance(exc, web.HTTPException):
            error = _of_http(exc)
        elif status < 500 or isinstance(exc, UnicodeEncodeError):
            # aiohttp repeats an unknown `Expect` to its sender, and can't if it has bytes that are no UTF-8.
            error = BadRequest("The request is not valid HTTP.")
        else:
            log.error("a request escaped every handler", exc_info=exc, extra={"action": "request_crashed"})
            error = ApiError()
        return refuse(error, "openai", new_request_id(), metrics)

    return handle


def _of_http(error: web.HTTPException) -> ApiError:
    """aiohttp's own refusals: unknown paths and methods, bodies above the bound."""
    kind = OF_STATUS.get(error.status)
    if kind is not None:
        allow = error.headers.get("Allow")
        return kind(headers={"allow": allow} if allow else None)
    if error.status >= 500:
        return ApiError()
    return BadRequest(HTTPStatus(error.status).phrase)
