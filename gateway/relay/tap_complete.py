"""/v1/complete: a chat stream in, `{"text", "index"}` events out, and a last event with usage and cost."""

from typing import Any

import orjson

from gateway.relay.events import Tokens, usage_dict
from gateway.relay.tap_openai import OpenAITap
from gateway.relay.taps import Tap


class CompleteTap(Tap):
    """Filter of one chat stream."""

    __slots__ = ("_chat", "_finish", "_text")

    def __init__(self, asked: Any) -> None:
        """`asked`: the messages, whose tokens are estimated if the engine reports none."""
        super().__init__()
        self._chat = OpenAITap(wants_usage=False, wants_every=True, asked=asked)
        self._finish: str | None = None
        self._text: list[str] = []

    @property
    def is_whole(self) -> bool:
        return self._chat.is_whole or self.timed_out

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
        if self.timed_out:
            return b""
        events = self._chat.feed(data).split(b"\n\n")
        out = [self._delta(orjson.loads(event[6:])) for event in events if event.startswith(b"data: {")]
        self.tokens, self.error, self.is_done = self._chat.tokens, self._chat.error, self._chat.is_done
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

    @property
    def timed_out(self) -> bool:
        """It was ended by its time limit."""
        return self._finish == "timeout"

    def final_tokens(self) -> Tokens:
        return self._chat.final_tokens()

    def ending(self, cost_minor: int) -> bytes:
        final = {
            "finish_reason": self.finish_reason,
            "usage": usage_dict(self.tokens),
            "cost_halala": cost_minor,
        }
        return b"data: " + orjson.dumps(final) + b"\n\ndata: [DONE]\n\n"
