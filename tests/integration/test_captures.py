"""Every capture that a client can cause passes through the gateway with the listed edits and no others.

The edits: `cost_halala` in a whole answer and in a requested usage event, usage that was not asked for removed,
engine errors in OpenAI's types. What is expected is worked out here from parsed JSON, not by the gateway's code.
"""

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from tests import captures_of
from tests.captures_of import Exchange, data_of
from tests.gateways import MODEL, TestGateway, running_gateway

# Refused by the gateway itself, before any engine: status, code, param.
REFUSED: dict[str, tuple[int, str | None, str | None]] = {
    "err_bad_model": (404, "model_not_found", "model"),
    "err_bad_model_stream": (404, "model_not_found", "model"),
    "err_bad_temperature_neg": (400, "decimal_below_min_value", "temperature"),
    "err_bad_temperature_str": (400, "invalid_type", "temperature"),
    "err_empty_body": (400, None, None),
    "err_empty_messages": (400, "empty_array", "messages"),
    "err_image": (400, None, None),
    "err_logprobs_too_many": (400, "integer_above_max_value", "top_logprobs"),
    "err_malformed_json": (400, None, None),
    "err_max_tokens_neg": (400, "integer_below_min_value", "max_tokens"),
    "err_max_tokens_zero": (400, "integer_below_min_value", "max_tokens"),
    "err_missing_messages": (400, "missing_required_parameter", "messages"),
    "err_n_0": (400, "integer_below_min_value", "n"),
    "err_no_model": (400, "missing_required_parameter", "model"),
    "err_stream_options_nostream": (400, None, "stream_options"),
    "err_tools_auto_not_enabled": (400, None, None),
    "err_top_p": (400, "decimal_above_max_value", "top_p"),
    "err_wrong_content_type": (400, "unsupported_content_type", None),
    "temp_3": (400, "decimal_above_max_value", "temperature"),
    "embeddings_attempt": (404, "model_not_found", "model"),
    "lora__chat_unloaded": (404, "model_not_found", "model"),
    "full__err_tool_unknown_named": (400, None, None),
}

# Refused by the engine, rendered by us: status, code.
RENDERED: dict[str, tuple[int, str | None]] = {
    "err_bad_schema": (400, None),
    "err_max_tokens_too_large": (400, "context_length_exceeded"),
    "err_max_tokens_too_large_stream": (400, "context_length_exceeded"),
    "err_prompt_too_long": (400, "context_length_exceeded"),
    "err_prompt_too_long_stream": (400, "context_length_exceeded"),
    "full__overload_rejected_completion_stream": (503, "no_node_available"),
    "full__overload_rejected_nonstream": (503, "no_node_available"),
    "full__overload_rejected_stream": (503, "no_node_available"),
    "burst__burst_stream_05": (503, "no_node_available"),
    "burst__burst_stream_11": (503, "no_node_available"),
    "embed__chat_on_pooling": (404, "model_not_found"),
}

# Accepted by the gateway although this engine's request had no Content-Type: OpenAI takes such a body.
TAKEN = {"err_no_content_type"}

INFERENCE_PATHS = {"/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"}

# Paths of an engine that exist in the gateway too, as its own: never passed on.
OURS = {"/v1/models", "/v1/models/smollm2-135m", "/health", "/metrics"}


def is_inference(exchange: Exchange) -> bool:
    return exchange.method == "POST" and exchange.path in INFERENCE_PATHS


EXCHANGES = [captures_of.load(name) for name in captures_of.names()]
INFERENCE = [exchange for exchange in EXCHANGES if is_inference(exchange)]
PASSED = [exchange for exchange in INFERENCE if exchange.name not in REFUSED.keys() | RENDERED.keys() | TAKEN]
UNREACHABLE = [exchange for exchange in EXCHANGES if not is_inference(exchange) and exchange.path not in OURS]


def named(exchanges: list[Exchange]) -> list[Any]:
    return [pytest.param(exchange, id=exchange.name) for exchange in exchanges]


@pytest.fixture
async def gw(settings, pool) -> AsyncIterator[TestGateway]:
    async with running_gateway(replace(settings, dispatch_attempts_max=1), pool) as running:
        yield running


async def asked(gw: TestGateway, engine: Any, exchange: Exchange) -> tuple[int, bytes, Any]:
    """Send a capture's request through the gateway to an engine that answers with the capture's bytes."""
    try:
        model = json.loads(exchange.request_body).get("model", MODEL)
    except ValueError:
        model = MODEL
    if exchange.name not in REFUSED:
        kind = "pooling" if exchange.path == "/v1/embeddings" else "generate"
        await gw.register(engine.url, model=model, kind=kind)
    else:
        await gw.register(engine.url)
    await engine.knobs(replay=exchange.name)
    headers = {name: value for name, value in exchange.request_headers.items() if name == "content-type"}
    skip = [] if headers else ["Content-Type"]
    async with gw.http.post(
        gw.url + exchange.path,
        data=exchange.request_body,
        headers=headers | gw.headers,
        skip_auto_headers=skip,
    ) as reply:
        return reply.status, await reply.read(), reply.headers


@pytest.mark.parametrize("exchange", named(PASSED))
async def test_a_capture_passes_with_the_listed_edits_only(gw, engine, exchange: Exchange):
    assert exchange.status == 200, "an answer that is no 200 belongs in one of the tables"
    status, body, headers = await asked(gw, engine, exchange)
    assert status == 200, body
    assert headers["x-request-id"].startswith("req_")
    if exchange.is_stream:
        check_stream(exchange, body)
    else:
        check_whole(exchange, body)


def check_whole(exchange: Exchange, body: bytes) -> None:
    answer = json.loads(body)
    assert isinstance(answer.pop("cost_halala"), int)
    assert answer == json.loads(exchange.body)
    assert body.startswith(exchange.body[:-1]), (
        "everything before the added field is the engine's, byte for byte"
    )


def check_stream(exchange: Exchange, body: bytes) -> None:
    wanted = json.loads(exchange.request_body).get("stream_options") or {}
    wants_usage = wanted.get("include_usage", False)
    wants_every = wants_usage and wanted.get("continuous_usage_stats", False)
    events = [event for event in body.split(b"\n\n") if event]
    expected = [event for event in exchange.events if not is_usage_event(event) or wants_usage]
    assert len(events) == len(expected)
    for got, sent in zip(events, expected, strict=True):
        if is_usage_event(sent):
            answer = data_of(got)
            assert isinstance(answer.pop("cost_halala"), int)
            assert json.dumps(answer) == json.dumps(data_of(sent))
        elif has_usage(sent) and not wants_every:
            without = {key: value for key, value in data_of(sent).items() if key != "usage"}
            assert json.dumps(data_of(got)) == json.dumps(without)
        else:
            assert got == sent


def is_usage_event(event: bytes) -> bool:
    data = data_of(event)
    return data is not None and data.get("choices") == []


def has_usage(event: bytes) -> bool:
    data = data_of(event)
    return data is not None and "choices" in data and "usage" in data


@pytest.mark.parametrize("exchange", named([e for e in INFERENCE if e.name in REFUSED]))
async def test_what_openai_refuses_never_reaches_an_engine(gw, engine, exchange: Exchange):
    status, body, headers = await asked(gw, engine, exchange)
    expected_status, code, param = REFUSED[exchange.name]
    error = json.loads(body)["error"]
    assert (status, error["type"]) == (expected_status, "invalid_request_error"), error
    if code is not None:
        assert error["code"] == code
    if param is not None:
        assert error["param"] == param
    assert headers["x-request-id"].startswith("req_")
    assert (await engine.record())["requests"] == []
    assert "alias" not in error["message"]


@pytest.mark.parametrize("exchange", named([e for e in INFERENCE if e.name in RENDERED]))
async def test_an_engines_error_is_rendered_in_openais_types(gw, engine, exchange: Exchange):
    status, body, headers = await asked(gw, engine, exchange)
    expected_status, code = RENDERED[exchange.name]
    error = json.loads(body)["error"]
    assert (status, error["code"]) == (expected_status, code), error
    assert error["type"] == ("server_error" if status == 503 else "invalid_request_error")
    assert set(error) == {"message", "type", "param", "code"}
    assert ("Retry-After" in headers) == (status == 503)
    record = (await gw.settled(1))[0]
    assert (record.prompt_tokens, record.completion_tokens, record.amount_nano) == (0, 0, 0)


async def test_a_body_without_a_content_type_is_taken_as_json(gw, engine):
    await gw.register(engine.url)
    exchange = captures_of.load("err_no_content_type")
    async with gw.http.post(
        gw.url + exchange.path,
        data=exchange.request_body,
        headers=gw.headers,
        skip_auto_headers=["Content-Type"],
    ) as reply:
        assert reply.status == 200


@pytest.mark.parametrize("exchange", named(UNREACHABLE))
async def test_an_engines_other_paths_do_not_exist(gw, engine, exchange: Exchange):
    await gw.register(engine.url)
    async with gw.http.request(
        exchange.method, gw.url + exchange.path, data=exchange.request_body, headers=gw.headers
    ) as reply:
        body = await reply.json()
    assert reply.status in {404, 405}
    assert body["error"]
    assert (await engine.record())["requests"] == []


@pytest.mark.parametrize("path", sorted(OURS))
async def test_paths_that_an_engine_has_too_are_answered_by_the_gateway(gw, engine, path: str):
    await gw.register(engine.url)
    async with gw.http.get(gw.url + path, headers=gw.headers) as reply:
        body = await reply.text()
    assert reply.status == 200
    assert "uvicorn" not in reply.headers.get("server", "")
    assert "vllm:" not in body
    assert (await engine.record())["requests"] == []
