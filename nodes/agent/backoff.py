"""Pauses between attempts: doubling, bounded, with jitter, so that a pool of agents does not return in step.

Pure but for the random source, which is passed in. What is attempted is the caller's affair.
"""

import random


class Backoff:
    """`next_s()` gives the next pause: between half and all of first, 2 x first, 4 x first ... up to most."""

    def __init__(self, first_s: float, most_s: float, rng: random.Random | None = None) -> None:
        self._first_s = first_s
        self._most_s = most_s
        self._rng = rng or random.Random()  # noqa: S311 - spreads load, guards nothing
        self._attempts = 0

    def next_s(self) -> float:
        # The exponent is bounded too: a float overflows after a thousand attempts.
        ceiling = min(self._most_s, self._first_s * 2.0 ** min(self._attempts, 32))
        self._attempts += 1
        return ceiling * self._rng.uniform(0.5, 1.0)

    def reset(self) -> None:
        self._attempts = 0
