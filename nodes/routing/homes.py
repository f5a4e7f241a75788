"""Where a prompt goes that no engine is known to hold: by a hash that every worker computes alike, so that all agree on its
first engine without talking (rendezvous hashing).

Large pools have a ring of their engines' marks, and the rendezvous is held among those that follow the prompt's place in
it: so it costs the same in any pool, and an engine that comes or goes moves few prompts. Where the first home has more than
its share, the second takes it.
"""

from bisect import bisect_left
from collections.abc import Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from nodes.routing.snapshot import Engine

WINDOW: Final = 8
"""Engines that meet for one prompt."""

_SPREAD: Final = 0x278DDE6D
_MASK: Final = 0x3FFFFFFF
"""Marks have 30 bits, of which products are small integers yet."""


def mark_of(key: str) -> int:
    """An engine's place in rings: the same in every worker."""
    return int.from_bytes(blake2b(key.encode(), digest_size=4).digest(), "big") & _MASK


class Ring:
    """The engines of a group by their marks."""

    __slots__ = ("_engines", "_marks")

    def __init__(self, engines: "Sequence[Engine]") -> None:
        self._engines = sorted(engines, key=lambda engine: (engine.mark, engine.key))
        self._marks: list[int] = [engine.mark for engine in self._engines]

    def homes(self, value: int) -> "tuple[Engine, ...]":
        """The engines for a prompt that hashes to `value`, the first one first."""
        engines, marks = self._engines, self._marks
        value = (value & _MASK) * _SPREAD & _MASK
        count = len(engines)
        start, end = 0, count
        if count > WINDOW:
            start = bisect_left(marks, value)
            if start + WINDOW > count:  # its end and then its beginning
                start -= count
            end = start + WINDOW
        first = second = -1
        least = less = _MASK + 1
        for place in range(start, end):
            rank = (marks[place] ^ value) * _SPREAD & _MASK
            if rank < least:
                first, second, least, less = place, first, rank, least
            elif rank < less:
                second, less = place, rank
        return (engines[first],) if count == 1 else (engines[first], engines[second])
