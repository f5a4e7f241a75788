"""What request bodies under /v1 may say, and how a wrong one is refused."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.api.openai.decode import (
    TOP_P_LEAST,
    complete_to_chat,
    decode_chat,
    decode_complete,
    decode_completion,
    decode_embeddings,
    decode_responses,
    prompt_count,
)
from gateway.api.openai.explain import NAME_SHOWN_MAX, PARAM_SHOWN_MAX
from gateway.api.openai.schemas_parts import MESSAGES_MAX, STOPS_MAX
from gateway.api.openai.schemas_requests import (
    ChatRequest,
    CompleteRequest,
    CompletionRequest,
    EmbeddingsRequest,
)
from gateway.api.openai.schemas_responses import ResponsesRequest
from gateway.errors import BadRequest

CAPTURES = Path(__file__).parents[1] / "captures"
CONTRACTS = Path(__file__).parents[1] / "contracts"
MESSAGES = [{"role": "user", "content": "hi"}]

Decode = Callable[[bytes], dict[str, Any]]
DECODERS: dict[str, Decode] = {
    "/v1/chat/completions": decode_chat,
    "/v1/completions": decode_completion,
    "/v1/embeddings": decode_embeddings,
    "/v1/responses": decode_responses,
    "/v1/complete": decode_complete,
}
LEAST: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": "m", "messages": MESSAGES},
    "/v1/completions": {"model": "m", "prompt": "hi"},
    "/v1/embeddings": {"model": "m", "input": "hi"},
    "/v1/responses": {"model": "m", "input": "hi"},
    "/v1/complete": {"model": "m", "prompt": "hi"},
}
REQUESTS: dict[str, Any] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/embeddings": EmbeddingsRequest,
    "/v1/responses": ResponsesRequest,
    "/v1/complete": CompleteRequest,
}

# Documented by OpenAI, of no use to an engine and without effect on the answer's content: dropped.
DROPPED = {
    "/v1/chat/completions": {
        "metadata", "prediction", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention",
        "safety_identifier", "service_tier", "store", "user", "verbosity",
    },
    "/v1/completions": {"user"},
    "/v1/embeddings": {"user"},
    "/v1/responses": {
        "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "safety_identifier",
        "service_tier", "store", "stream_options", "user",
    },
}  # fmt: skip

# The gateway's to set, or a way to reach into the engine.
OURS = (
    "priority", "cache_salt", "kv_transfer_params", "ec_transfer_params", "request_id", "session_id", "chat_template",
    "chat_template_kwargs", "mm_processor_kwargs", "media_io_kwargs", "vllm_xargs", "documents", "logits_processors",
)  # fmt: skip


def chat(**fields: Any) -> bytes:
    return orjson.dumps({"model": "m", "messages": MESSAGES, **fields}, option=orjson.OPT_NON_STR_KEYS)


def say(content: Any, role: str = "user") -> bytes:
    return chat(messages=[{"role": role, "content": content}])


def of(path: str, **fields: Any) -> bytes:
    return json.dumps({**LEAST[path], **fields}).encode()


def refusal(decode: Decode, body: bytes) -> BadRequest:
    with pytest.raises(BadRequest) as caught:
        decode(body)
    return caught.value


def request_of(capture: Path) -> tuple[str, bytes]:
    """Path and body of a captured request."""
    head, _, body = capture.read_bytes().partition(b"\r\n\r\n")
    return head.split(b" ", 2)[1].decode(), body


def accepted_captures() -> Iterator[Path]:
    """Requests that clients may send and that the engine took, except one without a model."""
    for capture in CAPTURES.glob("*.req"):
        answer = capture.with_suffix(".resp")
        is_accepted = answer.exists() and answer.read_bytes().startswith(b"HTTP/1.1 200")
        if is_accepted and request_of(capture)[0] in DECODERS and capture.stem != "err_no_model":
            yield capture


# --- what passes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", DECODERS)
def test_the_least_request_passes_unchanged(path: str) -> None:
    decoded = DECODERS[path](of(path))
    assert decoded == LEAST[path] | ({"store": False} if path == "/v1/responses" else {})


@pytest.mark.parametrize("path", DECODERS)
def test_unknown_fields_are_dropped(path: str) -> None:
    assert "frobnicate" not in DECODERS[path](of(path, frobnicate={"a": 1}))


@pytest.mark.parametrize("path", DECODERS)
@pytest.mark.parametrize("name", OURS)
def test_fields_that_only_the_gateway_sets_are_dropped(path: str, name: str) -> None:
    assert name not in DECODERS[path](of(path, **{name: "x"}))


@pytest.mark.parametrize("path", DECODERS)
def test_null_is_a_fields_default_and_is_not_sent(path: str) -> None:
    optional = [name for name in REQUESTS[path].__annotations__ if name not in LEAST[path]]
    decoded = DECODERS[path](of(path, **dict.fromkeys(optional)))
    assert decoded.keys() - {"store"} == LEAST[path].keys()


@pytest.mark.parametrize("path", DROPPED)
def test_every_field_that_openai_documents_is_taken_refused_or_dropped_on_purpose(path: str) -> None:
    documented = set(orjson.loads((CONTRACTS / "openai_fields.json").read_bytes())[path]["request"])
    declared = set(REQUESTS[path].__annotations__)
    assert documented - declared == DROPPED[path]


@pytest.mark.parametrize("path", DROPPED)
def test_openais_required_fields_are_required(path: str) -> None:
    required = orjson.loads((CONTRACTS / "openai_fields.json").read_bytes())[path]["request_required"]
    assert set(required) <= REQUESTS[path].__required_keys__


@pytest.mark.parametrize("capture", sorted(accepted_captures()), ids=lambda path: path.stem)
def test_what_a_real_engine_accepted_is_accepted_and_loses_only_known_fields(capture: Path) -> None:
    path, body = request_of(capture)
    sent = orjson.loads(body)
    decoded = DECODERS[path](body)
    limit = sent.pop("max_completion_tokens", None)
    expected = {**sent, **({"max_tokens": limit} if limit is not None else {})}
    for name in ("priority", "cache_salt", "metadata", "user", "frobnicate", "request_id"):
        expected.pop(name, None)
    decoded.pop("store", None)
    assert decoded == expected


def test_the_engines_default_model_is_not_offered() -> None:
    assert refusal(decode_chat, orjson.dumps({"messages": MESSAGES})).param == "model"


def test_a_whole_conversation_with_tools_passes_unchanged() -> None:
    request = {
        "model": "m",
        "messages": [
            {"role": "developer", "content": [{"type": "text", "text": "Be brief."}], "name": "ops"},
            {"role": "user", "content": [
                {"type": "text", "text": "What is this?"},
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA", "detail": "low"}},
                {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
            ]},
            {"role": "assistant", "content": None, "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "look", "arguments": "not json"}}
            ]},
            {"role": "tool", "tool_call_id": "c1", "content": "a cat"},
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
        ],
        "tools": [{"type": "function", "function": {"name": "look", "parameters": {
            "type": "object", "properties": {"x": {"enum": [1, 1.5, None, True, "a"]}},
        }, "strict": True}}],
        "tool_choice": {"type": "function", "function": {"name": "look"}},
        "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "object"}}},
    }  # fmt: skip
    assert decode_chat(orjson.dumps(request)) == request


def test_unknown_fields_inside_messages_are_dropped_too() -> None:
    # A part without a type, or with two meanings, is read differently by engines.
    part = {"type": "text", "text": "hi", "image_url": "http://internal/"}
    decoded = decode_chat(say([part]))
    assert decoded["messages"][0]["content"] == [{"type": "text", "text": "hi"}]


def test_of_duplicate_keys_the_one_that_was_checked_is_sent() -> None:
    body = b'{"model":"m","messages":[{"role":"user","content":"hi"}],"n":1,"n":2,"temperature":9,"temperature":1}'
    decoded = decode_chat(body)
    assert (decoded["n"], decoded["temperature"]) == (2, 1.0)


def test_max_completion_tokens_wins_and_one_limit_is_sent() -> None:
    decoded = decode_chat(chat(max_tokens=5, max_completion_tokens=7))
    assert decoded["max_tokens"] == 7
    assert "max_completion_tokens" not in decoded


def test_a_null_max_completion_tokens_leaves_the_older_limit() -> None:
    assert decode_chat(chat(max_tokens=5, max_completion_tokens=None))["max_tokens"] == 5


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/complete"])
def test_top_p_zero_is_sent_as_the_least_that_engines_take(path: str) -> None:
    assert DECODERS[path](of(path, top_p=0))["top_p"] == TOP_P_LEAST


@pytest.mark.parametrize("path", DECODERS)
def test_a_pinned_provider_comes_out_as_a_number(path: str) -> None:
    assert DECODERS[path](of(path, provider_id=7))["provider_id"] == 7
    assert "provider_id" not in DECODERS[path](of(path, provider_id=None))


@pytest.mark.parametrize(("prompt", "count"), [("x", 1), (["x", "y"], 2), ([1, 2, 3], 1), ([[1, 2], [3]], 2)])
def test_prompts_are_counted(prompt: Any, count: int) -> None:
    assert prompt_count(decode_completion(of("/v1/completions", prompt=prompt))) == count


def test_a_prompt_may_be_scored_without_generating() -> None:
    assert decode_completion(of("/v1/completions", max_tokens=0, echo=True))["max_tokens"] == 0
    assert refusal(decode_completion, of("/v1/completions", max_tokens=0)).param == "max_tokens"


@pytest.mark.parametrize(
    "harmless",
    [{"modalities": ["text"]}, {"use_beam_search": False}, {"best_of": 1}, {"function_call": "auto"}],
)
def test_a_field_that_asks_for_what_happens_anyway_is_dropped(harmless: dict[str, Any]) -> None:
    assert decode_chat(chat(**harmless)) == {"model": "m", "messages": MESSAGES}


def test_responses_are_never_stored() -> None:
    assert decode_responses(of("/v1/responses", store=True, background=False))["store"] is False


def test_a_responses_conversation_passes_unchanged() -> None:
    items = [
        {"role": "user", "content": "hi"},
        {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "t"}]},
        {"type": "message", "role": "assistant", "id": "msg_1", "status": "completed", "content": [
            {"type": "output_text", "text": "hello", "annotations": []}
        ]},
        {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "1"},
        {"type": "message", "role": "user", "content": [
            {"type": "input_text", "text": "and?"},
            {"type": "input_image", "image_url": "data:image/png;base64,AAAA", "detail": "auto"},
        ]},
    ]  # fmt: skip
    assert decode_responses(of("/v1/responses", input=items))["input"] == items


def test_complete_becomes_one_user_message_with_the_contracts_defaults() -> None:
    chat_request = complete_to_chat(decode_complete(of("/v1/complete")))
    assert chat_request == {
        "model": "m", "messages": MESSAGES, "max_tokens": 512, "temperature": 0.7, "top_p": 1.0,
    }  # fmt: skip


def test_complete_keeps_what_was_asked() -> None:
    asked = {"max_tokens": 4096, "temperature": 0, "top_p": 0.5, "stop": ["\n"], "provider_id": 3}
    chat_request = complete_to_chat(decode_complete(of("/v1/complete", **asked)))
    assert chat_request.items() >= asked.items()


def test_the_ceiling_of_complete_can_be_lowered() -> None:
    body = of("/v1/complete", max_tokens=100)
    error = refusal(lambda raw: decode_complete(raw, tokens_max=64), body)
    assert (error.param, error.wire_code) == ("max_tokens", "integer_above_max_value")


# --- what is refused, and how -----------------------------------------------------------------------------------

IMAGE = {"type": "image_url", "image_url": {"url": "http://169.254.169.254/latest"}}
CHAT_REFUSALS: list[tuple[dict[str, Any], str, str | None]] = [
    ({"temperature": "hot"}, "temperature", "invalid_type"),
    ({"temperature": True}, "temperature", "invalid_type"),
    ({"temperature": 2.1}, "temperature", "decimal_above_max_value"),
    ({"temperature": -1}, "temperature", "decimal_below_min_value"),
    ({"top_p": 1.5}, "top_p", "decimal_above_max_value"),
    ({"n": 0}, "n", "integer_below_min_value"),
    ({"n": 129}, "n", "integer_above_max_value"),
    ({"n": 1.0}, "n", "invalid_type"),
    ({"n": True}, "n", "invalid_type"),
    ({"max_tokens": 0}, "max_tokens", "integer_below_min_value"),
    ({"max_tokens": -1}, "max_tokens", "integer_below_min_value"),
    ({"max_completion_tokens": "9"}, "max_completion_tokens", "invalid_type"),
    ({"presence_penalty": 3}, "presence_penalty", "decimal_above_max_value"),
    ({"seed": 2**63 - 1 + 1}, "seed", "integer_above_max_value"),
    ({"stop": 5}, "stop", "invalid_type"),
    ({"stop": ["a", 5]}, "stop[1]", "invalid_type"),
    ({"stop": ["a"] * (STOPS_MAX + 1)}, "stop", "array_above_max_length"),
    ({"stream": "yes"}, "stream", "invalid_type"),
    ({"stream": 1}, "stream", "invalid_type"),
    ({"stream_options": {"include_usage": True}}, "stream_options", None),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage", "invalid_type"),
    ({"top_logprobs": 3}, "top_logprobs", None),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "integer_above_max_value"),
    ({"logit_bias": {"x": 1}}, "logit_bias.x", "invalid_value"),
    ({"logit_bias": {"5": 101}}, "logit_bias.5", "decimal_above_max_value"),
    ({"tools": []}, "tools", "empty_array"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type", "invalid_value"),
    ({"tools": [{"type": "function"}]}, "tools[0].function", "missing_required_parameter"),
    ({"tool_choice": "auto"}, "tool_choice", None),
    ({"tool_choice": "x"}, "tool_choice", "invalid_value"),
    ({"response_format": {"type": "xml"}}, "response_format.type", "invalid_value"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "missing_required_parameter"),
    ({"response_format": "json"}, "response_format", "invalid_type"),
    ({"reasoning_effort": "huge"}, "reasoning_effort", "invalid_value"),
    ({"add_generation_prompt": True, "continue_final_message": True}, "continue_final_message", None),
    ({"provider_id": "7"}, "provider_id", "invalid_type"),
    ({"model": ""}, "model", "empty_string"),
    ({"model": None}, "model", "invalid_type"),
    ({"model": "m" * 300}, "model", "string_above_max_length"),
    ({"messages": []}, "messages", "empty_array"),
    ({"messages": "hi"}, "messages", "invalid_type"),
    ({"messages": [5]}, "messages[0]", "invalid_type"),
    ({"messages": [{"content": "hi"}]}, "messages[0].role", "missing_required_parameter"),
    ({"messages": [{"role": "robot", "content": "hi"}]}, "messages[0].role", "invalid_value"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "invalid_type"),
    ({"messages": [{"role": "user", "content": ["hi"]}]}, "messages[0].content[0]", "invalid_type"),
    ({"messages": [{"role": "user", "content": [{"type": "file"}]}]}, "messages[0].content[0].type", "invalid_value"),
    ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages[0].content[0].image_url.url", "invalid_value"),
    ({"messages": [{"role": "system", "content": [IMAGE]}]}, "messages[0].content[0].type", "invalid_value"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id", "missing_required_parameter"),
    ({"messages": MESSAGES * (MESSAGES_MAX + 1)}, "messages", "array_above_max_length"),
    ({"audio": {"voice": "alloy"}}, "audio", "unsupported_parameter"),
    ({"modalities": ["text", "audio"]}, "modalities", "unsupported_parameter"),
    ({"functions": [{"name": "f"}]}, "functions", "unsupported_parameter"),
    ({"web_search_options": {}}, "web_search_options", "unsupported_parameter"),
    ({"guided_json": {}}, "guided_json", "unsupported_parameter"),
    ({"use_beam_search": True}, "use_beam_search", "unsupported_parameter"),
    ({"best_of": True}, "best_of", "unsupported_parameter"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param", "code"), CHAT_REFUSALS)
def test_a_wrong_chat_is_refused_in_openais_terms(
    fields: dict[str, Any], param: str, code: str | None
) -> None:
    error = refusal(decode_chat, chat(**fields))
    assert (error.status, error.param, error.wire_code) == (400, param, code)
    assert "pydantic" not in error.message
    assert len(error.message) < 500


OTHER_REFUSALS: list[tuple[str, dict[str, Any], str]] = [
    ("/v1/completions", {"prompt": 5}, "prompt"),
    ("/v1/completions", {"prompt": []}, "prompt"),
    ("/v1/completions", {"prompt": ["a", 1]}, "prompt[1]"),
    ("/v1/completions", {"prompt": [-1]}, "prompt[0]"),
    ("/v1/completions", {"prompt": ["a"] * 1000, "n": 100}, "n"),
    ("/v1/completions", {"suffix": "x"}, "suffix"),
    ("/v1/completions", {"best_of": 4}, "best_of"),
    ("/v1/completions", {"logprobs": True}, "logprobs"),
    ("/v1/embeddings", {"input": {}}, "input"),
    ("/v1/embeddings", {"input": ["a"] * 2049}, "input"),
    ("/v1/embeddings", {"encoding_format": "int8"}, "encoding_format"),
    ("/v1/responses", {"background": True}, "background"),
    ("/v1/responses", {"previous_response_id": "resp_1"}, "previous_response_id"),
    ("/v1/responses", {"conversation": "conv_1"}, "conversation"),
    ("/v1/responses", {"prompt": {"id": "p"}}, "prompt"),
    ("/v1/responses", {"tools": [{"type": "mcp", "server_url": "http://internal"}]}, "tools[0].type"),
    ("/v1/responses", {"tool_choice": "required"}, "tool_choice"),
    ("/v1/responses", {"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
    ("/v1/responses", {"input": [5]}, "input[0]"),
    ("/v1/responses", {"input": [{"role": "user", "content": [
        {"type": "input_image", "image_url": "http://internal"}]}]}, "input[0].content[0].image_url"),
    ("/v1/responses", {"input": [{"type": "function_call_output", "call_id": "c", "output": [
        {"type": "input_image", "image_url": "file:///etc/passwd"}]}]}, "input[0].output[0].image_url"),
    ("/v1/complete", {"prompt": ["x"]}, "prompt"),
    ("/v1/complete", {"max_tokens": 5000}, "max_tokens"),
    ("/v1/complete", {"stop": "x"}, "stop"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "fields", "param"), OTHER_REFUSALS)
def test_other_wrong_requests_are_refused_by_name(path: str, fields: dict[str, Any], param: str) -> None:
    assert refusal(DECODERS[path], of(path, **fields)).param == param


def test_the_message_names_what_was_wanted_and_what_came() -> None:
    error = refusal(decode_chat, say(5))
    assert error.message == (
        "Invalid type for 'messages[0].content': expected one of a string or an array, but got an integer instead."
    )


def test_a_bound_is_told() -> None:
    error = refusal(decode_chat, chat(temperature=3))
    assert error.message == (
        "Invalid 'temperature': decimal above maximum value. Expected a value <= 2, but got 3 instead."
    )


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b'{"model":', b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000, b'{"model": "\\ud800"}', b"{} {}",
     b'{"model": "m", "seed": ' + b"9" * 10_000 + b"}", b"{'model': 'm'}", b"\xef\xbb\xbf{}"],
    ids=["nothing", "brace", "cut", "not-utf8", "deep-list", "deep-object", "surrogate", "two", "digits", "python", "bom"],
)  # fmt: skip
@pytest.mark.parametrize("path", DECODERS)
def test_what_is_no_json_is_refused_as_such(path: str, body: bytes) -> None:
    error = refusal(DECODERS[path], body)
    assert error.message.startswith("We could not parse the JSON body of your request")
    assert error.param is None


@pytest.mark.parametrize("body", [b"[]", b"5", b"null", b'"x"'])
def test_a_body_that_is_no_object_is_refused(body: bytes) -> None:
    assert "the request body" in refusal(decode_chat, body).message


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", str(2**64), "9" * 400])
@pytest.mark.parametrize(
    "place",
    [
        '"temperature": {}', '"tools": [{{"type":"function","function":{{"name":"f","parameters":{{"x":[{}]}}}}}}]',
        '"response_format": {{"type":"json_schema","json_schema":{{"name":"s","schema":{{"x":{}}}}}}}',
        '"structured_outputs": {{"json": {{"x": {}}}}}', '"logit_bias": {{"1": {}}}', '"n": {}',
    ],
)  # fmt: skip
def test_numbers_that_json_can_not_carry_on_are_refused(place: str, number: str) -> None:
    body = b'{"model":"m","messages":[{"role":"user","content":"x"}],' + place.format(number).encode() + b"}"
    assert refusal(decode_chat, body).status == 400


def test_huge_input_is_not_repeated_in_the_error() -> None:
    huge = "x" * 100_000
    wrong = [
        chat(temperature=huge), chat(logit_bias={huge: 1}), chat(reasoning_effort=huge), say([{"type": huge}]),
        chat(messages=[{"role": huge, "content": "x"}]), chat(n=-(2**62)),
    ]  # fmt: skip
    for body in wrong:
        error = refusal(decode_chat, body)
        assert len(error.message) < 600
        assert huge[: NAME_SHOWN_MAX + 1] not in error.message.replace("...", "")
        assert len(error.param or "") <= PARAM_SHOWN_MAX + len("...")


def test_a_long_list_of_wrong_items_makes_one_complaint() -> None:
    assert refusal(decode_chat, chat(messages=[5] * 2000)).param == "messages[0]"
    assert refusal(decode_chat, chat(logit_bias=dict.fromkeys(range(1000), "x"))).param == "logit_bias.0"


# --- anything at all --------------------------------------------------------------------------------------------

TEXTS = st.text(max_size=20)
SCALARS = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | TEXTS
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=8,
)
NAMES = sorted({name for shape in REQUESTS.values() for name in shape.__annotations__})
PARTS = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(["text", "image_url", "input_text"]) | VALUES,
        "text": VALUES,
        "image_url": VALUES,
    },
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool"]) | VALUES},
    optional={
        "content": TEXTS | st.lists(PARTS, max_size=2) | VALUES,
        "tool_calls": VALUES,
        "tool_call_id": VALUES,
    },
)
TOOL = st.fixed_dictionaries({"type": st.just("function")}, optional={
    "function": st.fixed_dictionaries({"name": TEXTS}, optional={"parameters": VALUES}), "name": VALUES,
    "parameters": VALUES,
})  # fmt: skip
FIELDS = st.dictionaries(
    st.sampled_from(NAMES), VALUES | st.lists(MESSAGE, max_size=2) | st.lists(TOOL, max_size=2), max_size=4
)


def check_any(decode: Decode, body: bytes) -> None:
    """Either a request that can be written again and then means the same, or a BadRequest."""
    error = None
    try:
        decoded = decode(body)
    except BadRequest as refused:
        error = refused
    if error is None:
        assert decode(orjson.dumps(decoded)) == decoded
    else:
        assert len(error.message) < 800
        assert orjson.dumps([error.message, error.param, error.wire_code])


@pytest.mark.parametrize("path", DECODERS)
@given(body=st.binary(max_size=200))
def test_any_bytes_are_decoded_or_refused(path: str, body: bytes) -> None:
    check_any(DECODERS[path], body)


@pytest.mark.parametrize("path", DECODERS)
@given(value=VALUES)
def test_any_json_is_decoded_or_refused(path: str, value: Any) -> None:
    check_any(DECODERS[path], json.dumps(value).encode())


@pytest.mark.parametrize("path", DECODERS)
@given(fields=FIELDS)
def test_any_fields_are_decoded_or_refused(path: str, fields: dict[str, Any]) -> None:
    check_any(DECODERS[path], of(path, **fields))


@pytest.mark.parametrize("path", DECODERS)
@given(name=st.sampled_from(NAMES), value=VALUES, cut=st.integers(0, 60))
def test_a_cut_request_is_refused_and_never_crashes(path: str, name: str, value: Any, cut: int) -> None:
    check_any(DECODERS[path], of(path, **{name: value})[:-cut])
