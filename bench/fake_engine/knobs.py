"""What can be turned while the engine runs: speed, what is said, limits, faults, states.

A knob is read at the moment it matters, so a change also reaches requests already in flight where that makes
sense (pause, pace). How a fault plays out is in `turns` and `breakage`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

FaultKind = Literal[
    "http_error",  # `status` (400, 404, 500, 503 as captured; any other too) before anything else
    "error_first",  # HTTP 200, the error as first event, then [DONE]; a plain error for non-streams
    "error_mid",  # the error event after `after` tokens, then [DONE]
    "no_finish",  # [DONE] after `after` tokens, no finish_reason and no usage
    "stall",  # silence after `after` tokens, socket ESTABLISHED
    "close",  # FIN after `after` tokens, no last chunk
    "reset",  # RST after `after` tokens
    "die",  # the process exits after `after` tokens
    "garbage",  # bytes that are no HTTP, then FIN
    "truncated_chunk",  # after `after` tokens a chunk shorter than it says, then FIN
    "endless_event",  # after `after` tokens one event that never ends (up to `size_bytes`, 0 for ever)
    "drip",  # every byte of every event is an HTTP chunk of its own
    "drip_wire",  # every byte of the answer is a write of its own, `gap_ms` apart
    "huge",  # the answer's text is `size_bytes` long, in one event or one body
]


@dataclass(slots=True)
class Fault:
    """One way to fail. `after` counts tokens; -1 means before the headers, 0 right after them."""

    kind: FaultKind
    times: int | None = None
    after: int = 0
    status: int = 500
    message: str | None = None
    size_bytes: int = 0
    gap_ms: float = 1.0
    path: str | None = None
    model: str | None = None
    stream: bool | None = None
    contains: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(FaultKind):
            msg = f"unknown fault kind {self.kind!r}; one of {', '.join(get_args(FaultKind))}"
            raise ValueError(msg)

    def matches(self, path: str, model: str, stream: bool, body: bytes) -> bool:
        return (
            (self.times is None or self.times > 0)
            and (self.path is None or self.path == path)
            and (self.model is None or self.model == model)
            and (self.stream is None or self.stream == stream)
            and (self.contains is None or self.contains.encode() in body)
        )


@dataclass(slots=True)
class Knobs:
    """Every knob with its default; times in milliseconds, sizes in tokens unless the name says otherwise."""

    # What is said.
    tokens: int = 16  # length of an answer that stops by itself, its end-of-sequence token included
    answer: Any = None  # text, or list of token strings, or one such list a choice; instead of stock words
    tool_arguments: Any = '{"city": "Paris"}'  # text or token strings
    auto_tool: bool = False  # tool_choice auto calls the first tool instead of talking
    prompt_tokens: int | None = None  # count to report instead of bytes/4 + 30
    merge: int = 1  # tokens a chunk
    stamped: bool = False  # a chat chunk's text is the moment at which it was made (see `stamps`)
    textless_every: int = 0  # every k-th token has no text: usage counts it, no chunk shows it
    # How fast.
    lockstep: int | None = None  # a stream writes so many events, then one for each POST /_fake/go; no pace
    ttft_ms: float = 0.0
    ttft_per_1k_ms: float = (
        0.0  # for each 1,000 prompt tokens that the prefix cache does not hold (see `prefills`)
    )
    max_num_batched_tokens: int = 2048  # prompt tokens that are computed in one step
    pace_ms: float = 0.0
    pace_per_running_ms: float = 0.0  # added for each running request: a batch slows down as it grows
    jitter: float = 0.0  # share of the pace, either way
    phase_ms: float = (
        0.0  # a stream's first token waits up to so long more, so that streams don't beat together
    )
    keep_alive_ms: float = 5000.0  # idle connections are closed after this, as uvicorn does
    sse_keep_alive_ms: float = 0.0  # `: keep-alive` comments while a stream waits for its first event
    # Limits.
    max_num_seqs: int = 256
    max_num_queued_reqs: int = 0  # in-flight cap, 0: none
    burst: bool = False  # a stream over the cap gets HTTP 200 and the error as its first event
    # States.
    draining: bool = False  # new requests get HTTP 500, /health stays 200
    paused: bool = False  # streams freeze, new requests wait, /health stays 200
    sleeping: bool = False
    mute: bool = False  # accepts and reads, answers nothing (but /_fake)
    health_status: int = 200
    sigterm: Literal["exit", "stall", "error", "drain", "ignore"] = "exit"
    # Failing and replaying.
    faults: list[Fault] = field(default_factory=list)  # the first that matches a request applies
    replay: str | dict[str, str] | None = None  # NAME of a .resp for every POST, or {path: NAME}
    replay_times: int | None = None
    replay_split: Literal["whole", "chunk"] = "whole"
    record_bodies: bool = False
    record_events: bool = False

    def turn(self, changes: Mapping[str, Any]) -> None:
        """Apply changes by name; unknown names and wrong types of plain knobs raise ValueError."""
        known = {item.name: item for item in fields(self)}
        for name, value in changes.items():
            if name not in known:
                msg = f"unknown knob {name!r}; one of {', '.join(known)}"
                raise ValueError(msg)
            setattr(self, name, [Fault(**fault) for fault in value] if name == "faults" else value)

    def take_fault(self, path: str, model: str, stream: bool, body: bytes) -> Fault | None:
        for fault in self.faults:
            if fault.matches(path, model, stream, body):
                if fault.times is not None:
                    fault.times -= 1
                return fault
        return None

    def take_replay(self, method: str, path: str) -> str | None:
        name = (
            self.replay.get(path)
            if isinstance(self.replay, dict)
            else self.replay
            if method == "POST"
            else None
        )
        if name is None or self.replay_times == 0:
            return None
        if self.replay_times is not None:
            self.replay_times -= 1
        return name
