"""What every surface needs to write an answer: the request as understood, timings, usage.

A surface turns tokens into events (or one body); when they are sent is decided in `turns`.
"""

from dataclasses import dataclass, field
from typing import Any, Protocol

import orjson

from bench.fake_engine.answers import Answer


@dataclass(slots=True)
class Ask:
    """A request that was accepted: what was asked and all that will be said."""

    path: str
    body: dict[str, Any]
    model: str
    request_id: str
    stream: bool
    answers: list[Answer]
    prompt_tokens: int
    cached_tokens: int = 0
    created_tokens: int = 0
    created: int = 0
    fingerprint: bytes = b""
    details: bool = False
    metrics: bool = False
    stamped: bool = False
    prompts: list[str] = field(default_factory=list)
    prompt_counts: list[int] = field(default_factory=list)  # tokens of each

    @property
    def include_usage(self) -> bool:
        return bool((self.body.get("stream_options") or {}).get("include_usage"))

    @property
    def continuous(self) -> bool:
        return self.include_usage and bool(self.body["stream_options"].get("continuous_usage_stats"))


@dataclass(slots=True)
class Timing:
    """Seconds on the loop's clock."""

    arrived: float = 0.0
    started: float = 0.0
    first_token: float = 0.0
    finished: float = 0.0


class Surface(Protocol):
    def opening(self) -> list[bytes]:
        """Events that precede the first token."""

    def piece(self, choice: int, start: int, stop: int) -> bytes:
        """The event of tokens start..stop of a choice, empty if they show nothing."""

    def last(self, choice: int, start: int, stop: int) -> list[bytes]:
        """The events that end a choice, its last tokens included."""

    def aborted(self, choice: int, tokens: int) -> list[bytes]:
        """The events that end a choice which the engine was told to abort."""

    def closing(self, completion_tokens: int, timing: Timing) -> list[bytes]:
        """Usage and whatever ends the stream."""

    def whole(self, timing: Timing) -> bytes:
        """The body of an answer that is not streamed."""


def completion_total(answers: list[Answer]) -> int:
    return sum(len(answer.pieces) for answer in answers)


def brief_usage(prompt: int, completion: int) -> bytes:
    return b'"usage":{"prompt_tokens":%d,"total_tokens":%d,"completion_tokens":%d' % (
        prompt,
        prompt + completion,
        completion,
    )


def continuous_usage(ask: Ask, completion: int, prompt: int | None = None) -> bytes:
    """What each event counts: its own choice, and the prompt (of several: `prompt`, its choice's own)."""
    if not ask.continuous:
        return b""
    counted = ask.prompt_tokens if prompt is None else prompt
    return b',%b,"completion_tokens_details":null}' % brief_usage(counted, completion)


def stream_usage(ask: Ask, completion: int) -> bytes:
    details = b""
    if ask.details:
        details = b',"prompt_tokens_details":{"cached_tokens":%d,"created_cache_tokens":%d}' % (
            ask.cached_tokens,
            ask.created_tokens,
        )
    return b"%b%b}" % (brief_usage(ask.prompt_tokens, completion), details)


def whole_usage(ask: Ask, completion: int) -> bytes:
    details = b"null"
    if ask.details:
        details = b'{"cached_tokens":%d,"created_cache_tokens":%d,"multimodal_tokens":null}' % (
            ask.cached_tokens,
            ask.created_tokens,
        )
    return b'%b,"prompt_tokens_details":%b,"completion_tokens_details":null}' % (
        brief_usage(ask.prompt_tokens, completion),
        details,
    )


def request_metrics(ask: Ask, completion: int, timing: Timing, *, stream: bool) -> bytes:
    """The `metrics` object of --enable-per-request-metrics, or null."""
    if not ask.metrics:
        return b"null"
    span = timing.finished - timing.first_token
    total = max(timing.finished - timing.arrived, 1e-6)
    fields: dict[str, float | None] = {
        "time_to_first_token_ms": (timing.first_token - timing.arrived) * 1000,
        "generation_time_ms": span * 1000,
        "queue_time_ms": (timing.started - timing.arrived) * 1000,
        "mean_itl_ms": span * 1000 / (completion - 1) if completion > 1 else None,
        "tokens_per_second": completion / total,
    }
    if not stream:
        fields["speculative_decoding"] = None
    return orjson.dumps(fields)
