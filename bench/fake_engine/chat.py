"""/v1/chat/completions as vLLM writes it: chunks, tool calls, log probabilities, the whole body.

The key order and the nulls are those of tests/captures/chat_*.resp and full__tools_*.resp.
"""

from random import getrandbits
from typing import Any

import orjson

from bench.fake_engine.surface import (
    Ask,
    Timing,
    completion_total,
    continuous_usage,
    request_metrics,
    stream_usage,
    whole_usage,
)
from bench.fake_engine.wire import DONE
from bench.stamps import stamp

_PLAIN_TAIL = b'"},"logprobs":null,"finish_reason":null,"token_ids":null}]}\n\n'


class Chat:
    def __init__(self, ask: Ask) -> None:
        self.ask = ask
        self._top = int(ask.body.get("top_logprobs") or 0) if ask.body.get("logprobs") else -1
        self._is_plain = self._top < 0 and not ask.continuous
        if ask.stream:
            self._start = (
                b'data: {"id":"%b","object":"chat.completion.chunk","created":%d,"model":%b,"choices":['
                % (
                    ask.request_id.encode(),
                    ask.created,
                    orjson.dumps(ask.model),
                )
            )
            self._heads = [
                b'%b{"index":%d,"delta":{"content":"' % (self._start, index)
                for index in range(len(ask.answers))
            ]

    def opening(self) -> list[bytes]:
        ask = self.ask
        tail = b'%b,"prompt_token_ids":null,"prompt_text":null}\n\n' % continuous_usage(ask, 0)
        events = [
            b'%b{"index":%d,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]%b'
            % (self._start, index, tail)
            for index in range(len(ask.answers))
        ]
        for index, answer in enumerate(ask.answers):
            if answer.tool is not None:
                call = {"id": _tool_id(), "type": "function", "index": 0, "function": {"name": answer.tool}}
                events.append(self._tool_event(index, call, 0))
        return events

    def piece(self, choice: int, start: int, stop: int) -> bytes:
        answer = self.ask.answers[choice]
        text = answer.pieces[start] if stop == start + 1 else b"".join(answer.pieces[start:stop])
        if not text:
            return b""
        if answer.tool is not None:
            call = {"index": 0, "function": {"arguments": orjson.loads(b'"%b"' % text)}}
            return self._tool_event(choice, call, stop)
        if self.ask.stamped:
            text = stamp()
        if self._is_plain:
            return b"%b%b%b" % (self._heads[choice], text, _PLAIN_TAIL)
        return b'%b%b"},"logprobs":%b,"finish_reason":null,"token_ids":null}]%b}\n\n' % (
            self._heads[choice],
            text,
            self._logprobs(choice, start, stop),
            continuous_usage(self.ask, stop),
        )

    def last(self, choice: int, start: int, stop: int) -> list[bytes]:
        answer = self.ask.answers[choice]
        text = b"".join(answer.pieces[start:stop])
        delta = b"{}" if answer.tool is not None else b'{"content":"%b"}' % text
        before = self.piece(choice, start, stop) if answer.tool is not None else b""
        event = self._finish(choice, delta, answer.finish, answer.stop_reason, start, stop)
        return [before, event] if before else [event]

    def aborted(self, choice: int, tokens: int) -> list[bytes]:
        return [self._finish(choice, b"{}", "abort", None, tokens, tokens)]

    def closing(self, completion_tokens: int, timing: Timing) -> list[bytes]:
        ask = self.ask
        if not ask.include_usage:
            return [DONE]
        metrics = b""
        if ask.metrics:
            metrics = b',"metrics":' + request_metrics(ask, completion_tokens, timing, stream=True)
        usage = stream_usage(ask, completion_tokens)
        return [
            b'%b],%b,"system_fingerprint":"%b"%b}\n\n' % (self._start, usage, ask.fingerprint, metrics),
            DONE,
        ]

    def whole(self, timing: Timing) -> bytes:
        ask = self.ask
        choices = b",".join([self._choice(index) for index in range(len(ask.answers))])
        total = completion_total(ask.answers)
        return (
            b'{"id":"%b","object":"chat.completion","created":%d,"model":%b,"choices":[%b],"service_tier":null,'
            b'"system_fingerprint":"%b",%b,"prompt_logprobs":null,"prompt_token_ids":null,"prompt_text":null,'
            b'"kv_transfer_params":null,"ec_transfer_params":null,"metrics":%b}'
            % (
                ask.request_id.encode(),
                ask.created,
                orjson.dumps(ask.model),
                choices,
                ask.fingerprint,
                whole_usage(ask, total),
                request_metrics(ask, total, timing, stream=False),
            )
        )

    def _finish(
        self, choice: int, delta: bytes, finish: str, stop_reason: str | None, start: int, stop: int
    ) -> bytes:
        ask = self.ask
        print_ = b"" if ask.include_usage else b',"system_fingerprint":"%b"' % ask.fingerprint
        return (
            b'%b{"index":%d,"delta":%b,"logprobs":%b,"finish_reason":"%b","stop_reason":%b,"token_ids":null}]%b%b}\n\n'
            % (
                self._start,
                choice,
                delta,
                self._logprobs(choice, start, stop),
                finish.encode(),
                orjson.dumps(stop_reason),
                continuous_usage(ask, stop),
                print_,
            )
        )

    def _tool_event(self, choice: int, call: dict[str, Any], tokens: int) -> bytes:
        return (
            b'%b{"index":%d,"delta":{"content":null,"tool_calls":[%b]},"logprobs":null,"finish_reason":null,'
            b'"token_ids":null}]%b}\n\n'
            % (self._start, choice, orjson.dumps(call), continuous_usage(self.ask, tokens))
        )

    def _choice(self, index: int) -> bytes:
        answer = self.ask.answers[index]
        calls, text = b"", answer.text
        if answer.tool is not None:
            arguments = orjson.loads(b'"%b"' % text)
            call = {
                "id": _tool_id(),
                "type": "function",
                "function": {"name": answer.tool, "arguments": arguments},
            }
            calls, text = b'"tool_calls":[%b],' % orjson.dumps(call), b""
        return (
            b'{"index":%d,"message":{"role":"assistant","content":"%b","refusal":null,"annotations":null,'
            b'"audio":null,"function_call":null,%b"reasoning":null},"logprobs":%b,"finish_reason":"%b",'
            b'"stop_reason":%b,"token_ids":null,"routed_experts":null}'
            % (
                index,
                text,
                calls,
                self._logprobs(index, 0, len(answer.pieces)),
                answer.finish.encode(),
                b"null" if answer.stop_reason is None else orjson.dumps(answer.stop_reason),
            )
        )

    def _logprobs(self, choice: int, start: int, stop: int) -> bytes:
        if self._top < 0 or start == stop:
            return b"null"
        pieces = self.ask.answers[choice].pieces[start:stop]
        return orjson.dumps({"content": [_token_logprob(piece, self._top) for piece in pieces]})


def _token_logprob(piece: bytes, top: int) -> dict[str, Any]:
    text = orjson.loads(b'"%b"' % piece)
    first = _logprob(text, -0.25)
    others = [_logprob(f"{text}{rank}", -2.5 - rank) for rank in range(1, top)]
    return {**first, "top_logprobs": [first, *others][:top]}


def _logprob(text: str, value: float) -> dict[str, Any]:
    return {"token": text, "logprob": value, "bytes": list(text.encode())}


def _tool_id() -> str:
    return f"chatcmpl-tool-{getrandbits(64):016x}"
