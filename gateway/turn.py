"""One turn: the life of one inference request, from its admission to its settlement.

Holds what is known of it so far and nothing that acts; `gateway.lifecycle` moves it along.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal

from billing.holds import Bound
from billing.leases import Hold
from billing.limits import Admission as Quota
from billing.limits.headers import Told
from billing.prices import ONLINE_PERCENT, Price
from billing.usage import UsageRecord
from config.clock import monotonic
from config.ids import hex7
from gateway.hints import Hints
from gateway.identity.keyring import Principal
from gateway.relay.events import Tokens
from gateway.relay.faults import EngineFault
from gateway.relay.taps import Tap
from nodes.routing.snapshot import Engine

Outcome = Literal["finished", "timeout", "refused", "client_gone", "engine_failed", "cut", "crashed"]
"""How a turn ended. `timeout`: /v1/complete's bound. `refused`: nothing was sent to an engine, or every engine said no.
`cut`: the gateway stopped and the turn outlived its grace. `crashed`: a fault of ours, which is in the log."""

OVERRUN_STEP: Final = 64
"""Tokens that an engine may pass a limit by at a time, each step paid for before the next. What it says it did beyond
that is not believed: a provider could else say anything and be paid for it."""

NO_TOKENS: Final = Tokens()
"""Nothing was delivered; never changed."""

CLIENT_CLOSED: Final = 499
"""Recorded as the status of a turn whose client left before it got one (nginx's number for it)."""


NEW_TUPLE: Final = tuple.__new__

ID_PREFIX: Final = "req_"
"""How the id of a request begins; a turn's is the rest."""


def new_request_id() -> str:
    """Sorts by time, unique over all processes."""
    return ID_PREFIX + hex7()


@dataclass(slots=True, init=False)
class Ask:
    """What a surface asks of the lifecycle: a validated body, and how its answer is to be read and given.

    `tap` makes the filter of one attempt, for a stream; without it the engine is asked for one whole answer. `gathers`:
    the engine streams but the client gets one answer, which `render` makes (/v1/complete). `body_bytes`: `text_bytes` of the
    request's JSON. `limit_field`: where the body names its token limit, if it does. `price_percent`: what it costs, of the
    price online (a batch's turns cost less). `hints`: what its headers ask of the node. Nothing of it changes but `body`; it
    and `tap` go when a stream has begun.
    """

    route: str
    engine_path: str
    kind: Literal["generate", "pooling"]
    body: dict[str, Any]
    body_bytes: int
    is_stream: bool
    limit_field: str | None
    tap: Callable[[], Tap] | None
    gathers: bool
    render: Callable[["Turn", Tap, int], bytes] | None
    provider_id: int | None
    time_limit_s: float | None
    price_percent: int
    hints: Hints | None

    # Written out, here and in Turn: a generated one is not compiled (config.compiled), and takes eight times as long.
    def __init__(
        self, route: str, engine_path: str, kind: Literal["generate", "pooling"], body: dict[str, Any], body_bytes: int,
        is_stream: bool, *, limit_field: str | None = None, tap: Callable[[], Tap] | None = None, gathers: bool = False,
        render: Callable[["Turn", Tap, int], bytes] | None = None, provider_id: int | None = None,
        time_limit_s: float | None = None, price_percent: int = ONLINE_PERCENT, hints: Hints | None = None,
    ) -> None:  # fmt: skip
        self.route = route
        self.engine_path = engine_path
        self.kind = kind
        self.body = body
        self.body_bytes = body_bytes
        self.is_stream = is_stream
        self.limit_field = limit_field
        self.tap = tap
        self.gathers = gathers
        self.render = render
        self.provider_id = provider_id
        self.time_limit_s = time_limit_s
        self.price_percent = price_percent
        self.hints = hints


@dataclass(slots=True, init=False)
class Turn:
    """One request in flight. `tokens` are those to be charged: what was written to the client, not what was produced.

    `sent` is the body for the engine; a stream that has begun needs neither it nor the request's body any more.
    `load_tokens`: what it counts for as load on its engine. `faults`: of the engines that were tried in vain, in order.
    """

    id: str
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
    started_s: float
    engine: Engine | None
    tokens: Tokens
    sent: bytes
    load_tokens: int
    faults: tuple[tuple[Engine, EngineFault], ...]
    outcome: Outcome
    status: int
    first_event_s: float | None
    amount_nano: int
    loss_nano: int
    idempotency_key: str | None
    overrun_tokens: int
    is_overcounted: bool
    is_settled: bool
    was_next: bool  # it waited, and got an engine

    def __init__(
        self, request_id: str, principal: Principal, ask: Ask, model: str, price: Price, bound: Bound, hold: Hold,
        quota: Quota, started_at: float, told: Told,
    ) -> None:  # fmt: skip
        self.id = request_id[len(ID_PREFIX) :]
        self.request_id = request_id
        self.principal = principal
        self.ask = ask
        self.model = model
        self.price = price
        self.bound = bound
        self.hold = hold
        self.quota = quota
        self.started_at = started_at
        self.told = told
        self.started_s = monotonic()
        self.engine = None
        self.tokens = NO_TOKENS
        self.sent = b""
        self.load_tokens = 0
        self.faults = ()
        self.outcome = "refused"
        self.status = 0
        self.first_event_s = None
        self.amount_nano = 0
        self.loss_nano = 0
        self.idempotency_key = None
        self.overrun_tokens = 0
        self.is_overcounted = False
        self.is_settled = False
        self.was_next = False

    def first_event(self) -> None:
        """The engine's first event is here; a retry starts its time anew."""
        self.first_event_s = monotonic()
        if (
            self.ask.is_stream
        ):  # thousands of streams wait for their next token for minutes, each with its prompt
            self.sent = b""
            self.ask.body = {}
            self.ask.tap = None

    def delivered(self, tokens: Tokens) -> None:
        """What is to be charged: what an engine counted, as far as it can be. No prompt is longer than its bound, and an
        answer passes its limit by a step at most before it is cut. (An estimate above that is another tokenizer's.)"""
        prompt_max = self.bound.prompt_tokens
        completion_max = self.paid_tokens + (0 if tokens.estimated else OVERRUN_STEP)
        is_within = tokens.prompt <= prompt_max and tokens.completion <= completion_max
        self.is_overcounted = not (is_within or tokens.estimated)
        if not is_within:
            prompt, completion = min(tokens.prompt, prompt_max), min(tokens.completion, completion_max)
            tokens = Tokens(prompt, tokens.cached, completion, tokens.estimated)
        self.tokens = tokens

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
        return _in_ms(monotonic() - self.started_s)

    def usage_record(self) -> UsageRecord:
        """What is kept of this turn once it is settled."""
        engine, tokens, ask, principal = self.engine, self.tokens, self.ask, self.principal
        first_s, started_s = self.first_event_s, self.started_s
        return NEW_TUPLE(UsageRecord, (  # 23 arguments would cost as much as all the rest
            self.id, principal.account_id, principal.key_id, self.started_at, ask.route, self.model,
            None if engine is None else engine.node_id, None if engine is None else engine.engine_id,
            ask.is_stream, self.outcome, self.status or CLIENT_CLOSED,
            tokens.prompt, tokens.cached, tokens.completion, tokens.estimated,
            None if first_s is None else _in_ms(first_s - started_s), self.duration_ms,
            self.amount_nano, self.price.ref, None if engine is None else engine.account_id, self.loss_nano,
            self.hold.budgets, self.idempotency_key,
        ))  # fmt: skip


def _in_ms(seconds: float) -> int:
    """To the nearest one; `round` would be a call out of compiled code."""
    return int(seconds * 1000.0 + 0.5)
