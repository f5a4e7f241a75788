"""A schedule from a seed: who asks for what and when, when clients leave, and what fails when for how long.

Pure: the same seed and size give the same schedule. What then happens also depends on the machine's timing.
"""

import random
from dataclasses import dataclass, replace
from typing import Any, Literal

from tests.simulation.oracle import Prices

EVEN, ODD = "smollm2-135m", "odd-prices"
PRICES = {
    EVEN: Prices(prompt=20_000_000, cached=10_000_000, completion=40_000_000),
    ODD: Prices(prompt=333_333_333, cached=111_111_111, completion=777_777_777),
}

Failure = Literal[
    "engine_killed", "engine_frozen", "valkey_killed", "valkey_frozen", "postgres_killed", "postgres_frozen",
    "worker_killed", "gateway_killed",
]  # fmt: skip
LANES: dict[str, tuple[Failure, ...]] = {
    "engine": ("engine_killed", "engine_killed", "engine_frozen"),
    "valkey": ("valkey_killed", "valkey_frozen"),
    "postgres": ("postgres_killed", "postgres_frozen"),
    "worker": ("worker_killed",),
    "gateway": ("gateway_killed",),
}
"""Failures of one lane come one after another, those of different lanes as it happens."""


@dataclass(frozen=True, slots=True)
class Size:
    """How long requests come, how many a second, and how often each lane fails."""

    seconds: float
    rate: float
    failures: dict[str, int]
    workers: int
    engines: int


SHORT = Size(
    seconds=8.0, rate=45.0, failures={"engine": 2, "valkey": 1, "postgres": 1, "worker": 1, "gateway": 1}, workers=2,
    engines=2,
)  # fmt: skip
LONG = Size(
    seconds=40.0, rate=60.0, failures={"engine": 6, "valkey": 3, "postgres": 3, "worker": 3, "gateway": 2}, workers=3,
    engines=3,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Wallet:
    """An account as it begins."""

    name: str
    balance_nano: int
    limits: dict[str, int] | None = None
    budget_nano: int | None = None

    @property
    def may_run_dry(self) -> bool:
        return self.balance_nano < RICH_NANO or self.budget_nano is not None


RICH_NANO = 10**12
WALLETS = (
    Wallet("rich", RICH_NANO),
    Wallet("rich too", RICH_NANO),
    Wallet("small", 9_000_000),
    Wallet("poor", 2_000_000),
    Wallet("penniless", 0),
    Wallet("budgeted", RICH_NANO, budget_nano=3_000_000),
    Wallet("limited", RICH_NANO, limits={"requests_minute": 25, "concurrency": 4}),
    Wallet("limited in tokens", RICH_NANO, limits={"tokens_minute": 20_000}),
)


@dataclass(frozen=True, slots=True)
class Asked:
    """One request: when, whose, what, and when its client leaves. `repeats`: of a keyed one, also after its answer came."""

    at_s: float
    wallet: int
    model: str
    words: int
    body: dict[str, Any]
    leaves_after: int | None = None
    leaves_s: float | None = None
    is_keyed: bool = False
    repeats: int = 0


@dataclass(frozen=True, slots=True)
class Fails:
    """One failure; `target` is which engine or worker, modulo how many there are."""

    at_s: float
    kind: Failure
    for_s: float
    target: int


@dataclass(frozen=True, slots=True)
class Plan:
    seed: int
    size: Size
    asked: tuple[Asked, ...]
    lanes: dict[str, tuple[Fails, ...]]

    def told(self) -> str:
        """The schedule for people; requests as counts, since the seed gives them again."""
        fails = sorted((each for lane in self.lanes.values() for each in lane), key=lambda each: each.at_s)
        lines = [f"  {each.at_s:6.2f} s  {each.kind} {each.target} for {each.for_s:.2f} s" for each in fails]
        keyed = sum(each.is_keyed for each in self.asked)
        leaving = sum(each.leaves_after is not None or each.leaves_s is not None for each in self.asked)
        head = (
            f"seed {self.seed}: {self.size.workers} workers, {self.size.engines} engines, {len(self.asked)} requests"
            f" in {self.size.seconds:g} s, {keyed} keyed, {leaving} leaving"
        )
        return "\n".join((head, *lines))


def draw(seed: int, size: Size) -> Plan:
    """The schedule of a seed."""
    rng = random.Random(seed)
    size = replace(size, workers=rng.choice((2, size.workers)), engines=rng.choice((2, size.engines)))
    asked, at_s = [], 0.0
    while (at_s := at_s + rng.expovariate(size.rate)) < size.seconds:
        asked.append(_asked(rng, at_s))
    lanes = {lane: _failures(rng, kinds, size.failures[lane], size.seconds) for lane, kinds in LANES.items()}
    return Plan(seed, size, tuple(asked), lanes)


def _asked(rng: random.Random, at_s: float) -> Asked:
    body: dict[str, Any] = {"stream": rng.random() < 0.6}
    limit = rng.choice((None, rng.randint(1, 4), rng.randint(8, 40), rng.randint(8, 40)))
    if limit is not None:
        body["max_tokens"] = limit
        body["ignore_eos"] = rng.random() < 0.7
    if rng.random() < 0.15:
        body["n"] = 2
    leaves_after = leaves_s = None
    way_out = rng.random()
    if way_out < 0.15 and body["stream"]:
        leaves_after = rng.randint(1, limit or 16)
    elif way_out < 0.25:
        leaves_s = rng.uniform(0.0, 0.4)
    is_keyed = rng.random() < 0.12
    return Asked(
        at_s, rng.randrange(len(WALLETS)), rng.choice((EVEN, ODD)), rng.choice((1, 20, rng.randint(1, 200))), body,
        leaves_after, leaves_s, is_keyed, rng.randint(0, 1) if is_keyed else 0,
    )  # fmt: skip


def _failures(
    rng: random.Random, kinds: tuple[Failure, ...], count: int, seconds: float
) -> tuple[Fails, ...]:
    """Not in the first second, so that there is something to break."""
    found = [
        Fails(rng.uniform(1.0, seconds), rng.choice(kinds), rng.uniform(0.2, 2.5), rng.randrange(8))
        for _ in range(count)
    ]
    return tuple(sorted(found, key=lambda each: each.at_s))
