"""What a limit is: its five numbers, whom it binds, which windows it makes, and how a refusal is told.

Nothing here counts or waits: `limiter` admits, `shared` and `local` count.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Any, Literal

MINUTE_S = 60.0
DAY_S = 86400.0

LIMIT_MAX = 10**12
"""Lua counts in doubles, exact to 9e15; a day of the largest pool is far below this."""

CONCURRENCY_MAX = 1_000_000
"""A count of slots shares one double with its flight's number (see admit.lua), so it has 20 bits."""

BLOCK_SHARE = 100
"""A block is at most one part in so many of a limit: what processes hold unused stays small against it."""

WORDS = {
    "requests_minute": "requests per minute",
    "requests_day": "requests per day",
    "tokens_minute": "tokens per minute",
    "tokens_day": "tokens per day",
    "concurrency": "concurrent requests",
}


class BadLimits(ValueError):
    """These are not limits; the message says what is wrong with which."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How much is allowed; None is without limit."""

    requests_minute: int | None = None
    requests_day: int | None = None
    tokens_minute: int | None = None
    tokens_day: int | None = None
    concurrency: int | None = None

    @property
    def is_any(self) -> bool:
        """Whether anything is limited."""
        return any(getattr(self, name) is not None for name in NAMES)

    def over(self, tier: "Limits") -> "Limits":
        """These, and the tier's where these say nothing."""
        return Limits(**{**as_json(tier), **as_json(self)})


NAMES = tuple(each.name for each in fields(Limits))


def limits_of(stored: Mapping[str, Any] | str | None) -> Limits:
    """Limits from their JSON (an object, or its text). Raises BadLimits."""
    found = json.loads(stored) if isinstance(stored, str) else stored or {}
    if not isinstance(found, Mapping):
        raise BadLimits("limits are an object with names and numbers")
    for name, value in found.items():
        if name not in NAMES:
            raise BadLimits(f"there is no limit {name!r}; there are {', '.join(NAMES)}")
        most = CONCURRENCY_MAX if name == "concurrency" else LIMIT_MAX
        if type(value) is not int or not 1 <= value <= most:
            raise BadLimits(f"{name} is a whole number from 1 to {most}, not {value!r}")
    return Limits(**found)


def as_json(limits: Limits) -> dict[str, int]:
    """What is limited, by name."""
    return {name: value for name in NAMES if (value := getattr(limits, name)) is not None}


@dataclass(frozen=True, slots=True)
class Subject:
    """A key or an account that has limits."""

    kind: Literal["key", "account"]
    id: int
    limits: Limits
    name: str = field(init=False, compare=False)  # a string knows its hash: looked up at each request

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", f"{self.kind}:{self.id}")


class LimitExceeded(Exception):
    """A request that is over a limit, and when it would not be."""

    def __init__(
        self, limit: str, message: str, retry_after_s: int, headers: dict[str, str], subject: str
    ) -> None:
        super().__init__(message)
        self.limit = limit  # a name of Limits
        self.message = message
        self.retry_after_s = retry_after_s  # if nothing else comes, this request is admitted then
        self.headers = headers
        self.subject = subject


def refusal_message(limit: str, kind: str, most: int, used: int, asked: int, wait_s: float) -> str:
    """What a person is told, in OpenAI's order."""
    if limit == "concurrency":
        return f"Rate limit reached for concurrent requests of this {kind}: limit {most}, running {used}."
    return (
        f"Rate limit reached for {WORDS[limit]} of this {kind}: limit {most}, used {used}, requested {asked}. "
        f"Please try again in {rounded_up(wait_s)}s."
    )


def rounded_up(wait_s: float) -> int:
    """Whole seconds that are not too few, and never 0."""
    return max(1, math.ceil(wait_s))


@dataclass(frozen=True, slots=True)
class Window:
    """One rolling window of a subject."""

    name: str
    unit: Literal["requests", "tokens"]
    limit: int
    length_us: int
    has_log: bool  # requests a minute: entries may stand in a log, in buckets, or (after a change) in both
    is_exact: bool  # counted in the log


@dataclass(frozen=True, slots=True)
class Plan:
    """How a set of limits is kept; shared by all subjects with the same numbers."""

    windows: tuple[Window, ...]
    concurrency: int | None
    is_exact: bool  # every request asks Valkey
    block_requests: int | None  # most requests, tokens and spare slots in one block; None: no such limit
    block_tokens: int | None
    spare_slots: int


@lru_cache(maxsize=1024)
def plan_of(limits: Limits, exact_max: int, minute_s: float = MINUTE_S, day_s: float = DAY_S) -> Plan:
    """A low limit makes the whole subject exact: its requests ask Valkey anyway, for all windows at once."""
    lengths = {"minute": round(minute_s * 1e6), "day": round(day_s * 1e6)}
    windows = tuple(
        Window(
            name=name,
            unit="requests" if name.startswith("requests") else "tokens",
            limit=most,
            length_us=lengths[name.rpartition("_")[2]],
            has_log=name == "requests_minute",
            is_exact=name == "requests_minute" and most <= exact_max,
        )
        for name, most in as_json(limits).items()
        if name != "concurrency"
    )
    requests = [window.limit for window in windows if window.unit == "requests"]
    tokens = [window.limit for window in windows if window.unit == "tokens"]
    slots = limits.concurrency
    return Plan(
        windows=windows,
        concurrency=slots,
        is_exact=any(most <= exact_max for most in requests) or (slots is not None and slots < BLOCK_SHARE),
        block_requests=min(requests) // BLOCK_SHARE if requests else None,
        block_tokens=min(tokens) // BLOCK_SHARE if tokens else None,
        spare_slots=slots // BLOCK_SHARE if slots is not None else 0,
    )
