"""The stream of /v1/responses: named events, usage only in the last one, no `[DONE]`."""

import re
from typing import Any

import orjson

from gateway.relay.events import ERROR, Tokens, error_body, responses_tokens
from gateway.relay.taps import Tap
from gateway.relay.tokens import count_prompt, count_tokens

_DELTA = re.compile(rb'"delta":("(?:[^"\\]|\\.)*")')
_ENDS = (b"event: response.completed", b"event: response.incomplete")
_FAILURES = (ERROR, b"event: error", b"event: response.failed")


class ResponsesTap(Tap):
    """Filter of one stream.

    No event before the last says how many tokens there were, so a stream that is cut is counted by tokenizer, delta by
    delta, and marked `estimated`.
    """

    __slots__ = ("_asked", "_tail", "_terminal")

    def __init__(self, asked: Any) -> None:
        """`asked`: what the prompt is made of, whose tokens are estimated until the engine has the last word."""
        super().__init__()
        self._asked = asked
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
            if event.startswith(_FAILURES):
                self.error = error_body(event[event.find(b"{") :])
                break
            if event.startswith(_ENDS):
                self._end(event)
                break
            self._estimate(event)
            out.append(event + b"\n\n")
        return b"".join(out)

    def _end(self, event: bytes) -> None:
        self.tokens = responses_tokens(event) or self.tokens
        self._terminal = event + b"\n\n"
        self.is_done = True

    def _estimate(self, event: bytes) -> None:
        if event.startswith(b":"):
            return
        self.tokens.estimated = True
        delta = _DELTA.search(event)
        if delta is not None:
            self.tokens.completion += count_tokens(orjson.loads(delta[1]))

    def final_tokens(self) -> Tokens:
        if self.tokens.estimated and not self.tokens.prompt:
            self.tokens.prompt = count_prompt(self._asked)
        return self.tokens

    def ending(self, cost_minor: int) -> bytes:
        return self._terminal
