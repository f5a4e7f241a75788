"""What one process knows of one subject: its requests in flight, the block in hand, the last refusal.

When to ask Valkey is the limiter's; how it counts is `shared`'s.
"""

import math
from dataclasses import dataclass

from billing.limits.headers import Told, View
from billing.limits.local import Share
from billing.limits.rules import Limits, Plan

BLOCK_MIN = 2
"""A block for fewer requests than this would cost what it saves."""

ENDLESS = 1 << 62
"""What is left of something without limit."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a subject's requests are refused, and for how long this process does that by itself."""

    limit: str
    most: int
    used: int
    until: float  # by the monotonic clock: as long as we do not ask again
    free_at: float  # when the request fits if nothing else comes: what its client is told
    tokens: int | None  # it concerns requests of so many tokens; None: all


@dataclass(slots=True)
class Standing:
    """A subject, as this process sees it. A block is live until `until`; without one `until` is 0."""

    name: str
    limits: Limits
    plan: Plan
    in_use: int = 0  # requests in flight that were admitted here
    until: float = 0.0  # the block in hand may be used until then, by the monotonic clock
    requests: int = 0  # left in it
    tokens: int = 0
    slots: int = 0  # that Valkey has under our name while the block is live: in_use stays below
    granted_us: int = 0  # Valkey's time of the block
    refusal: Refusal | None = None
    views: tuple[View, ...] = ()
    told: tuple[tuple[View, ...], tuple[View, ...], Told] | None = None  # ours, another's, headers of both
    share: Share | None = None  # only while Valkey is away
    was_used: bool = True  # since the memory was last looked through
    used: int = 0  # requests since we last asked for a block
    asked_at: float = -math.inf
    rate: float = 0.0  # requests a second
    tokens_mean: float = 0.0  # of a request
    asking: int = 0  # the flight that last asked for a block

    @property
    def kind(self) -> str:
        return self.name.partition(":")[0]

    def is_idle(self, now: float) -> bool:
        """Whether forgetting it loses nothing."""
        return not self.in_use and not self.until and (self.refusal is None or self.refusal.until <= now)

    def held(self, now: float) -> int:
        """Slots that are ours: those in use, and while a block is live all that came with it."""
        if self.plan.concurrency is not None and self.until > now:
            return max(self.in_use, self.slots)
        return self.in_use

    def next_block(self, now: float, tokens: int, life_s: float) -> tuple[int, int, int]:
        """Requests, tokens and spare slots that one block's life will likely need; zeros: not worth a block."""
        plan = self.plan
        self.rate = (self.rate + self.used / max(now - self.asked_at, 0.001)) / 2
        self.tokens_mean = max(
            1.0, (3 * self.tokens_mean + tokens) / 4 if self.tokens_mean else float(tokens)
        )
        self.asked_at, self.used = now, 0
        count = math.ceil(self.rate * life_s)
        if plan.block_requests is not None:
            count = min(count, plan.block_requests)
        if plan.block_tokens is not None:
            count = min(count, int(plan.block_tokens / self.tokens_mean))
        if count < BLOCK_MIN:
            return 0, 0, 0
        return count, math.ceil(count * self.tokens_mean), plan.spare_slots

    def open_block(
        self, granted_us: int, until: float, requests: int | None, tokens: int | None, slots: int | None
    ) -> None:
        """None is without limit."""
        self.granted_us, self.until = granted_us, until
        self.requests = ENDLESS if requests is None else requests
        self.tokens = ENDLESS if tokens is None else tokens
        self.slots = ENDLESS if slots is None else slots

    def close_block(self) -> tuple[int, int]:
        """Requests and tokens that were left in it; they are to be given back."""
        left = 0, 0
        if self.until:
            left = (
                0 if self.plan.block_requests is None else self.requests,
                0 if self.plan.block_tokens is None else self.tokens,
            )
        self.until, self.requests, self.tokens, self.told = 0.0, 0, 0, None
        return left
