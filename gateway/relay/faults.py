"""What an engine's failure means: which error a client sees, whether another engine may try, whether a breaker moves.

Pure. Engines answer errors as `{"error": {message, type, param, code}}` with an int code, or FastAPI's `{"detail": ...}`;
clients get OpenAI's types and codes, and never a word about the engine's address, models or stack.
"""

from typing import Any

import orjson

from gateway.errors import (
    ApiError,
    BadRequest,
    ContextLengthExceeded,
    EngineFailed,
    EngineTimeout,
    ModelNotFound,
    NoNodeAvailable,
)

ENGINE_MESSAGE_MAX = 1000
"""Characters of an engine's own message that are passed on: enough for every one of vLLM's, too few for a dump."""

FULL_RETRY_AFTER_S = 1


class EngineFault(Exception):
    """An attempt on one engine failed. `may_retry`: another engine may do better; `is_broken`: the breaker counts it."""

    def __init__(
        self, error: ApiError, *, may_retry: bool, is_broken: bool, cause: str, is_certain: bool = False
    ) -> None:
        """`is_certain`: no request can have caused it (the engine could not even be reached)."""
        self.error = error
        self.is_certain = is_certain
        self.may_retry = may_retry
        self.is_broken = is_broken
        self.cause = cause
        super().__init__(cause)


def broken(cause: str) -> EngineFault:
    """The engine died, or its answer makes no sense."""
    return EngineFault(EngineFailed(), may_retry=True, is_broken=True, cause=cause)


def silent(cause: str) -> EngineFault:
    """The engine took longer than it may."""
    return EngineFault(EngineTimeout(), may_retry=True, is_broken=True, cause=cause)


def too_long() -> EngineFault:
    """A whole answer takes longer than it may: it would on any engine, and it says nothing against this one."""
    cause = "no whole answer within answer_timeout_s"
    return EngineFault(EngineTimeout(), may_retry=False, is_broken=False, cause=cause)


def too_large() -> EngineFault:
    """The engine's answer does not end within what is taken."""
    return broken("the engine's answer is larger than answer_bytes_max")


def unreachable(cause: str) -> EngineFault:
    """No connection to the engine: to the client there is no node."""
    error = NoNodeAvailable(retry_after_s=2)
    return EngineFault(error, may_retry=True, is_broken=True, cause=cause, is_certain=True)


def fault_of_answer(status: int, body: bytes) -> EngineFault:
    """The fault that an engine's HTTP error means."""
    try:
        decoded = orjson.loads(body)
    except orjson.JSONDecodeError:
        decoded = None
    error = decoded.get("error") if isinstance(decoded, dict) else None
    return fault_of_error(status, error if isinstance(error, dict) else {})


ANSWER_FIELDS = ("choices", "data", "output")
"""One of these is in every good answer: chat and completions, embeddings, responses."""


def check_answer(body: bytes) -> dict[str, Any]:
    """The decoded answer. A 200 is believed only with one in it; raises the EngineFault that it is otherwise."""
    try:
        answer = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise broken("the engine's answer is not JSON") from None
    if not isinstance(answer, dict):
        raise broken("the engine's answer is no object")
    if isinstance(error := answer.get("error"), dict):
        raise fault_of_event(error)
    for name in ANSWER_FIELDS:
        if isinstance(answer.get(name), list):
            return answer
    raise broken("the engine's answer holds no answer")


def fault_of_event(error: dict[str, Any]) -> EngineFault:
    """The fault that an error inside a stream means: its `code` is the status it should have had."""
    code = error.get("code")
    return fault_of_error(code if isinstance(code, int) and 400 <= code <= 599 else 500, error)


def fault_of_error(status: int, error: dict[str, Any]) -> EngineFault:
    """By status; see ARCHITECTURE: a 4xx never moves a breaker, and a 503 says full, not broken."""
    cause = f"the engine answered {status}"
    if status in {400, 413, 422}:
        return EngineFault(client_error(error), may_retry=False, is_broken=False, cause=cause)
    if status == 404:
        return EngineFault(ModelNotFound(param="model"), may_retry=False, is_broken=False, cause=cause)
    if status in {429, 503}:
        full = NoNodeAvailable(
            "Every node that serves this model is busy. Try again shortly.", retry_after_s=FULL_RETRY_AFTER_S
        )
        return EngineFault(full, may_retry=True, is_broken=False, cause=cause)
    if status >= 500:
        return broken(cause)
    return EngineFault(EngineFailed(), may_retry=True, is_broken=False, cause=cause)


def client_error(error: dict[str, Any]) -> BadRequest:
    """The engine found the request wrong: its words, OpenAI's type and code."""
    message = str(error.get("message") or "The model server refused the request.")[:ENGINE_MESSAGE_MAX]
    param = error.get("param")
    param = param.removeprefix("body.") if isinstance(param, str) else None
    if param == "input_tokens" or "maximum context length" in message or "max_model_len" in message:
        return ContextLengthExceeded(message, param="messages" if param == "input_tokens" else param)
    return BadRequest(message, param=param)
