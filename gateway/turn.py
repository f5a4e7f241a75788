"""One turn: the life of one inference request, from its admission to its settlement.

Holds what is known of it so far and nothing that acts; `gateway.lifecycle` moves it along.
"""

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from billing.holds import Bound
from billing.leases import Hold
from billing.limits import Admission as Quota
from billing.limits.headers import Told
from billing.prices import ONLINE_PERCENT, Price
from billing.usage import UsageRecord
from gateway.hints import Hints
from gateway.identity.keyring import Principal
from gateway.relay.events import Tokens
from gateway.relay.faults import EngineFault
from gateway.relay.taps import Tap
from nodes.routing.snapshot import Engine

Outcome = Literal["finished", "timeout", "refused", "client_gone", "engine_failed", "cut", "crashed"]
"""How a turn ended. `timeout`: /v1/complete's bound. `refused`: nothing was sent to an engine, or every engine said no.
`cut`: the gateway stopped and the turn outlived its grace. `crashed`: a fault of ours, which is in the log."""

OVERRUN_STEP = 64
"""Tokens that an engine may pass a limit by at a time, each step paid for before the next. What it says it did beyond
that is not believed: a provider could else say anything and be paid for it."""

NO_TOKENS = Tokens()
"""Nothing was delivered; never changed."""

CLIENT_CLOSED = 499
"""Recorded as the status of a turn whose client left before it got one (nginx's number for it)."""


@dataclass(slots=True)
class Ask:
    """What a surface asks of the lifecycle: a validated body, and how its answer is to be read and given.

    `tap` makes the filter of one attempt, for a stream; without it the engine is asked for one whole answer. `gathers`:
    the engine streams but the client gets one answer, which `render` makes (/v1/complete). `body_bytes`: `text_bytes` of the
    request's JSON. `limit_field`: where the body names its token limit, if it does. `price_percent`: what it costs, of the
    price online (a batch's turns cost less). `hints`: what its headers ask of the node. Nothing of it changes but `body`; it
    and `tap` go when a stream has begun. (Frozen, it takes thrice as long to make.)
    """

    route: str
    engine_path: str
    kind: Literal["generate", "pooling"]
    body: dict[str, Any]
    body_bytes: int
    is_stream: bool
    limit_field: str | None = None
    tap: Callable[[], Tap] | None = None
    gathers: bool = False
    render: Callable[["Turn", Tap, int], bytes] | None = None
    provider_id: int | None = None
    time_limit_s: float | None = None
    price_percent: int = ONLINE_PERCENT
    hints: Hints | None = None


@dataclass(slots=True)
class Turn:
    """One request in flight. `tokens` are those to be charged: what was written to the client, not what was produced.

    `sent` is the body for the engine; a stream that has begun needs neither it nor the request's body any more.
    `load_tokens`: what it counts for as load on its engine. `faults`: of the engines that were tried in vain, in order.
    """

    id: uuid.UUID
    request_id: str
    principal: Principal
    ask: Ask
    model: str
    price: Price
    bound: Bound
    hold: Hold
    quota: Quota
    started_at: float
    told: Told
    started_s: float = field(default_factory=time.monotonic)
    engine: Engine | None = None
    tokens: Tokens = field(default_factory=lambda: NO_TOKENS)
    sent: bytes = b""
    load_tokens: int = 0
    faults: tuple[tuple[Engine, EngineFault], ...] = ()
    outcome: Outcome = "refused"
    status: int = 0
    first_event_s: float | None = None
    amount_nano: int = 0
    loss_nano: int = 0
    idempotency_key: str | None = None
    overrun_tokens: int = 0
    is_overcounted: bool = False
    is_settled: bool = False
    was_next: bool = False  # it waited, and got an engine

    def first_event(self) -> None:
        """The engine's first event is here; a retry starts its time anew."""
        self.first_event_s = time.monotonic()
        if (
            self.ask.is_stream
        ):  # thousands of streams wait for their next token for minutes, each with its prompt
            self.sent = b""
            self.ask.body = {}
            self.ask.tap = None

    def delivered(self, tokens: Tokens) -> None:
        """What is to be charged: what an engine counted, as far as it can be. No prompt is longer than its bound, and an
        answer passes its limit by a step at most before it is cut. (An estimate above that is another tokenizer's.)"""
        step = 0 if tokens.estimated else OVERRUN_STEP
        prompt = min(tokens.prompt, self.bound.prompt_tokens)
        completion = min(tokens.completion, self.paid_tokens + step)
        self.is_overcounted = not tokens.estimated and (prompt, completion) != (
            tokens.prompt,
            tokens.completion,
        )
        self.tokens = Tokens(prompt, tokens.cached, completion, tokens.estimated)

    @property
    def is_begun(self) -> bool:
        """Its client may have got some of an answer: no other engine can start over."""
        return self.first_event_s is not None and not self.ask.gathers

    @property
    def paid_tokens(self) -> int:
        """Output tokens that the hold is for."""
        return self.bound.completion_tokens + self.overrun_tokens

    @property
    def limited_tokens(self) -> int:
        """What counts against token limits: what was used, and the prompt of a client that left before its answer began."""
        if self.outcome == "client_gone" and not self.tokens.prompt:
            return self.bound.usual_prompt_tokens
        return self.tokens.prompt + self.tokens.completion

    @property
    def duration_ms(self) -> int:
        """Milliseconds since the request was admitted."""
        return round((time.monotonic() - self.started_s) * 1000)

    def usage_record(self) -> UsageRecord:
        """What is kept of this turn once it is settled."""
        engine, tokens, ask, principal = self.engine, self.tokens, self.ask, self.principal
        first_s, started_s = self.first_event_s, self.started_s
        return UsageRecord(  # by position: 23 keywords would cost as much as all the rest
            self.id, principal.account_id, principal.key_id, self.started_at, ask.route, self.model,
            None if engine is None else engine.node_id, None if engine is None else engine.engine_id,
            ask.is_stream, self.outcome, self.status or CLIENT_CLOSED,
            tokens.prompt, tokens.cached, tokens.completion, tokens.estimated,
            None if first_s is None else round((first_s - started_s) * 1000), self.duration_ms,
            self.amount_nano, self.price.ref, None if engine is None else engine.account_id, self.loss_nano,
            self.hold.budgets, self.idempotency_key,
        )  # fmt: skip
