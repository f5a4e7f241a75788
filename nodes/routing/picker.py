"""A few engines of a group at random, and the least loaded of them.

Sampling keeps the cost the same for 10 and for 10,000 engines, and keeps workers that act on load 200 ms old from all
running to the same engine. What is found unfit is taken out of its group, so it is met once.
"""

import random
from collections.abc import Collection, Sequence
from typing import Final

from nodes.routing.snapshot import Engine, Group

INFINITE: Final = float("inf")

MISSES_MAX = 8
"""Unfit engines that one choice meets before it looks through all of their group at once."""


def least_of_a_few(
    fit: Sequence[Engine], count: int, sample: int, turns_max: int, rng: random.Random
) -> Engine | None:
    """The usual case: the least loaded of `sample` draws among the first `count`. None where one drawn is unfit.

    One that is drawn twice is looked at twice, which takes less than to see that it was; equal ones are in random order.
    """
    draw = rng.random
    best, least = None, INFINITE
    for _ in range(sample):
        engine = fit[int(draw() * count)]
        load, breaker = engine.load, engine.breaker
        if (
            breaker.is_open
            or load.turns >= turns_max
            or load.turns >= load.cap
            or (breaker.is_trial and breaker.has_trial)
        ):
            return None
        tokens = load.in_tokens
        if tokens < least:
            best, least = engine, tokens
    return best


def sampled(
    group: Group, start: int, end: int, tried: Collection[Engine], sample: int, turns_max: int, rng: random.Random
) -> list[Engine]:  # fmt: skip
    """`sample` of the engines in `group.fit[start:end]` that are fit and untried, or all where there are few.

    Unfit ones are taken out of the group as they are met.
    """
    fit, draw = group.fit, rng.random
    few = sample + len(tried)
    found: list[Engine] = []
    misses = 0
    while (count := end - start) > few:
        place = start + int(draw() * count)
        engine = fit[place]
        load, breaker = engine.load, engine.breaker  # what `is_fit` asks, without two calls for each engine
        if (
            breaker.is_open
            or load.turns >= turns_max
            or load.turns >= load.cap
            or (breaker.is_trial and breaker.has_trial)
        ):
            if misses == MISSES_MAX:
                end = group.sweep(start, end, turns_max)
            else:
                group.take_out(place)
                end -= 1
                misses += 1
        elif engine not in found and engine not in tried:
            found.append(engine)
            if len(found) == sample:
                return found
    for engine in fit[start:end]:
        if not engine.is_fit(turns_max):
            misses += 1
        elif engine not in found and engine not in tried:
            found.append(engine)
    if misses:
        group.sweep(start, end, turns_max)
    return found


def pick(fit: Sequence[Engine], rng: random.Random) -> Engine:
    """The lowest load; equal ones in turn at random."""
    best, least, equal = fit[0], INFINITE, 0
    for engine in fit:
        load = engine.load.in_tokens
        if load < least:
            best, least, equal = engine, load, 1
        elif load == least:
            equal += (
                1  # the n-th of equal ones replaces the one before in one case of n: all have the same chance
            )
            if rng.random() * equal < 1:
                best = engine
    return best
