"""Which engine holds which beginnings of prompts in its KV cache, as far as this worker sent them there.

A prompt is known by hashes of its beginnings at fixed lengths, each made from the one before. An engine is taken to keep as
many tokens as its KV cache has, the least recently used out first, which is what vLLM does; when it starts anew, everything
is forgotten. It is a guess that costs a microsecond: vLLM's own KV events name blocks by token ids, so using them would mean
to tokenise every prompt here, for milliseconds.
"""

from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from zlib import crc32

if TYPE_CHECKING:
    from nodes.routing.snapshot import Engine

BYTES_PER_TOKEN = 4
"""Of a prompt as JSON: what most tokenizers make of most text."""

BLOCK_BYTES = 1024
"""The shortest beginning that is worth knowing: 256 tokens. Shorter prompts are sent by load alone, unhashed: their prefill
takes an engine less than the choice may gain."""

HOLDERS_MAX = 4
"""Engines remembered for one beginning: one that more of them hold can be found on any."""

TOKENS_UNTOLD = 2**19
"""What an engine's KV cache is taken to hold if it does not tell: a common GPU's."""


NEWS_MAX = 1000
"""Of what a worker has to tell the others: more is forgotten, for a prefill each."""


def _ends() -> tuple[int, ...]:
    """1 KiB, 2 KiB, then two to each doubling, up to 16 MiB: long prompts have few beginnings, and a match is known
    to within a third of its length."""
    ends = [BLOCK_BYTES, 2 * BLOCK_BYTES]
    while ends[-1] < 2**24:
        ends += [ends[-1] * 3 // 2, ends[-1] * 2]
    return tuple(ends)


ENDS = _ends()


def beginnings(prompt: bytes, start: int, seed: int) -> list[int]:
    """Hashes of the beginnings of `prompt[start:]`. The same in every process; `seed` keeps accounts and models apart.

    CRC-32 is the fastest hash in the standard library that goes on from an earlier value without copies. Two texts with one
    hash send a turn to an engine without its prefix, which is all that a forger could gain, on his own account's turns.
    """
    view = memoryview(prompt)[start:]
    room = len(view)
    hashes: list[int] = []
    before, value = 0, seed
    for end in ENDS:
        if end > room:
            break
        value = crc32(view[before:end], value)
        hashes.append(value)
        before = end
    return hashes


def seed_of(model: str, account: int) -> int:
    """Engines keep accounts' caches apart by salt, and those of models."""
    return crc32(b"%d %b" % (account, model.encode()))


def tokens_of(depth: int) -> int:
    """How many tokens a prompt's first so many beginnings cover."""
    return ENDS[depth - 1] // BYTES_PER_TOKEN if depth else 0


def home_hash(hashes: Sequence[int]) -> int:
    """Which of a prompt's beginnings decides on its home: of the doublings the last one within its first half. So prompts
    that end in different questions have the same home, and those that only begin alike don't."""
    return hashes[HOME_PLACES[len(hashes)]]


def _home_place(count: int) -> int:
    """Which of so many beginnings that is."""
    half = ENDS[count - 1] // 2
    return max(
        (place for place in range(count) if ENDS[place] <= half and ENDS[place].bit_count() == 1), default=0
    )


HOME_PLACES = (0, *(_home_place(count) for count in range(1, len(ENDS) + 1)))


@dataclass(slots=True)
class Held:
    """What one engine holds: tokens by the beginning that they end, the least recently used first."""

    tokens_max: int = TOKENS_UNTOLD
    tokens: int = 0
    entries: "OrderedDict[int, int]" = field(default_factory=OrderedDict)

    @property
    def room(self) -> int:
        """Tokens that it could hold and has nothing for."""
        return self.tokens_max - self.tokens


class Prefixes:
    """The index of one worker: at most `entries_max` beginnings over all engines."""

    def __init__(self, entries_max: int) -> None:
        self._entries_max = entries_max
        self._entries = 0
        self._holders: dict[int, list[Engine]] = {}
        # By a prompt's `home_hash`, the oldest first: an engine, and which life of it.
        self._last: OrderedDict[int, tuple[Engine, int]] = OrderedDict()
        # Newest last: prompts that went where not even the first half of them was held. For the other workers.
        self.news: deque[tuple[Engine, Sequence[int], int]] = deque(maxlen=NEWS_MAX)

    def __len__(self) -> int:
        return self._entries

    def match(self, hashes: Sequence[int]) -> "tuple[int, Sequence[Engine]]":
        """How many of the beginnings are held somewhere, and by whom the last of these is."""
        holders = self._holders
        for depth in range(len(hashes), 0, -1):
            found = holders.get(hashes[depth - 1])
            if found is not None:
                return depth, found
        return 0, ()

    def last(self, hashes: Sequence[int]) -> "Engine | None":
        """Where a prompt that begins so was sent last, unless that was started anew since. It may hold some of it yet."""
        found = self._last.get(home_hash(hashes))
        return found[0] if found is not None and found[0].incarnation == found[1] else None

    def note(self, engine: "Engine", hashes: Sequence[int], tokens: int) -> None:
        """A prompt with these beginnings, of so many tokens, goes to that engine now."""
        if home_hash(hashes) not in engine.held.entries:
            self.news.append((engine, hashes, tokens))
        self.learn(engine, hashes, tokens)

    def learn(self, engine: "Engine", hashes: Sequence[int], tokens: int) -> None:
        """One went to that engine, from here or from another worker.

        The longest is touched first: of one prompt's blocks vLLM too gives up the last ones first.
        """
        self._remember(home_hash(hashes), engine)
        held = engine.held
        entries = held.entries
        last = len(hashes) - 1
        for place in range(last, -1, -1):
            value = hashes[place]
            if value in entries:
                entries.move_to_end(value)
            else:
                weight = (ENDS[place] - (ENDS[place - 1] if place else 0)) // BYTES_PER_TOKEN
                if place == last:
                    weight = max(weight, tokens - (ENDS[place - 1] // BYTES_PER_TOKEN if place else 0))
                self._add(engine, value, weight)
        while held.tokens > held.tokens_max or self._entries > self._entries_max:
            if not entries:
                break
            self._drop(engine, *entries.popitem(last=False))

    def _remember(self, home: int, engine: "Engine") -> None:
        self._last[home] = engine, engine.incarnation
        self._last.move_to_end(home)
        if len(self._last) > self._entries_max:
            self._last.popitem(last=False)

    def _add(self, engine: "Engine", value: int, weight: int) -> None:
        engine.held.entries[value] = weight
        engine.held.tokens += weight
        self._entries += 1
        holders = self._holders.get(value)
        if holders is None:
            self._holders[value] = [engine]
            return
        holders.append(engine)
        if len(holders) > HOLDERS_MAX:
            first = holders[0]
            self._drop(first, value, first.held.entries.pop(value))

    def _drop(self, engine: "Engine", value: int, weight: int) -> None:
        """It was taken out of the engine's entries."""
        engine.held.tokens -= weight
        self._entries -= 1
        holders = self._holders[value]
        holders.remove(engine)
        if not holders:
            del self._holders[value]

    def forget(self, engine: "Engine") -> None:
        """It was started anew, or it left: its cache is gone."""
        entries = engine.held.entries
        while entries:
            self._drop(engine, *entries.popitem())
