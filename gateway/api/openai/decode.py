"""Request bodies under /v1 to checked dicts: one pass reads, validates and drops what is not declared.

What comes out is what is edited and sent on, so a body can't mean one thing here and another to an engine.
The fields are in `schemas_requests` and `schemas_responses`; here are the rules that span several of them.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

from pydantic import TypeAdapter, ValidationError

from gateway.api.openai.explain import explain
from gateway.api.openai.plain import plain_chat
from gateway.api.openai.schemas_requests import (
    ChatRequest,
    CompleteRequest,
    CompletionRequest,
    EmbeddingsRequest,
)
from gateway.api.openai.schemas_responses import ResponsesRequest
from gateway.errors import BadRequest

Body: TypeAlias = dict[str, Any]

SEQUENCES_MAX = 2048
"""Completions that one request may ask for, prompts times n: each is a sequence in the engine's scheduler."""

COMPLETE_TOKENS_DEFAULT = 512
COMPLETE_TOKENS_MAX = 4096
COMPLETE_TEMPERATURE = 0.7

TOP_P_LEAST = 1e-6
"""What 0 is sent as: OpenAI takes 0 and means the likeliest token, vLLM takes only what is above 0."""

Validate: TypeAlias = Callable[[bytes], Body]

# The adapter's own method of this name looks at options that we don't use, which takes a sixth of the whole.
_CHAT: Validate = TypeAdapter(ChatRequest).validator.validate_json
_COMPLETION: Validate = TypeAdapter(CompletionRequest).validator.validate_json
_EMBEDDINGS: Validate = TypeAdapter(EmbeddingsRequest).validator.validate_json
_RESPONSES: Validate = TypeAdapter(ResponsesRequest).validator.validate_json
_COMPLETE: Validate = TypeAdapter(CompleteRequest).validator.validate_json


def decode_chat(body: bytes) -> Body:
    """A chat request with its token limit, if any, under `max_tokens`; nulls dropped.

    `provider_id` is the gateway's own: pop it before sending. Raises BadRequest in OpenAI's words, as all of
    these functions do.
    """
    request = plain_chat(body) or _decode(_CHAT, body)
    limit = request.pop("max_completion_tokens", None)
    if limit is not None:
        request["max_tokens"] = limit
    _check_stream(request)
    if request.get("top_logprobs") and not request.get("logprobs"):
        raise BadRequest(
            "The 'top_logprobs' parameter is only allowed when 'logprobs' is enabled.", param="top_logprobs"
        )
    if "tools" not in request and request.get("tool_choice", "none") != "none":
        raise BadRequest("'tool_choice' is only allowed when 'tools' are specified.", param="tool_choice")
    if request.get("add_generation_prompt") and request.get("continue_final_message"):
        raise BadRequest(
            "'continue_final_message' and 'add_generation_prompt' exclude each other.",
            param="continue_final_message",
        )
    return request


def decode_completion(body: bytes) -> Body:
    """A completion request; nulls dropped, `provider_id` is to be popped."""
    request = _decode(_COMPLETION, body)
    _check_stream(request)
    if request.get("max_tokens") == 0 and not request.get("echo"):
        raise BadRequest(
            "Invalid 'max_tokens': integer below minimum value. Expected a value >= 1, but got 0 instead.",
            param="max_tokens",
            code="integer_below_min_value",
        )
    sequences = prompt_count(request) * request.get("n", 1)
    if sequences > SEQUENCES_MAX:
        raise BadRequest(
            f"Too many completions: {sequences} prompts times 'n', of {SEQUENCES_MAX}.", param="n"
        )
    return request


def decode_embeddings(body: bytes) -> Body:
    """An embeddings request; nulls dropped, `provider_id` is to be popped."""
    return _decode(_EMBEDDINGS, body)


def decode_responses(body: bytes) -> Body:
    """A responses request; nulls dropped, `provider_id` is to be popped; `store` is false, nothing is."""
    request = _decode(_RESPONSES, body)
    if not request.get("tools") and request.get("tool_choice", "auto") not in ("auto", "none"):
        raise BadRequest("'tool_choice' is only allowed when 'tools' are specified.", param="tool_choice")
    request["store"] = False
    return request


def decode_complete(body: bytes, *, tokens_max: int = COMPLETE_TOKENS_MAX) -> Body:
    """A /v1/complete request; nulls dropped. `complete_to_chat` makes the chat of it."""
    request = _decode(_COMPLETE, body)
    tokens = request.get("max_tokens", 1)
    if tokens > tokens_max:
        raise BadRequest(
            "Invalid 'max_tokens': integer above maximum value. "
            f"Expected a value <= {tokens_max}, but got {tokens} instead.",
            param="max_tokens",
            code="integer_above_max_value",
        )
    return request


def complete_to_chat(request: Body, *, tokens_default: int = COMPLETE_TOKENS_DEFAULT) -> Body:
    """The chat that a decoded /v1/complete request stands for: its prompt as one user message."""
    chat: Body = {
        "model": request["model"],
        "messages": [{"role": "user", "content": request["prompt"]}],
        "max_tokens": request.get("max_tokens", tokens_default),
        "temperature": request.get("temperature", COMPLETE_TEMPERATURE),
        "top_p": request.get("top_p", 1.0),
    }
    for name in ("stop", "provider_id"):
        if name in request:
            chat[name] = request[name]
    return chat


def prompt_count(request: Body) -> int:
    """How many prompts a decoded completion request has: a list of token ids is one prompt."""
    prompt = request["prompt"]
    return len(prompt) if isinstance(prompt, list) and not isinstance(prompt[0], int) else 1


def _decode(validate: Validate, body: bytes) -> Body:
    try:
        request = validate(body)
    except ValidationError as error:
        raise explain(error, body) from None
    if None in request.values():
        request = {name: value for name, value in request.items() if value is not None}
    if request.get("top_p") == 0:
        request["top_p"] = TOP_P_LEAST
    return request


def _check_stream(request: Body) -> None:
    if "stream_options" in request and not request.get("stream"):
        raise BadRequest(
            "The 'stream_options' parameter is only allowed when 'stream' is enabled.", param="stream_options"
        )
