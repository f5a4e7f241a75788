"""`choose`: one engine for one turn. Filters drop those that can't, scores rank a few sampled ones, ties fall at random.

Sampling keeps the cost the same for 10 and for 10,000 engines, and keeps workers that act on load 200 ms old from all
running to the same engine.
"""

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from nodes.routing.snapshot import Engine, Snapshot


class NoEngine(Exception):
    """No engine can take the turn now. `is_known`: some engine serves the model, but none is fit or untried."""

    def __init__(self, model: str, *, is_known: bool) -> None:
        self.model = model
        self.is_known = is_known
        super().__init__(f"no engine for {model}")


@dataclass(frozen=True, slots=True)
class Need:
    """What a turn asks of an engine. `tokens` is its size as load, `context` about how many it needs room for;
    `tried` engines are not asked again."""

    model: str
    kind: str
    tokens: int
    account_id: int | None = None
    tried: Collection[Engine] = ()
    context: int = 0


@dataclass(frozen=True, slots=True)
class Choice:
    """The engine, and how many served the model at all."""

    engine: Engine
    candidates: int


def choose(snapshot: Snapshot, need: Need, *, sample: int, turns_max: int, rng: random.Random) -> Choice:
    """The least loaded of `sample` fit engines, those with enough context before others. Raises NoEngine."""
    candidates = snapshot.by_model.get(need.model, ())
    count = len(candidates)
    sampled = candidates if count <= sample else rng.sample(candidates, sample)
    fit = [engine for engine in sampled if is_fit(engine, need, turns_max)]
    roomy = [engine for engine in fit if is_roomy(engine, need)]
    if not roomy and count > sample:  # many are down, tried or small: look at all before giving up
        fit = [engine for engine in candidates if is_fit(engine, need, turns_max)]
        roomy = [engine for engine in fit if is_roomy(engine, need)]
    if not fit:
        raise NoEngine(need.model, is_known=count > 0)
    return Choice(pick(roomy or fit, rng), count)


def is_roomy(engine: Engine, need: Need) -> bool:
    """The estimate may be wrong, so it only orders: an engine that is too small says so itself, exactly."""
    return (
        engine.models[need.model].context_length == 0
        or engine.models[need.model].context_length >= need.context
    )


def is_fit(engine: Engine, need: Need, turns_max: int) -> bool:
    """Breaker closed, room for a turn, right kind of model, not tried yet, and the pinned provider's if one is pinned."""
    return (
        engine.breaker.admits
        and engine.load.turns < turns_max
        and engine.models[need.model].kind == need.kind
        and engine not in need.tried
        and (need.account_id is None or engine.account_id == need.account_id)
    )


def pick(fit: Sequence[Engine], rng: random.Random) -> Engine:
    """The lowest load; equal ones in turn at random."""
    if len(fit) == 1:
        return fit[0]
    return min(fit, key=lambda engine: (engine.load.in_tokens, rng.random()))
