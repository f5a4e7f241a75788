"""vLLM's wire format, as far as the gateway looks at it: usage, errors and ends, found in bytes without parsing them.

Pure. The format is vLLM's as captured (tests/captures): `data: {json}\n\n` with LF only. Searching for `,"usage":{` with its
bare quotes is sound, because inside a JSON string a quote is escaped.
"""

import re
from dataclasses import dataclass
from typing import Any, Final, TypeGuard

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


@dataclass(slots=True, init=False)
class Tokens:
    """Tokens of one turn, as far as they are known; `estimated` when no engine said so. `prompt` includes `cached`."""

    prompt: int
    cached: int
    completion: int
    estimated: bool

    # Written out, because a generated one is not compiled.
    def __init__(
        self, prompt: int = 0, cached: int = 0, completion: int = 0, estimated: bool = False
    ) -> None:
        self.prompt = prompt
        self.cached = cached
        self.completion = completion
        self.estimated = estimated


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


COUNTS = ("prompt_tokens", "prompt_tokens_details", "completion_tokens")
RESPONSES_COUNTS = ("input_tokens", "input_tokens_details", "output_tokens")
"""What usage calls its prompt, the details with the cached part of that, and its answer."""


def tokens_of(usage: object, names: tuple[str, str, str] = COUNTS) -> Tokens | None:
    """The counts of a decoded `usage` object in whatever order and spelling; None where there are none."""
    if not isinstance(usage, dict):
        return None
    prompt, details, completion = usage.get(names[0]), usage.get(names[1]), usage.get(names[2], 0)
    cached = (details.get("cached_tokens") if isinstance(details, dict) else None) or 0
    completion = completion or 0
    if not (_is_count(prompt) and _is_count(cached) and _is_count(completion)):
        return None
    return Tokens(prompt, cached, completion)


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and 0 <= value < COUNT_MAX


_USAGE_BEGINS: Final = b',"usage":{'
_OPENS: Final = 0x7B


def without_usage(events: bytes) -> bytes:
    """The same events less their counts; those without details, as they are amid a stream, need no pattern."""
    parts = events.split(_USAGE_BEGINS)
    is_nested = False
    for index in range(1, len(parts)):
        part = parts[index]
        end = part.find(b"}")
        if end >= 0 and _OPENS not in part[:end]:
            parts[index] = part[end + 1 :]
        else:
            parts[index] = _USAGE_BEGINS + part
            is_nested = True
    less = b"".join(parts)
    return USAGE.sub(b"", less) if is_nested else less


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


def answer_tokens(answer: dict[str, Any]) -> Tokens | None:
    """Usage of a decoded answer that is not a stream, of whichever of the four routes; None when the engine gave none."""
    usage = answer.get("usage")
    return tokens_of(usage, RESPONSES_COUNTS if isinstance(answer.get("output"), list) else COUNTS)


PLAIN_ANSWER = re.compile(
    rb'\{"id":"[0-9A-Za-z_-]*","object":"(?:chat\.completion|text_completion|list)","created":\d+,"model":"[^"\\]*",'
    rb'"(?:choices|data)":\[\{'
)
PLAIN_USAGE = re.compile(
    rb',"usage":\{"prompt_tokens":(\d{1,12}),"total_tokens":\d+,"completion_tokens":(\d{1,12})'
    rb'(?:,"prompt_tokens_details":null)?(?:,"completion_tokens_details":null)?\}'
)
"""As vLLM writes it unless it tells of cached tokens; found in a third of the time that USAGE takes."""


def plain_tokens(body: bytes) -> Tokens | None:
    """Usage of an answer as vLLM writes it, without decoding it; None for any other one, which must be looked at.

    Its beginning says that it is an answer and no error, and its bare quotes that the last `,"usage":{` is its own.
    """
    if PLAIN_ANSWER.match(body) is None:
        return None
    at = body.rfind(b',"usage":{')
    if at < 0:
        return None
    plain = PLAIN_USAGE.match(body, at)
    if plain is not None:
        return Tokens(int(plain[1]), 0, int(plain[2]))
    match = USAGE.match(body, at)
    return None if match is None else usage_tokens(match)


def usage_dict(tokens: Tokens) -> dict[str, int]:
    """The contract's `usage` object."""
    total = tokens.prompt + tokens.completion
    return {"prompt_tokens": tokens.prompt, "completion_tokens": tokens.completion, "total_tokens": total}


def add_cost(body: bytes, cost_minor: int) -> bytes:
    """`cost_halala` as the last field of a JSON object."""
    return body[: body.rindex(b"}")] + b',"cost_halala":%d}' % cost_minor
