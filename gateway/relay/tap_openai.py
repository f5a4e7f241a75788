"""Chat and completion streams: events go on as the engine framed them, less the usage that was not asked for.

Counts are kept as they come by, so what was delivered is known at every instant.
"""

import re
from typing import Any

import orjson

from gateway.relay.events import ERROR, USAGE, Tokens, error_body, tokens_of, usage_tokens, without_usage
from gateway.relay.tokens import count_prompt, count_tokens

_INDEX = re.compile(rb'"choices":\[\{"index":(\d+)')
_PLAIN = b'data: {"id":'
_PLAIN_USAGE = re.compile(
    rb',"usage":\{"prompt_tokens":(\d{1,12}),"total_tokens":\d+,"completion_tokens":(\d{1,12})(?:,"[a-z_]+":null)*\}\}\n\n'
)
_USUAL_USAGE = b',"usage":{"prompt_tokens":%d,"total_tokens":%d,"completion_tokens":%d%b'
_UNFINISHED = b'"finish_reason":null'
_UNFINISHED_WITHIN = 100
"""Bytes before the usage in which a plain event says that."""

_FINISH = b'"finish_reason":"'
_NO_CHOICES = b'"choices":[]'
_DONE = b"data: [DONE]"


class OpenAITap:
    """Filter of one chat or completion stream; see `gateway.relay.taps.Tap`."""

    __slots__ = (
        "_after_count", "_asked", "_choices", "_has_counts", "_has_last_word", "_is_plain", "_per_choice",
        "_prompts", "_tail", "_terminal", "_wants_every", "_wants_usage", "error", "finishes", "is_done", "tokens",
    )  # fmt: skip

    def __init__(
        self,
        *,
        wants_usage: bool,
        wants_every: bool = False,
        choices: int = 1,
        prompts: int = 1,
        asked: Any = None,
    ) -> None:
        """`choices`: answers to expect, n times prompts. `wants_every`: the client asked for continuous usage itself.
        `asked`: messages or prompt, whose tokens are estimated if the engine reports none."""
        self.tokens = Tokens()
        self.error: dict[str, Any] | None = None
        self.is_done = False
        self.finishes = 0
        self._asked = asked
        self._wants_usage = wants_usage
        self._wants_every = wants_every
        self._choices = choices
        self._prompts = prompts
        self._per_choice: dict[int, tuple[int, int]] = {}
        self._has_counts = False
        self._is_plain = False  # pieces may be looked at by `_plain_event`
        self._after_count = b"}}\n\n"  # how the last plain event went on behind its count
        self._has_last_word = False
        self._tail = b""
        self._terminal = b""

    @property
    def is_whole(self) -> bool:
        return self.error is None and self.finishes >= self._choices

    @property
    def pending_bytes(self) -> int:
        return len(self._tail)

    def feed(self, data: bytes) -> bytes:
        if self.error is not None or self.is_done:
            return b""
        if self._is_plain and (plain := self._plain_event(data)) is not None:
            return plain
        data = self._tail + data if self._tail else data
        end = data.rfind(b"\n\n") + 2
        if end == 1:
            self._tail = data
            return b""
        self._tail = data[end:]
        whole = data[:end] if self._tail else data
        # `in` would raise and catch a TypeError inside for each.
        if whole.find(ERROR) >= 0 or whole.find(_NO_CHOICES) >= 0 or whole.find(_DONE) >= 0:
            whole = self._ends(whole)
        self.finishes += whole.count(_FINISH)
        return self._count(whole)

    def _plain_event(self, data: bytes) -> bytes | None:
        """The usual piece: one event in the middle of an answer, with a count, which is kept and taken out. None: another.

        With bare quotes, `"finish_reason":null` is the event's own, and so is the last `,"usage":{`.
        """
        end = len(data)
        if self._tail or not data.startswith(_PLAIN) or data.find(b"\n") != end - 2:
            return None
        tokens = self.tokens
        prompt, completion = tokens.prompt, tokens.completion + 1
        usual = _USUAL_USAGE % (prompt, prompt + completion, completion, self._after_count)
        if data.endswith(usual):
            at = end - len(usual)
        else:  # several tokens at once, or the first count
            at = data.rfind(b',"usage":{')
            match = _PLAIN_USAGE.fullmatch(data, at) if at >= 0 else None
            if match is None:
                return None
            prompt, completion = int(match[1]), int(match[2])
            self._after_count = data[match.end(2) :]
        if data.find(_UNFINISHED, max(0, at - _UNFINISHED_WITHIN)) < 0:
            return None
        tokens.prompt, tokens.completion = prompt, completion
        return data[:at] + b"}\n\n"

    def _ends(self, whole: bytes) -> bytes:
        """The rare batch with an end in it, from there on event by event: returns the ordinary events, which go out now."""
        first = min(at for mark in (ERROR, _NO_CHOICES, _DONE) if (at := whole.find(mark)) >= 0)
        before = whole.rfind(b"\n\n", 0, first)
        begins = 0 if before < 0 else before + 2
        ordinary = [whole[:begins]]
        for event in whole[begins:].split(b"\n\n"):
            if event.startswith(ERROR):
                self.error = error_body(event[6:])
                break
            if event.startswith(_DONE):
                self._terminal += event + b"\n\n"
                self.is_done = True
                break
            if _NO_CHOICES in event and b'"usage":' in event:
                match = USAGE.search(event)
                tokens = usage_tokens(match) if match else tokens_of(orjson.loads(event[6:]).get("usage"))
                self.tokens = tokens or self.tokens
                self._has_last_word = self._has_counts = tokens is not None
                self._is_plain = False
                if self._wants_usage:
                    self._terminal += event + b"\n\n"
            elif event:
                ordinary.append(event + b"\n\n")
        return b"".join(ordinary)

    def _count(self, whole: bytes) -> bytes:
        """Keep the counts that these events carry, and take them out unless the client wants them."""
        at = whole.rfind(b',"usage":{')
        if at < 0 or self._has_last_word:
            if not self._has_counts:
                self._estimate(whole)
        elif (match := USAGE.match(whole, at)) is None:
            return b"".join(map(self._count_oddly, whole.split(b"\n\n")))
        else:
            if not self._has_counts:
                self._has_counts, self.tokens = True, Tokens()  # from here on nothing is estimated
                self._asked = None
                self._is_plain = self._choices == 1 and not self._wants_every
            if self._choices > 1:
                self._count_each(whole)
            else:
                self.tokens.prompt = int(match[1])
                self.tokens.completion = int(match[2] or 0)
        return whole if at < 0 or self._wants_every else without_usage(whole)

    def _count_oddly(self, event: bytes) -> bytes:
        """Usage that is not written as vLLM writes it: the event is decoded."""
        if not event.startswith(b"data: {"):
            return event + b"\n\n" if event else b""
        data = orjson.loads(event[6:])
        tokens = tokens_of(data.get("usage"))
        if tokens is not None:
            self.tokens, self._has_counts = tokens, True
        if not self._wants_every:
            data.pop("usage", None)
        return b"data: " + orjson.dumps(data) + b"\n\n"

    def _count_each(self, whole: bytes) -> None:
        """With several answers in one stream each event counts its own choice only (vLLM); a prompt counts once."""
        for event in whole.split(b"\n\n"):
            usage, index = USAGE.search(event), _INDEX.search(event)
            if usage is not None and index is not None:
                self._per_choice[int(index[1])] = (int(usage[1]), int(usage[2] or 0))
        per_prompt = self._choices // self._prompts
        prompts = {choice // per_prompt: counts[0] for choice, counts in self._per_choice.items()}
        self.tokens.prompt = sum(prompts.values())
        self.tokens.completion = sum(counts[1] for counts in self._per_choice.values())

    def _estimate(self, whole: bytes) -> None:
        """An engine that reports nothing as it goes: count its text, until it has the last word itself."""
        for event in whole.split(b"\n\n"):
            if event.startswith(b"data: {"):
                self.tokens.estimated = True
                self.tokens.completion += sum(map(count_tokens, _texts(event[6:])))

    def final_tokens(self) -> Tokens:
        if self.tokens.estimated and not self.tokens.prompt:
            self.tokens.prompt = count_prompt(self._asked)
        return self.tokens

    def ending(self, cost_minor: int) -> bytes:
        terminal = self._terminal if self.is_done else self._terminal + _DONE + b"\n\n"
        if self._wants_usage and self._has_last_word:
            return terminal.replace(b"}\n\n", b',"cost_halala":%d}\n\n' % cost_minor, 1)
        return terminal


def _texts(body: bytes) -> list[str]:
    """The generated text in one event: a delta's content, reasoning or arguments, or a completion's text."""
    try:
        choices = orjson.loads(body)["choices"]
        deltas = [choice.get("delta") or {"content": choice.get("text")} for choice in choices]
        calls = [call["function"] for delta in deltas for call in delta.get("tool_calls") or ()]
        texts = [delta.get(name) for delta in deltas for name in ("content", "reasoning")]
        texts += [call.get(name) for call in calls for name in ("name", "arguments")]
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError):
        return []
    return [text for text in texts if isinstance(text, str)]
