"""vLLM's wire format, as far as the gateway looks at it: usage, errors and ends, found in bytes without parsing them.

Pure. The format is vLLM's as captured (tests/captures): `data: {json}\n\n` with LF only. Searching for `,"usage":{` with its
bare quotes is sound, because inside a JSON string a quote is escaped.
"""

import re
from dataclasses import dataclass
from typing import Any, Final, TypeGuard

import orjson

from gateway.relay.digits import DIGITS_MAX, digits_end, number_of

COUNT_MAX: Final = 10**12
"""A count beyond it is none: no context has so many, and what it costs would fit no column."""

USAGE: Final = re.compile(
    rb',"usage":\{"prompt_tokens":(\d{1,12}),"total_tokens":\d+(?:,"completion_tokens":(\d{1,12}))?'
    rb'((?:,"[a-z_]+":(?:null|\d{1,12}|\{[^{}]*\}))*)\}'
)
RESPONSES_USAGE: Final = re.compile(
    rb'"usage":\{"input_tokens":(\d{1,12}),.*?"output_tokens":(\d{1,12})\b', re.DOTALL
)
CACHED: Final = re.compile(rb'"cached_tokens":(\d{1,12})\b')
ERROR: Final = b'data: {"error":'


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


# An answer as vLLM writes it, piece by piece.
_ID: Final = b'{"id":"'
_CHAT: Final = b'","object":"chat.completion","created":'
_COMPLETION: Final = b'","object":"text_completion","created":'
_LIST: Final = b'","object":"list","created":'
_MODEL: Final = b',"model":"'
_CHOICES: Final = b'","choices":[{'
_DATA: Final = b'","data":[{'
_USAGE: Final = b',"usage":{"prompt_tokens":'
_TOTAL: Final = b',"total_tokens":'
_COMPLETION_TOKENS: Final = b',"completion_tokens":'
_ENDINGS: Final = (
    b',"prompt_tokens_details":null}',
    b"}",
    b',"prompt_tokens_details":null,"completion_tokens_details":null}',
)

_QUOTE: Final = ord('"')
_BACKSLASH: Final = ord("\\")


def plain_tokens(body: bytes) -> Tokens | None:
    """Usage of an answer as vLLM writes it, without decoding it; None for any other one, which must be looked at.

    Its beginning says that it is an answer and no error, and its bare quotes that the last `,"usage":{` is its own.
    """
    if not _begins_plainly(body):
        return None
    at = body.rfind(b',"usage":{')
    if at < 0:
        return None
    prompt, end = _count(body, _past(_USAGE, body, at))
    _, end = _count(body, _past(_TOTAL, body, end))
    completion, end = _count(body, _past(_COMPLETION_TOKENS, body, end))
    for ending in _ENDINGS:
        if _past(ending, body, end) >= 0:
            return Tokens(prompt, 0, completion)
    match = USAGE.match(body, at)
    return None if match is None else usage_tokens(match)


def _begins_plainly(body: bytes) -> bool:
    """Whether these are an answer's id, kind, time and model, and the first of what it has."""
    quote = _quote(body, _past(_ID, body, 0))
    at = _past(_CHAT, body, quote)
    if at < 0:
        at = max(_past(_COMPLETION, body, quote), _past(_LIST, body, quote))
    _, at = _count(body, at)
    quote = _quote(body, _past(_MODEL, body, at))
    return _past(_CHOICES, body, quote) >= 0 or _past(_DATA, body, quote) >= 0


# Each of these looks at one place, and takes and gives -1 where something before was not as it should be. Compiled, they
# take a third of the time of a regular expression.


def _past(text: bytes, data: bytes, at: int) -> int:
    """Where `text` ends, which begins at that place."""
    end = at + len(text)
    return end if at >= 0 and data[at:end] == text else -1


def _quote(data: bytes, at: int) -> int:
    """Where the quote is that ends a JSON string without escapes."""
    if at < 0:
        return -1
    for place in range(at, len(data)):
        byte = data[place]
        if byte == _QUOTE:
            return place
        if byte == _BACKSLASH:
            return -1
    return -1


def _count(data: bytes, at: int) -> tuple[int, int]:
    """A count, and where it ends."""
    if at < 0:
        return 0, -1
    end = digits_end(data, at)
    return (number_of(data, at, end), end) if 0 < end - at <= DIGITS_MAX else (0, -1)


def usage_dict(tokens: Tokens) -> dict[str, int]:
    """The contract's `usage` object."""
    total = tokens.prompt + tokens.completion
    return {"prompt_tokens": tokens.prompt, "completion_tokens": tokens.completion, "total_tokens": total}


def add_cost(body: bytes, cost_minor: int) -> bytes:
    """`cost_halala` as the last field of a JSON object."""
    end = len(body) - 1 if body.endswith(b"}") else body.rindex(b"}")
    return b'%b,"cost_halala":%d}' % (body[:end], cost_minor)
