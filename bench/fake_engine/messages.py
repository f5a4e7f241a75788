"""/v1/messages, the Anthropic surface of vLLM, as tests/captures/messages_*.resp show it: text only."""

from typing import Any, Final

import orjson

from bench.fake_engine.surface import Ask, Timing, completion_total
from bench.fake_engine.wire import event_line

_STOP_REASONS: Final = {"length": "max_tokens", "stop": "end_turn", "abort": "end_turn"}


class Messages:
    def __init__(self, ask: Ask) -> None:
        self.ask = ask

    def opening(self) -> list[bytes]:
        message: dict[str, Any] = {
            "id": self.ask.request_id,
            "type": "message",
            "role": "assistant",
            "content": [],
            "model": self.ask.model,
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {"input_tokens": self.ask.prompt_tokens, "output_tokens": 0},
        }
        block = {"type": "content_block_start", "content_block": {"type": "text", "text": ""}, "index": 0}
        return [
            event_line("message_start", {"type": "message_start", "message": message}),
            event_line("content_block_start", block),
        ]

    def piece(self, choice: int, start: int, stop: int) -> bytes:
        text = b"".join(self.ask.answers[0].pieces[start:stop])
        if not text:
            return b""
        return (
            b'event: content_block_delta\ndata: {"type":"content_block_delta","delta":{"type":"text_delta",'
            b'"text":"%b"},"index":0}\n\n' % text
        )

    def last(self, choice: int, start: int, stop: int) -> list[bytes]:
        event = self.piece(choice, start, stop)
        return [event] if event else []

    def aborted(self, choice: int, tokens: int) -> list[bytes]:
        return []

    def closing(self, completion_tokens: int, timing: Timing) -> list[bytes]:
        usage = {"input_tokens": self.ask.prompt_tokens, "output_tokens": completion_tokens}
        delta = {"stop_reason": self._stop_reason(), "stop_sequence": None}
        return [
            event_line("content_block_stop", {"type": "content_block_stop", "index": 0}),
            event_line("message_delta", {"type": "message_delta", "delta": delta, "usage": usage}),
            event_line("message_stop", {"type": "message_stop"}),
        ]

    def whole(self, timing: Timing) -> bytes:
        ask = self.ask
        fields = {
            "id": ask.request_id,
            "type": "message",
            "role": "assistant",
            "content": [{"type": "text", "text": orjson.loads(b'"%b"' % ask.answers[0].text)}],
            "model": ask.model,
            "stop_reason": self._stop_reason(),
            "usage": {"input_tokens": ask.prompt_tokens, "output_tokens": completion_total(ask.answers)},
        }
        return orjson.dumps(fields)

    def _stop_reason(self) -> str:
        return _STOP_REASONS[self.ask.answers[0].finish]
