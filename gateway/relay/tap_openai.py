"""Chat and completion streams: events go on as the engine framed them, less the usage that was not asked for.

Counts are kept as they come by, so what was delivered is known at every instant.
"""

import re
from typing import Any, Final

import orjson

from gateway.relay.digits import DIGITS_MAX, digits_begin, number_of
from gateway.relay.events import ERROR, USAGE, Tokens, error_body, tokens_of, usage_tokens, without_usage
from gateway.relay.taps import Tap
from gateway.relay.tokens import count_prompt, count_tokens

_INDEX = re.compile(rb'"choices":\[\{"index":(\d+)')
_PLAIN: Final = b'data: {"id":'
_PLAIN_USAGE = re.compile(
    rb',"usage":\{"prompt_tokens":(\d{1,12}),"total_tokens":(\d+),"completion_tokens":(\d{1,12})(?:,"[a-z_]+":null)*\}\}\n\n'
)
_BEFORE_COUNT: Final = b',"completion_tokens":'
_PLAIN_ENDS: Final = b"}\n\n"
_UNFINISHED: Final = b',"finish_reason":null'
_UNFINISHED_WITHIN: Final = 100
"""Bytes before the usage in which a plain event says that."""

_NEWLINE: Final = 0x0A

_FINISH: Final = b'"finish_reason":"'
_NO_CHOICES: Final = b'"choices":[]'
_DONE: Final = b"data: [DONE]"

_SHAPES_MAX: Final = 64
"""Shapes that are kept for all streams: an engine has one for each kind of answer and version."""


class _Shape:
    """How plain events go on behind their text, as far as it is the same whatever was asked and answered."""

    __slots__ = ("after_count", "before_usage")

    def __init__(self, before_usage: bytes, after_count: bytes) -> None:
        """`before_usage`: from `,"finish_reason":null` on. `after_count`: behind the completion tokens, to the end."""
        self.before_usage = before_usage
        self.after_count = after_count


_shapes: Final[dict[tuple[bytes, bytes], _Shape]] = {}
"""One object for all streams of a shape, which they find in the processor's cache."""


class OpenAITap(Tap):
    """Filter of one chat or completion stream."""

    __slots__ = (
        "_asked", "_before_total", "_choices", "_has_counts", "_has_last_word", "_is_plain", "_per_choice", "_plain_prompt",
        "_prompts", "_shape", "_tail", "_terminal", "_wants_every", "_wants_usage", "finishes",
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
        super().__init__()
        # What each plain event needs comes first, to lie together.
        self._tail = b""
        self._is_plain = False  # pieces may be looked at by `_plain_event`
        self._shape: _Shape | None = None  # of the last plain event
        self._before_total = b""  # and its usage up to there
        self._plain_prompt = 0
        self.finishes = 0
        self._asked = asked
        self._wants_usage = wants_usage
        self._wants_every = wants_every
        self._choices = choices
        self._prompts = prompts
        self._per_choice: dict[int, tuple[int, int]] = {}
        self._has_counts = False
        self._has_last_word = False
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
        if self._tail:
            data = self._tail + data
            self._tail = b""
        elif self._is_plain and (plain := self._plain_event(data)) is not None:
            return plain
        out: list[bytes] = []
        at = 0
        if not self._has_counts and (first := data.find(b"\n\n")) >= 0:  # it tells whether plain ones follow
            at = first + 2
            out.append(self._events(data[:at]))
        while self._is_plain and (end := data.find(b"\n", at) + 2) > 1:
            if end - at == len(data) or (plain := self._plain_event(data[at:end])) is None:
                break
            out.append(plain)
            at = end
        if at < len(data):
            out.append(self._events(data[at:] if at else data))
        return b"".join(out)

    def _events(self, data: bytes) -> bytes:
        """Any events, of which the last may be a part."""
        if self.error is not None or self.is_done:
            return b""
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
        """One event in the middle of an answer, with counts, which are kept and taken out. None: another, or more than one.

        Most are the last one but for text, total and completion tokens, which is seen without a pattern. With bare quotes,
        `,"finish_reason":null` is the event's own, and so is the last `,"usage":{`.
        """
        if not data.startswith(_PLAIN):
            return None
        shape, before_total = self._shape, self._before_total
        if shape is None or not data.endswith(shape.after_count):
            return self._other_plain(data)
        count_ends = len(data) - len(shape.after_count)
        count_at = digits_begin(data, count_ends)
        total_ends = count_at - len(_BEFORE_COUNT)
        total_at = digits_begin(data, total_ends)
        at = total_at - len(before_total)
        if (
            at <= 0
            or not 0 < count_ends - count_at <= DIGITS_MAX
            or data[total_ends:count_at] != _BEFORE_COUNT
            or total_at == total_ends
            or data[at:total_at] != before_total
        ):
            return self._other_plain(data)
        before = data[:at]
        if _NEWLINE in before or not before.endswith(shape.before_usage):
            return self._other_plain(data)
        tokens = self.tokens
        tokens.prompt = self._plain_prompt
        tokens.completion = number_of(data, count_at, count_ends)
        return before + _PLAIN_ENDS

    def _other_plain(self, data: bytes) -> bytes | None:
        """A plain event that differs from the last one in more than its text and counts, if it is one."""
        if data.find(b"\n") != len(data) - 2:
            return None
        at = data.rfind(b',"usage":{')
        match = _PLAIN_USAGE.fullmatch(data, at) if at >= 0 else None
        if match is None:
            return None
        unfinished_at = data.rfind(_UNFINISHED, max(0, at - _UNFINISHED_WITHIN), at)
        if unfinished_at < 0:
            return None
        self.tokens.prompt, self.tokens.completion = int(match[1]), int(match[3])
        self._plain_prompt = self.tokens.prompt
        self._before_total = data[at : match.start(2)]
        self._shape = shape_of(data[unfinished_at:at], data[match.end(3) :])
        return data[:at] + _PLAIN_ENDS

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


def shape_of(before_usage: bytes, after_count: bytes) -> _Shape:
    """The shape with these bytes."""
    shape = _shapes.get((before_usage, after_count))
    if shape is None:
        shape = _Shape(before_usage, after_count)
        if len(_shapes) < _SHAPES_MAX:
            _shapes[before_usage, after_count] = shape
    return shape


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
