"""vLLM's wire format, as far as the gateway looks at it: usage, errors and ends, found in bytes without parsing them.

Pure. The format is vLLM's as captured (tests/captures): `data: {json}\n\n` with LF only. Searching for `,"usage":{` with its
bare quotes is sound, because inside a JSON string a quote is escaped.
"""

import re
from dataclasses import dataclass
from typing import Any

import orjson

COUNT_MAX = 10**12
"""A count beyond it is none: no context has so many, and what it costs would fit no column."""

USAGE = re.compile(
    rb',"usage":\{"prompt_tokens":(\d{1,12}),"total_tokens":\d+(?:,"completion_tokens":(\d{1,12}))?'
    rb'((?:,"[a-z_]+":(?:null|\d{1,12}|\{[^{}]*\}))*)\}'
)
RESPONSES_USAGE = re.compile(
    rb'"usage":\{"input_tokens":(\d{1,12}),.*?"output_tokens":(\d{1,12})\b', re.DOTALL
)
CACHED = re.compile(rb'"cached_tokens":(\d{1,12})\b')
ERROR = b'data: {"error":'


@dataclass(slots=True)
class Tokens:
    """Tokens of one turn, as far as they are known; `estimated` when no engine said so. `prompt` includes `cached`."""

    prompt: int = 0
    cached: int = 0
    completion: int = 0
    estimated: bool = False


def first_event(data: bytes) -> bytes | None:
    """The first whole event that is no comment, or None while there is none."""
    start = 0
    while (end := data.find(b"\n\n", start)) >= 0:
        event = data[start:end]
        if event and not event.startswith(b":"):
            return event
        start = end + 2
    return None


def error_of(event: bytes) -> dict[str, Any] | None:
    """The error that an event carries, in vLLM's form `{message, type, param, code}`."""
    if not event.startswith(ERROR):
        return None
    return error_body(event[6:])


def error_body(body: bytes) -> dict[str, Any]:
    try:
        error = orjson.loads(body)["error"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        error = None
    return error if isinstance(error, dict) else {"message": "the engine sent an error", "code": 500}


def tokens_of(usage: object) -> Tokens | None:
    """The counts of a decoded `usage` object in whatever order and spelling; None where there are none."""
    if not isinstance(usage, dict):
        return None
    prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens", 0)
    details = usage.get("prompt_tokens_details")
    cached = details.get("cached_tokens", 0) if isinstance(details, dict) else 0
    counts = [count or 0 for count in (prompt, cached, completion)]
    if not all(isinstance(count, int) and 0 <= count < COUNT_MAX for count in counts):
        return None
    return Tokens(counts[0], counts[1], counts[2])


def usage_tokens(match: "re.Match[bytes]") -> Tokens:
    """The counts that USAGE found."""
    cached = CACHED.search(match[3])
    return Tokens(int(match[1]), int(cached[1]) if cached else 0, int(match[2] or 0))


def responses_tokens(data: bytes) -> Tokens | None:
    """The counts of a /v1/responses answer, or of its last event."""
    at = data.rfind(b'"usage":{')
    match = RESPONSES_USAGE.match(data, at) if at >= 0 else None
    if match is None:
        return None
    cached = CACHED.search(match[0])
    return Tokens(int(match[1]), int(cached[1]) if cached else 0, int(match[2]))


def answer_tokens(body: bytes) -> Tokens | None:
    """Usage of an answer that is not a stream, of whichever of the four routes; None when the engine gave none."""
    at = body.rfind(b',"usage":{')
    match = USAGE.match(body, at) if at >= 0 else None
    return usage_tokens(match) if match is not None else responses_tokens(body)


def usage_dict(tokens: Tokens) -> dict[str, int]:
    """The contract's `usage` object."""
    total = tokens.prompt + tokens.completion
    return {"prompt_tokens": tokens.prompt, "completion_tokens": tokens.completion, "total_tokens": total}


def add_cost(body: bytes, cost_minor: int) -> bytes:
    """`cost_halala` as the last field of a JSON object."""
    return body[: body.rindex(b"}")] + b',"cost_halala":%d}' % cost_minor
