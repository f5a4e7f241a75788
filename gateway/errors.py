"""The one table of errors that clients can see, and how each surface renders it.

Domain code raises these (or its own errors, which the edge translates to these); nothing here performs I/O. The wire
shapes come from contracts decision 5: OpenAI's envelope under /v1, `{"error": text}` elsewhere.
"""

from typing import Any, ClassVar, Literal

import orjson

Surface = Literal["openai", "customer", "plain"]


class ApiError(Exception):
    """Something went wrong inside poolgate; the cause is in its log under this request id."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str | None] = "internal_error"

    def __init__(
        self,
        message: str | None = None,
        *,
        param: str | None = None,
        retry_after_s: int | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        doc = type(self).__doc__ or ""
        self.message = message or " ".join(doc.split())
        self.param = param
        self.retry_after_s = retry_after_s
        self.wire_code = code if code is not None else type(self).code
        self.headers = headers or {}
        super().__init__(self.message)


class BadRequest(ApiError):
    """The request is not valid."""

    status, type = 400, "invalid_request_error"
    code: ClassVar[str | None] = None


class ContextLengthExceeded(BadRequest):
    """The prompt and the token limit together are longer than the model's context."""

    code = "context_length_exceeded"


class InvalidApiKey(ApiError):
    """Incorrect API key provided. Send it as 'Authorization: Bearer KEY'; `poolgate key create` makes one."""

    status, type, code = 401, "invalid_request_error", "invalid_api_key"


class InsufficientQuota(ApiError):
    """The account's balance is used up. Add funds to go on."""

    status, type = 402, "insufficient_quota"
    code: ClassVar[str | None] = "insufficient_quota"


class BudgetExceeded(InsufficientQuota):
    """A budget of this key or its account is used up. It opens again with its next period, or when it is raised."""


class Forbidden(ApiError):
    """This key may not do that."""

    status, type, code = 403, "invalid_request_error", "permission_denied"


class NotFound(ApiError):
    """There is nothing at this path."""

    status, type, code = 404, "invalid_request_error", "not_found"


class ModelNotFound(NotFound):
    """The model does not exist or this key may not use it. GET /v1/models lists those it may."""

    code = "model_not_found"


class MethodNotAllowed(ApiError):
    """This path does not take that method."""

    status, type, code = 405, "invalid_request_error", "method_not_allowed"


class RequestTimeout(ApiError):
    """The request body took too long to arrive."""

    status, type, code = 408, "invalid_request_error", "request_timeout"


class Conflict(ApiError):
    """The request does not fit the state that things are in."""

    status, type = 409, "invalid_request_error"
    code: ClassVar[str | None] = "conflict"


class IdempotencyKeyInUse(Conflict):
    """The first request with this Idempotency-Key is still running. Try again shortly."""

    code = "idempotency_key_in_use"


class IdempotencyKeyReused(Conflict):
    """This Idempotency-Key was used for another request. Use a new one for each request."""

    code = "idempotency_key_reused"


class IdempotencyAnswerLost(Conflict):
    """The first request with this Idempotency-Key has ended, but its answer was not kept. Ask with a new key if you must."""

    code = "idempotency_answer_lost"


class BodyTooLarge(ApiError):
    """The request body is too large."""

    status, type, code = 413, "invalid_request_error", "request_too_large"


class HeadersTooLarge(ApiError):
    """The request's headers are too large."""

    status, type, code = 431, "invalid_request_error", "headers_too_large"


class RateLimited(ApiError):
    """Too many requests."""

    status, type, code = 429, "rate_limit_error", "rate_limit_exceeded"


class EngineFailed(ApiError):
    """The model server failed while it worked on this request. Nothing was charged beyond what you received."""

    status, type, code = 502, "server_error", "engine_failed"


class NoNodeAvailable(ApiError):
    """No node can serve this model right now. Try again shortly."""

    status, type, code = 503, "server_error", "no_node_available"


class EveryEngineFull(NoNodeAvailable):
    """Every node that serves this model is busy. Try again shortly."""


class Unavailable(ApiError):
    """A part of the service that this request needs is away. Try again shortly."""

    status, type, code = 503, "server_error", "service_unavailable"


class BillingUnavailable(Unavailable):
    """What this account may spend can't be known right now. Nothing was charged. Try again shortly."""

    code = "billing_unavailable"


class EngineTimeout(ApiError):
    """The model server did not answer in time."""

    status, type, code = 504, "server_error", "engine_timeout"


def openai_error(error: ApiError) -> dict[str, Any]:
    """OpenAI's envelope; the official SDKs pick their exception class by the HTTP status."""
    body = {"message": error.message, "type": error.type, "param": error.param, "code": error.wire_code}
    return {"error": body}


def render(error: ApiError, surface: Surface, request_id: str) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and JSON body of `error` on `surface`."""
    headers = {"x-request-id": request_id, **error.headers}
    if error.retry_after_s is not None:
        headers["retry-after"] = str(error.retry_after_s)
    body: dict[str, Any]
    if surface == "openai":
        body = openai_error(error)
    elif surface == "customer":
        details = {"param": error.param} if error.param else {}
        code = error.wire_code or error.type
        body = {
            "error": {"code": code, "message": error.message, "request_id": request_id, "details": details}
        }
    else:
        body = {"error": error.message, "request_id": request_id}
    return error.status, headers, orjson.dumps(body)


def error_event(error: ApiError) -> bytes:
    """One SSE event for a failure after the status was sent. No `[DONE]` follows: the answer is not whole."""
    return b"data: " + orjson.dumps(openai_error(error)) + b"\n\n"
