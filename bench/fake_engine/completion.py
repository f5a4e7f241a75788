"""/v1/completions as vLLM writes it: several prompts interleaved, echo, log probabilities by position.

The key order and the nulls are those of tests/captures/completion_*.resp.
"""

from typing import Any

import orjson

from bench.fake_engine.answers import split_tokens
from bench.fake_engine.surface import (
    Ask,
    Timing,
    completion_total,
    continuous_usage,
    request_metrics,
    stream_usage,
    whole_usage,
)
from bench.fake_engine.wire import DONE, inner


class Completion:
    def __init__(self, ask: Ask) -> None:
        self.ask = ask
        logprobs = ask.body.get("logprobs")
        self._top = -1 if logprobs is None or logprobs is False else int(logprobs)
        self._echo = bool(ask.body.get("echo"))
        if ask.stream:
            self._start = (
                b'data: {"id":"%b","object":"text_completion","created":%d,"model":%b,"choices":['
                % (
                    ask.request_id.encode(),
                    ask.created,
                    orjson.dumps(ask.model),
                )
            )

    def opening(self) -> list[bytes]:
        return []

    def piece(self, choice: int, start: int, stop: int) -> bytes:
        text = b"".join(self.ask.answers[choice].pieces[start:stop])
        if start == 0 and self._echo:
            text = inner(self._prompt(choice)) + text
        return self._event(choice, text, b"null", b"null", start, stop, b"") if text else b""

    def last(self, choice: int, start: int, stop: int) -> list[bytes]:
        answer = self.ask.answers[choice]
        text = b"".join(answer.pieces[start:stop])
        return [self._ending(choice, text, answer.finish, answer.stop_reason, start, stop)]

    def aborted(self, choice: int, tokens: int) -> list[bytes]:
        return [self._ending(choice, b"", "abort", None, tokens, tokens)]

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
        total = completion_total(ask.answers)
        choices = b",".join([orjson.dumps(self._choice(index)) for index in range(len(ask.answers))])
        return (
            b'{"id":"%b","object":"text_completion","created":%d,"model":%b,"choices":[%b],"service_tier":null,'
            b'"system_fingerprint":"%b",%b,"kv_transfer_params":null,"ec_transfer_params":null,"metrics":%b}'
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

    def _ending(
        self, choice: int, text: bytes, finish: str, stop_reason: str | None, start: int, stop: int
    ) -> bytes:
        print_ = b"" if self.ask.include_usage else b',"system_fingerprint":"%b"' % self.ask.fingerprint
        return self._event(
            choice, text, b'"%b"' % finish.encode(), orjson.dumps(stop_reason), start, stop, print_
        )

    def _event(
        self,
        choice: int,
        text: bytes,
        finish: bytes,
        stop_reason: bytes,
        start: int,
        stop: int,
        print_: bytes,
    ) -> bytes:
        logprobs = (
            b"null" if self._top < 0 or start == stop else orjson.dumps(self._logprobs(choice, start, stop))
        )
        return (
            b'%b{"index":%d,"text":"%b","logprobs":%b,"finish_reason":%b,"stop_reason":%b,"prompt_token_ids":null,'
            b'"token_ids":null}]%b%b}\n\n'
            % (
                self._start,
                choice,
                text,
                logprobs,
                finish,
                stop_reason,
                continuous_usage(self.ask, stop, self.ask.prompt_counts[self._place(choice)]),
                print_,
            )
        )

    def _choice(self, index: int) -> dict[str, Any]:
        answer = self.ask.answers[index]
        text = orjson.loads(b'"%b"' % answer.text)
        wants_ids = bool(self.ask.body.get("return_token_ids"))
        prompt = self._prompt(index)
        return {
            "index": index,
            "text": prompt + text if self._echo else text,
            "logprobs": None if self._top < 0 else self._logprobs(index, 0, len(answer.pieces)),
            "finish_reason": answer.finish,
            "stop_reason": answer.stop_reason,
            "token_ids": [1000 + len(piece) for piece in answer.pieces] if wants_ids else None,
            "prompt_logprobs": self._prompt_logprobs(prompt) if self._echo and self._top >= 0 else None,
            "prompt_token_ids": self._prompt_ids() if wants_ids else None,
            "routed_experts": None,
        }

    def _prompt(self, choice: int) -> str:
        return self.ask.prompts[self._place(choice)]

    def _place(self, choice: int) -> int:
        """Which prompt a choice answers."""
        return choice * len(self.ask.prompts) // len(self.ask.answers)

    def _prompt_ids(self) -> list[int]:
        prompt = self.ask.body["prompt"]
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], int):
            return prompt
        return list(range(self.ask.prompt_tokens))

    def _logprobs(self, choice: int, start: int, stop: int) -> dict[str, Any]:
        texts = [orjson.loads(b'"%b"' % piece) for piece in self.ask.answers[choice].pieces[start:stop]]
        asked = split_tokens(self._prompt(choice)) if self._echo and start == 0 else []
        tokens = asked + texts
        offsets = [sum(map(len, tokens[:index])) for index in range(len(tokens))]
        values: list[float | None] = [-0.25] * len(tokens)
        tops: list[dict[str, float] | None] = [{token: -0.25} for token in tokens]
        if asked:
            values[0], tops[0] = None, None
            for index, token in enumerate(asked[1:], 1):
                tops[index] = {token: -0.25, "-": -0.125}  # what was asked is rarely what was likely
        return {"text_offset": offsets, "token_logprobs": values, "tokens": tokens, "top_logprobs": tops}

    def _prompt_logprobs(self, prompt: str) -> list[dict[str, Any] | None]:
        known = [
            {
                "1": {"logprob": -0.25, "rank": 2, "decoded_token": token},
                "2": {"logprob": -0.125, "rank": 1, "decoded_token": "-"},
            }
            for token in split_tokens(prompt)[1:]
        ]
        return [None, *known]
