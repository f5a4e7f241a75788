"""Rounds in which arms alternate, each in an order of its own; one before them warms up and is not counted."""

import random
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")
SEED = 3
_BEGAN_S = time.monotonic()


def rounds_of(arms: Sequence[T], rounds: int, *, seed: int = SEED) -> Iterator[tuple[int, list[T]]]:
    """(number, the arms shuffled) for each round; number 0 is the warming up. In a fixed order what follows the heaviest
    arm would always seem dearer."""
    order, rng = list(arms), random.Random(seed)
    for number in range(rounds + 1):
        tell(f"round {number} of {rounds}" if number else "warming up")
        rng.shuffle(order)
        yield number, list(order)


def tell(words: str) -> None:
    """A line of progress for whoever waits."""
    print(f"{time.monotonic() - _BEGAN_S:7.1f} s  {words}", file=sys.stderr, flush=True)
