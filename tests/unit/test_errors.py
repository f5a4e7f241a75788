"""One table of errors in three shapes."""

import orjson
import pytest

from gateway.api.routes import surface_of
from gateway.errors import (
    ApiError,
    BadRequest,
    BodyTooLarge,
    InsufficientQuota,
    InvalidApiKey,
    ModelNotFound,
    NoNodeAvailable,
    RateLimited,
    error_event,
    render,
)


def every_error() -> list[type[ApiError]]:
    found, waiting = [], [ApiError]
    while waiting:
        kind = waiting.pop()
        found.append(kind)
        waiting += kind.__subclasses__()
    return found


@pytest.mark.parametrize(
    ("path", "surface"),
    [
        ("/v1", "openai"),
        ("/v1/", "openai"),
        ("/v1/chat/completions", "openai"),
        ("/v1x", "plain"),
        ("/v10/models", "plain"),
        ("/api/v1/customer", "customer"),
        ("/api/v1/customer/keys", "customer"),
        ("/api/v1/customers", "plain"),
        ("/api/v2", "customer"),
        ("/api/v2/x", "customer"),
        ("/api/v1/x", "plain"),
        ("/api/providers/heartbeat", "plain"),
        ("/", "plain"),
        ("", "plain"),
    ],
)
def test_a_path_decides_the_shape(path, surface):
    assert surface_of(path) == surface


@pytest.mark.parametrize("kind", every_error(), ids=lambda kind: kind.__name__)
def test_every_error_renders_on_every_surface(kind):
    error = kind(param="model")
    status, headers, body = render(error, "openai", "req_1")
    assert status == kind.status >= 400
    assert headers["x-request-id"] == "req_1"
    told = orjson.loads(body)["error"]
    assert told == {"message": error.message, "type": kind.type, "param": "model", "code": kind.code}
    assert orjson.loads(render(error, "plain", "req_1")[2]) == {"error": error.message, "request_id": "req_1"}
    customer = orjson.loads(render(error, "customer", "req_1")[2])["error"]
    assert customer == {
        "code": kind.code or kind.type,
        "message": error.message,
        "request_id": "req_1",
        "details": {"param": "model"},
    }


@pytest.mark.parametrize("kind", every_error(), ids=lambda kind: kind.__name__)
def test_every_error_has_a_sentence_for_people(kind):
    assert kind().message.endswith(".")
    assert "\n" not in kind().message
    assert "  " not in kind().message


@pytest.mark.parametrize(
    ("error", "status", "type_", "code"),
    [
        (InvalidApiKey(), 401, "invalid_request_error", "invalid_api_key"),
        (ModelNotFound(), 404, "invalid_request_error", "model_not_found"),
        (InsufficientQuota(), 402, "insufficient_quota", "insufficient_quota"),
        (RateLimited(), 429, "rate_limit_error", "rate_limit_exceeded"),
        (BadRequest(), 400, "invalid_request_error", None),
        (BodyTooLarge(), 413, "invalid_request_error", "request_too_large"),
        (NoNodeAvailable(), 503, "server_error", "no_node_available"),
        (ApiError(), 500, "server_error", "internal_error"),
    ],
)
def test_openais_types_and_codes(error, status, type_, code):
    rendered = render(error, "openai", "r")
    told = orjson.loads(rendered[2])["error"]
    assert (rendered[0], told["type"], told["code"]) == (status, type_, code)


def test_retry_after_and_allow_are_headers():
    _, headers, _ = render(NoNodeAvailable(retry_after_s=5, headers={"allow": "GET"}), "plain", "r")
    assert (headers["retry-after"], headers["allow"]) == ("5", "GET")


def test_an_error_without_a_param_has_no_details():
    assert orjson.loads(render(BadRequest(), "customer", "r")[2])["error"]["details"] == {}


def test_an_error_in_a_begun_stream_is_one_event_without_done():
    event = error_event(NoNodeAvailable())
    assert event.startswith(b"data: {")
    assert event.endswith(b"}\n\n")
    assert event.count(b"\n\n") == 1
    assert orjson.loads(event[6:])["error"]["code"] == "no_node_available"


def test_an_errors_words_and_code_can_be_given():
    error = BadRequest("No.", code="odd")
    assert (error.message, error.wire_code, str(error)) == ("No.", "odd", "No.")
