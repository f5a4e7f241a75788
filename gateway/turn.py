"""One turn: the life of one inference request, from its admission to its settlement.

Holds what is known of it so far and nothing that acts; `gateway.lifecycle` moves it along.
"""

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from billing.prices import Price
from gateway.identity.keyring import Principal
from gateway.relay.events import Tokens
from gateway.relay.taps import Tap
from nodes.routing.snapshot import Engine

Outcome = Literal["finished", "timeout", "refused", "client_gone", "engine_failed", "cut", "crashed"]
"""How a turn ended. `timeout`: /v1/complete's bound. `refused`: nothing was sent to an engine, or every engine said no.
`cut`: the gateway stopped and the turn outlived its grace. `crashed`: a fault of ours, which is in the log."""


@dataclass(frozen=True, slots=True)
class Ask:
    """What a surface asks of the lifecycle: a validated body, and how its answer is to be read and given.

    `tap` makes the filter of one attempt, for a stream; without it the engine is asked for one whole answer. `gathers`:
    the engine streams but the client gets one answer, which `render` makes (/v1/complete).
    """

    route: str
    engine_path: str
    kind: Literal["generate", "pooling"]
    body: dict[str, Any]
    is_stream: bool
    output_tokens: int
    tap: Callable[[], Tap] | None = None
    gathers: bool = False
    render: Callable[["Turn", Tap, int], bytes] | None = None
    provider_id: int | None = None
    time_limit_s: float | None = None


@dataclass(slots=True)
class Turn:
    """One request in flight. `tokens` are those to be charged: what was written to the client, not what was produced."""

    id: uuid.UUID
    request_id: str
    principal: Principal
    ask: Ask
    model: str
    price: Price
    started_at: float
    started_s: float = field(default_factory=time.monotonic)
    engine: Engine | None = None
    tokens: Tokens = field(default_factory=Tokens)
    outcome: Outcome = "refused"
    status: int = 0
    first_event_s: float | None = None
    amount_nano: int = 0
    is_settled: bool = False

    def first_event(self) -> None:
        """The engine's first event is here; a retry starts its time anew."""
        self.first_event_s = time.monotonic()

    @property
    def ttft_ms(self) -> int | None:
        """Time to first token as the client sees it, milliseconds."""
        return None if self.first_event_s is None else round((self.first_event_s - self.started_s) * 1000)

    @property
    def duration_ms(self) -> int:
        """Milliseconds since the request was admitted."""
        return round((time.monotonic() - self.started_s) * 1000)
