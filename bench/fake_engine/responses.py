"""/v1/responses as vLLM writes it: named events, a running sequence number, usage only at the end, no [DONE].

The key order and the nulls are those of tests/captures/responses_*.resp.
"""

from random import getrandbits
from typing import Any

import orjson

from bench.fake_engine.surface import Ask, Timing, completion_total
from bench.fake_engine.wire import event_line


class Responses:
    def __init__(self, ask: Ask) -> None:
        self.ask = ask
        self._item = f"msg_{getrandbits(64):016x}"
        self._sequence = 0
        self._text = orjson.loads(b'"%b"' % ask.answers[0].text)

    def opening(self) -> list[bytes]:
        response = self._response("in_progress", None, None)
        item = {**self._message("in_progress"), "content": []}
        part = {"annotations": [], "text": "", "type": "output_text", "logprobs": []}
        return [
            self._event("response.created", {"response": response}),
            self._event("response.in_progress", {"response": response}),
            self._event("response.output_item.added", {"item": item, "output_index": 0}),
            self._event("response.content_part.added", {**self._place(), "part": part}),
        ]

    def piece(self, choice: int, start: int, stop: int) -> bytes:
        text = b"".join(self.ask.answers[0].pieces[start:stop])
        if not text:
            return b""
        self._sequence += 1
        return (
            b'event: response.output_text.delta\ndata: {"content_index":0,"delta":"%b","item_id":"%b",'
            b'"logprobs":[],"output_index":0,"sequence_number":%d,"type":"response.output_text.delta"}\n\n'
            % (text, self._item.encode(), self._sequence - 1)
        )

    def last(self, choice: int, start: int, stop: int) -> list[bytes]:
        event = self.piece(choice, start, stop)
        return [event] if event else []

    def aborted(self, choice: int, tokens: int) -> list[bytes]:
        return []

    def closing(self, completion_tokens: int, timing: Timing) -> list[bytes]:
        done = {"content_index": 0, "item_id": self._item, "logprobs": [], "output_index": 0}
        response = self._finished(completion_tokens)
        return [
            self._event("response.output_text.done", done, text=self._text),
            self._event("response.content_part.done", {**self._place(), "part": self._part()}),
            self._event("response.output_item.done", {"item": self._message("completed"), "output_index": 0}),
            self._event("response.completed", {"response": response}),
        ]

    def whole(self, timing: Timing) -> bytes:
        return orjson.dumps(self._finished(completion_total(self.ask.answers)))

    def _event(self, name: str, fields: dict[str, Any], **after: Any) -> bytes:
        event = event_line(name, {**fields, "sequence_number": self._sequence, **after, "type": name})
        self._sequence += 1
        return event

    def _place(self) -> dict[str, Any]:
        return {"content_index": 0, "item_id": self._item, "output_index": 0}

    def _part(self) -> dict[str, Any]:
        return {"annotations": [], "text": self._text, "type": "output_text", "logprobs": None}

    def _message(self, status: str) -> dict[str, Any]:
        return {
            "id": self._item,
            "content": [self._part()],
            "role": "assistant",
            "status": status,
            "type": "message",
            "phase": None,
        }

    def _finished(self, completion: int) -> dict[str, Any]:
        ask = self.ask
        cut = ask.answers[0].finish == "length"
        cached = ask.cached_tokens if ask.details else 0
        usage = {
            "input_tokens": ask.prompt_tokens,
            "input_tokens_details": {
                "cached_tokens": cached,
                "cache_write_tokens": 0,
                "input_tokens_per_turn": [],
                "cached_tokens_per_turn": [],
            },
            "output_tokens": completion,
            "output_tokens_details": {
                "reasoning_tokens": 0,
                "tool_output_tokens": 0,
                "output_tokens_per_turn": [],
                "tool_output_tokens_per_turn": [],
            },
            "total_tokens": ask.prompt_tokens + completion,
        }
        why = {"reason": "max_output_tokens"} if cut else None
        return self._response("incomplete" if cut else "completed", usage, why)

    def _response(
        self, status: str, usage: dict[str, Any] | None, why_incomplete: dict[str, str] | None
    ) -> dict[str, Any]:
        ask, body = self.ask, self.ask.body
        temperature, top_p = body.get("temperature"), body.get("top_p")
        return {
            "id": ask.request_id,
            "created_at": ask.created,
            "incomplete_details": why_incomplete,
            "instructions": body.get("instructions"),
            "metadata": body.get("metadata"),
            "model": ask.model,
            "object": "response",
            "output": [] if usage is None else [self._message("completed")],
            "parallel_tool_calls": True,
            "temperature": 1.0 if temperature is None else float(temperature),
            "tool_choice": body.get("tool_choice", "auto" if body.get("tools") else "none"),
            "tools": body.get("tools") or [],
            "top_p": 1.0 if top_p is None else float(top_p),
            "background": False,
            "max_output_tokens": body.get("max_output_tokens"),
            "max_tool_calls": None,
            "previous_response_id": None,
            "prompt": None,
            "reasoning": None,
            "service_tier": "auto",
            "status": status,
            "text": None,
            "top_logprobs": None,
            "truncation": "disabled",
            "usage": usage,
            "user": body.get("user"),
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "kv_transfer_params": None,
            "ec_transfer_params": None,
            "input_messages": None,
            "output_messages": None,
        }
