"""What flows from an engine to a client, looked at once: usage is counted and stripped, ends and errors are seen.

Pure: bytes in, bytes out, no I/O and no clock. The wire format is vLLM's as captured (tests/captures): `data: {json}\\n\\n`
with LF only. Searching for `,"usage":{` with its bare quotes is sound, because inside a JSON string a quote is escaped.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import orjson

from gateway.relay.tokens import count_tokens

_USAGE = re.compile(
    rb',"usage":\{"prompt_tokens":(\d+),"total_tokens":\d+(?:,"completion_tokens":(\d+))?'
    rb'((?:,"[a-z_]+":(?:null|\d+|\{[^{}]*\}))*)\}'
)
_CACHED = re.compile(rb'"cached_tokens":(\d+)')
_INDEX = re.compile(rb'"choices":\[\{"index":(\d+)')
_ERROR = b'data: {"error":'
_FINISH = b'"finish_reason":"'
_NO_CHOICES = b'"choices":[]'
_DONE = b"data: [DONE]"


@dataclass(slots=True)
class Tokens:
    """Tokens of one turn, as far as they are known; `estimated` when no engine said so."""

    prompt: int = 0
    cached: int = 0
    completion: int = 0
    estimated: bool = False


CostOf = Callable[[Tokens], int]


class Tap(Protocol):
    """One stream's filter. `feed` returns what the client gets now; the end is held back for `ending`."""

    tokens: Tokens
    error: dict[str, Any] | None
    is_done: bool

    def feed(self, data: bytes) -> bytes:
        """Whole events out; a part of one is kept. After an error or the end nothing more comes out."""
        ...

    @property
    def is_whole(self) -> bool:
        """Every answer was finished: what the client got is the whole answer."""
        ...

    def ending(self, cost_minor: int) -> bytes:
        """The terminal bytes, sent after the turn was settled."""
        ...

    @property
    def pending_bytes(self) -> int:
        """Bytes of an event that has not ended yet."""
        ...


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
    if not event.startswith(_ERROR):
        return None
    return _error_body(event[6:])


def _error_body(body: bytes) -> dict[str, Any]:
    try:
        error = orjson.loads(body)["error"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        error = None
    return error if isinstance(error, dict) else {"message": "the engine sent an error", "code": 500}


class OpenAITap:
    """Chat and completion streams: forwards events as the engine framed them, less the usage that was not asked for."""

    __slots__ = (
        "_choices", "_per_choice", "_prompts", "_tail", "_terminal", "_wants_every", "_wants_usage", "error", "finishes",
        "is_done", "tokens",
    )  # fmt: skip

    def __init__(
        self, *, wants_usage: bool, wants_every: bool = False, choices: int = 1, prompts: int = 1
    ) -> None:
        """`choices`: answers to expect, n times prompts. `wants_every`: the client asked for continuous usage itself."""
        self.tokens = Tokens()
        self.error: dict[str, Any] | None = None
        self.is_done = False
        self.finishes = 0
        self._wants_usage = wants_usage
        self._wants_every = wants_every
        self._choices = choices
        self._prompts = prompts
        self._per_choice: dict[int, tuple[int, int]] = {}
        self._tail = b""
        self._terminal = b""

    @property
    def is_whole(self) -> bool:
        return self.error is None and self.is_done and self.finishes >= self._choices

    @property
    def pending_bytes(self) -> int:
        return len(self._tail)

    def feed(self, data: bytes) -> bytes:
        if self.error is not None or self.is_done:
            return b""
        data = self._tail + data if self._tail else data
        end = data.rfind(b"\n\n") + 2
        if end == 1:
            self._tail = data
            return b""
        self._tail = data[end:]
        whole = data[:end] if self._tail else data
        if _ERROR in whole or _NO_CHOICES in whole or _DONE in whole:
            whole = self._ends(whole)
        self.finishes += whole.count(_FINISH)
        return self._count(whole)

    def _ends(self, whole: bytes) -> bytes:
        """The rare batch with an end in it, event by event: returns the ordinary events that go out now."""
        ordinary = []
        for event in whole.split(b"\n\n"):
            if event.startswith(_ERROR):
                self.error = _error_body(event[6:])
                break
            if event.startswith(_DONE):
                self._terminal += event + b"\n\n"
                self.is_done = True
                break
            if _NO_CHOICES in event and (match := _USAGE.search(event)) is not None:
                self._last_word(match)
                if self._wants_usage:
                    self._terminal += event + b"\n\n"
            elif event:
                ordinary.append(event + b"\n\n")
        return b"".join(ordinary)

    def _last_word(self, match: "re.Match[bytes]") -> None:
        self.tokens.prompt = int(match[1])
        self.tokens.completion = int(match[2] or 0)
        cached = _CACHED.search(match[3])
        if cached is not None:
            self.tokens.cached = int(cached[1])

    def _count(self, whole: bytes) -> bytes:
        """Keep the counts that these events carry, and take them out unless the client wants them."""
        if self._choices == 1:
            at = whole.rfind(b',"usage":{')
            match = _USAGE.match(whole, at) if at >= 0 else None
            if match is not None:
                self.tokens.prompt = int(match[1])
                self.tokens.completion = int(match[2] or 0)
        else:
            self._count_each(whole)
        return whole if self._wants_every else _USAGE.sub(b"", whole)

    def _count_each(self, whole: bytes) -> None:
        """With several answers in one stream each event counts its own choice only (vLLM); a prompt counts once."""
        for event in whole.split(b"\n\n"):
            usage, index = _USAGE.search(event), _INDEX.search(event)
            if usage is not None and index is not None:
                self._per_choice[int(index[1])] = (int(usage[1]), int(usage[2] or 0))
        per_prompt = self._choices // self._prompts
        prompts = {choice // per_prompt: counts[0] for choice, counts in self._per_choice.items()}
        self.tokens.prompt = sum(prompts.values())
        self.tokens.completion = sum(counts[1] for counts in self._per_choice.values())

    def ending(self, cost_minor: int) -> bytes:
        return add_cost_event(self._terminal, cost_minor) if self._wants_usage else self._terminal


def add_cost_event(terminal: bytes, cost_minor: int) -> bytes:
    """`cost_halala` in the usage event, the only event of `terminal` that ends with a brace."""
    return terminal.replace(b"}\n\n", b',"cost_halala":%d}\n\n' % cost_minor, 1)


_RESPONSES_USAGE = re.compile(rb'"usage":\{"input_tokens":(\d+),.*?"output_tokens":(\d+)', re.DOTALL)
_RESPONSES_DELTA = re.compile(rb'"delta":("(?:[^"\\]|\\.)*")')
_RESPONSES_ENDS = (b"event: response.completed", b"event: response.incomplete", b"event: response.failed")


class ResponsesTap:
    """The stream of /v1/responses: named events, usage only in the last one, no `[DONE]`.

    No event before the last says how many tokens there were, so a stream that is cut is counted by tokenizer, delta by
    delta, and marked `estimated`.
    """

    __slots__ = ("_prompt_estimate", "_tail", "_terminal", "error", "is_done", "tokens")

    def __init__(self, prompt_estimate: Callable[[], int]) -> None:
        self.tokens = Tokens()
        self.error: dict[str, Any] | None = None
        self.is_done = False
        self._prompt_estimate = prompt_estimate
        self._tail = b""
        self._terminal = b""

    @property
    def is_whole(self) -> bool:
        return self.error is None and self.is_done

    @property
    def pending_bytes(self) -> int:
        return len(self._tail)

    def feed(self, data: bytes) -> bytes:
        if self.error is not None or self.is_done:
            return b""
        *events, self._tail = (self._tail + data).split(b"\n\n")
        out = []
        for event in events:
            if event.startswith((_ERROR, b"event: error")):
                self.error = _error_body(event[event.find(b"{") :])
                break
            if event.startswith(_RESPONSES_ENDS):
                self._end(event)
                break
            self._estimate(event)
            out.append(event + b"\n\n")
        return b"".join(out)

    def _end(self, event: bytes) -> None:
        match = _last(_RESPONSES_USAGE, event)
        if match is not None:
            cached = _CACHED.search(match[0])
            self.tokens = Tokens(int(match[1]), int(cached[1]) if cached else 0, int(match[2]))
        self._terminal = event + b"\n\n"
        self.is_done = True

    def _estimate(self, event: bytes) -> None:
        if event.startswith(b":"):
            return
        if not self.tokens.estimated:
            self.tokens = Tokens(prompt=self._prompt_estimate(), estimated=True)
        delta = _RESPONSES_DELTA.search(event)
        if delta is not None:
            self.tokens.completion += count_tokens(orjson.loads(delta[1]))

    def ending(self, cost_minor: int) -> bytes:
        return self._terminal


class CompleteTap:
    """/v1/complete: a chat stream in, `{"text", "index"}` events out, and a last event with usage and cost."""

    __slots__ = ("_chat", "_finish", "_text", "error", "is_done")

    def __init__(self) -> None:
        self._chat = OpenAITap(wants_usage=False, wants_every=True)
        self._finish: str | None = None
        self._text: list[str] = []
        self.error: dict[str, Any] | None = None
        self.is_done = False

    @property
    def tokens(self) -> Tokens:
        return self._chat.tokens

    @tokens.setter
    def tokens(self, tokens: Tokens) -> None:
        self._chat.tokens = tokens

    @property
    def is_whole(self) -> bool:
        return self._chat.is_whole or self._finish == "timeout"

    @property
    def pending_bytes(self) -> int:
        return self._chat.pending_bytes

    @property
    def text(self) -> str:
        return "".join(self._text)

    @property
    def finish_reason(self) -> str:
        return self._finish or "stop"

    def time_out(self) -> None:
        """End here: the answer so far is the answer (contract: finish_reason `timeout`)."""
        self._finish = "timeout"
        self.is_done = True

    def feed(self, data: bytes) -> bytes:
        if self._finish == "timeout":
            return b""
        events = self._chat.feed(data).split(b"\n\n")
        out = [self._delta(orjson.loads(event[6:])) for event in events if event.startswith(b"data: {")]
        self.error = self._chat.error
        self.is_done = self._chat.is_done
        return b"".join(out)

    def _delta(self, event: dict[str, Any]) -> bytes:
        choice = event["choices"][0] if event.get("choices") else {}
        if choice.get("finish_reason"):
            self._finish = "length" if choice["finish_reason"] == "length" else "stop"
        text = (choice.get("delta") or {}).get("content")
        if not text:
            return b""
        self._text.append(text)
        return b"data: " + orjson.dumps({"text": text, "index": choice.get("index", 0)}) + b"\n\n"

    def ending(self, cost_minor: int) -> bytes:
        final = {
            "finish_reason": self.finish_reason,
            "usage": usage_dict(self.tokens),
            "cost_halala": cost_minor,
        }
        return b"data: " + orjson.dumps(final) + b"\n\ndata: [DONE]\n\n"


def usage_dict(tokens: Tokens) -> dict[str, int]:
    """The contract's `usage` object."""
    total = tokens.prompt + tokens.completion
    return {"prompt_tokens": tokens.prompt, "completion_tokens": tokens.completion, "total_tokens": total}


def answer_tokens(body: bytes) -> Tokens | None:
    """Usage of an answer that is not a stream, of whichever of the four routes; None when the engine gave none."""
    at = body.rfind(b',"usage":{')
    match = _USAGE.match(body, at) if at >= 0 else None
    if match is not None:
        cached = _CACHED.search(match[3])
        return Tokens(int(match[1]), int(cached[1]) if cached else 0, int(match[2] or 0))
    responses = _last(_RESPONSES_USAGE, body)
    if responses is not None:
        cached = _CACHED.search(responses[0])
        return Tokens(int(responses[1]), int(cached[1]) if cached else 0, int(responses[2]))
    return None


def add_cost(body: bytes, cost_minor: int) -> bytes:
    """`cost_halala` as the last field of a JSON object."""
    return body[: body.rindex(b"}")] + b',"cost_halala":%d}' % cost_minor


def _last(pattern: "re.Pattern[bytes]", data: bytes) -> "re.Match[bytes] | None":
    at = data.rfind(b'"usage":{')
    return pattern.match(data, at) if at >= 0 else None
