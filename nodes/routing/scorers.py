"""What it would cost to send a turn to an engine, in tokens of work before its answer: the least gets it. Pure.

One unit for everything, so that a reader can tell what outweighs what: a token of prompt that is not in the engine's cache
counts one, a token in flight there `load_weight`, and hints are worth the tokens that they save.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from config.defaults import Settings

if TYPE_CHECKING:
    from nodes.routing.router import Need
    from nodes.routing.snapshot import Engine, Group

SESSION_TOKENS_MIN = 256
"""What going back to a session's engine is worth at least: its answers are in the cache there too, which are not counted."""

SHARE_SLACK: Final = 4.0
"""Turns above its share that an engine may have before affinity sends it no more: in small numbers shares mean nothing."""


@dataclass(frozen=True, slots=True)
class Policy:
    """How engines are weighed; each is a setting of the same name."""

    has_affinity: bool
    sample: int
    turns_max: int
    load_weight: float
    share_max: float
    region_tokens: int
    reputation_tokens: int

    @classmethod
    def of(cls, settings: Settings) -> "Policy":
        return cls(
            has_affinity=settings.routing_policy == "prefix",
            sample=settings.choice_sample,
            turns_max=settings.engine_turns_max,
            load_weight=settings.routing_load_weight,
            share_max=settings.routing_share_max,
            region_tokens=settings.routing_region_tokens,
            reputation_tokens=settings.routing_reputation_tokens,
        )


@dataclass(slots=True)
class Ties:
    """What draws a turn to some engines: tokens that each would spare it. `matched` are known to be in a KV cache, `hinted`
    are what homes and sessions are worth. `is_cold`: nothing of the prompt was anywhere before, as far as is known."""

    matched: "dict[Engine, int]"
    hinted: "dict[Engine, int]"
    is_cold: bool = False

    def of(self, engine: "Engine") -> int:
        """All that draws it there."""
        return self.matched.get(engine, 0) + self.hinted.get(engine, 0)


@dataclass(frozen=True, slots=True)
class Score:
    """The parts of one engine's cost in tokens, for whoever asks why."""

    load: float
    late_turns: float
    uncached: int
    region: int
    reputation: float

    @property
    def total(self) -> float:
        return self.load + self.late_turns + self.uncached + self.region + self.reputation


def score(
    engine: "Engine",
    group: "Group | None",
    need: "Need",
    drawn: int,
    policy: Policy,
    *,
    is_cold: bool = False,
) -> Score:
    """The whole cost, part by part; `drawn`: tokens that are spared there. Late turns count a token each: that evens out
    what is equal else; to a cold prompt those are added of others that are likely computed there yet."""
    region = need.wishes.region
    return Score(
        load=engine.load.in_tokens * policy.load_weight,
        late_turns=0.0
        if group is None
        else group.late_turns(engine) + (group.computing(engine) if is_cold else 0.0),
        uncached=need.tokens - drawn,
        region=policy.region_tokens if region and engine.region != region else 0,
        reputation=(1.0 - engine.reputation) * policy.reputation_tokens,
    )


def has_its_share(engine: "Engine", group: "Group", policy: Policy) -> bool:
    """It is at work, and got so many of the group's turns of late that nothing but its load may draw more to it. An idle
    engine may have all of them: somebody talks to it alone."""
    return engine.is_at_work and group.placed.get(engine, 0.0) > share_of(group, policy)


def share_of(group: "Group", policy: Policy) -> float:
    """The weight of placements that is an engine's share, and a few turns."""
    return policy.share_max * group.total / float(len(group.engines)) + SHARE_SLACK * group.unit
