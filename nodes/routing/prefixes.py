"""Which engine holds which beginnings of prompts in its KV cache, as far as this worker sent them there.

A prompt is known by hashes of its beginnings at fixed lengths, each made from the one before. An engine is taken to keep as
many tokens as its KV cache has, the least recently used out first, which is what vLLM does; when it starts anew, everything
is forgotten. It is a guess that costs a microsecond: vLLM's own KV events name blocks by token ids, so using them would mean
to tokenise every prompt here, for milliseconds.
"""

from collections import deque
from typing import TYPE_CHECKING, Any, Final, cast
from zlib import crc32

from xxhash import xxh3_64_intdigest

from nodes.routing.recency import Line, Link

if TYPE_CHECKING:
    from nodes.routing.snapshot import Engine

BYTES_PER_TOKEN: Final = 4
"""Of a prompt as JSON: what most tokenizers make of most text."""

BLOCK_BYTES: Final = 1024
"""The shortest beginning that is worth knowing: 256 tokens. Shorter prompts are sent by load alone, unhashed: their prefill
takes an engine less than the choice may gain."""

HOLDERS_MAX: Final = 4
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


ENDS: Final = _ends()

TOKENS: Final = (0, *(end // BYTES_PER_TOKEN for end in ENDS))
"""How many tokens a prompt's first so many beginnings cover."""

COPIED_MAX: Final = 65536
"""Bytes between two beginnings up to which they are hashed as a copy, which is had sooner than a view."""


def beginnings(prompt: bytes, start: int, seed: int) -> list[int]:
    """Hashes of the beginnings of `prompt[start:]`. The same in every process; `seed` keeps accounts and models apart.

    Each is made of the bytes since the one before, with that for its seed. Two texts with one hash send a turn to an engine
    without its prefix, which is all that a forger could gain, on his own account's turns.
    """
    hashes: list[Any] = []  # objects, which integers would be made of and into anew at each step
    value: Any = seed
    hashed: Any = xxh3_64_intdigest
    room = len(prompt) - start
    before = start
    for end in ENDS:
        if end > room:
            break
        after = start + end
        if after - before <= COPIED_MAX:
            value = hashed(prompt[before:after], value)
        else:
            value = hashed(memoryview(prompt)[before:after], value)
        hashes.append(value)
        before = after
    return hashes


def sign_of(model: str) -> int:
    """What tells a model from others in seeds."""
    return crc32(model.encode())


def seed_of(sign: int, account: int) -> int:
    """Engines keep accounts' caches apart by salt, and those of models, of which each has a sign."""
    return sign ^ (account & 0xFFFFFFFF)


def _home_place(count: int) -> int:
    """Which of so many beginnings decides on a prompt's home: of the doublings the last one within its first half.

    So prompts that end in different questions have the same home, and those that only begin alike don't.
    """
    half = ENDS[count - 1] // 2
    return max(
        (place for place in range(count) if ENDS[place] <= half and ENDS[place].bit_count() == 1), default=0
    )


HOME_PLACES: Final = (0, *(_home_place(count) for count in range(1, len(ENDS) + 1)))
"""By the number of a prompt's beginnings."""


class Hold(Link):
    """A beginning in an engine's cache: its hash, and what it has more than the one before it, in tokens.

    `next`: the same beginning in another engine's, which had it later.
    """

    __slots__ = ("engine", "next", "tokens", "value")

    def __init__(self, engine: "Engine", value: Any, tokens: int) -> None:
        super().__init__()
        self.engine = engine
        self.value = value
        self.tokens = tokens
        self.next: Hold | None = None


class Home(Link):
    """Where prompts of one home went last, and in which life of that engine."""

    __slots__ = ("engine", "incarnation", "value")

    def __init__(self, value: Any, engine: "Engine") -> None:
        super().__init__()
        self.value = value
        self.engine = engine
        self.incarnation: int = engine.incarnation


def hold_of(engine: "Engine", hold: Hold | None) -> Hold | None:
    """That engine's, from `hold` on."""
    while hold is not None and hold.engine is not engine:
        hold = hold.next
    return hold


def holders_of(hold: Hold | None) -> "list[Engine]":
    """All that hold the same, from `hold` on."""
    found = []
    while hold is not None:
        found.append(hold.engine)
        hold = hold.next
    return found


class Held:
    """What one engine holds, the least recently used first."""

    __slots__ = ("line", "tokens", "tokens_max")

    def __init__(self) -> None:
        self.tokens_max: int = TOKENS_UNTOLD
        self.tokens: int = 0
        self.line = Line()

    @property
    def room(self) -> int:
        """Tokens that it could hold and has nothing for."""
        return self.tokens_max - self.tokens

    @property
    def entries(self) -> dict[int, int]:
        """Tokens by the beginning that they end."""
        found: dict[int, int] = {}
        link = self.line.oldest
        while link is not None:
            hold = cast("Hold", link)
            found[hold.value] = hold.tokens
            link = link.newer
        return found


class Trail:
    """A prompt's beginnings as an index has them now: the hash of each and its first holder. To be used at once."""

    __slots__ = ("depth", "hashes", "holds", "home", "home_place")

    def __init__(
        self, hashes: list[Any], holds: list[Hold | None], depth: int, home_place: int, home: Home | None
    ) -> None:
        self.hashes = hashes
        self.holds = holds
        # How many of them are held somewhere.
        self.depth = depth
        # Which of them decides on the home.
        self.home_place = home_place
        self.home = home

    @property
    def home_hash(self) -> Any:
        """The hash by which its home is known."""
        return self.hashes[self.home_place]

    @property
    def held(self) -> Hold | None:
        """The last one that is held."""
        return self.holds[self.depth - 1] if self.depth else None

    @property
    def is_cold(self) -> bool:
        """Nobody holds any of it, or had it before."""
        return not self.depth and self.last is None

    @property
    def tokens(self) -> int:
        """What they cover."""
        return TOKENS[len(self.hashes)]

    @property
    def tokens_held(self) -> int:
        """What those cover that are held."""
        return TOKENS[self.depth]

    @property
    def last(self) -> "Engine | None":
        """Where a prompt that begins so was sent last, unless that was started anew since. It may hold some of it yet."""
        home = self.home
        return home.engine if home is not None and home.engine.incarnation == home.incarnation else None


class Prefixes:
    """The index of one worker: at most `entries_max` beginnings over all engines."""

    def __init__(self, entries_max: int) -> None:
        self._entries_max = entries_max
        self._entries = 0
        self._known: dict[Any, Hold] = {}
        self._homes: dict[Any, Home] = {}
        self._homes_line = Line()
        # Whether other workers want the news.
        self.has_others = True
        # Newest last: prompts that went where not even the first half of them was held. For the other workers.
        self.news: deque[tuple[Engine, list[int], int]] = deque(maxlen=NEWS_MAX)

    def __len__(self) -> int:
        return self._entries

    @property
    def homes(self) -> int:
        """How many prompts it knows the last engine of."""
        return len(self._homes)

    def holders(self) -> "dict[int, list[Engine]]":
        """All that is held, and by whom."""
        return {value: holders_of(first) for value, first in self._known.items()}

    def trail(self, hashes: list[Any]) -> Trail:
        """What it knows of a prompt with these beginnings, one at least."""
        known = self._known
        holds: list[Hold | None] = []
        depth = 0
        value: Any
        for value in hashes:
            first = known.get(value)
            holds.append(first)
            if first is not None:
                depth = len(holds)
        home_place = HOME_PLACES[len(hashes)]
        return Trail(hashes, holds, depth, home_place, self._homes.get(hashes[home_place]))

    def note(self, engine: "Engine", hashes: list[int], tokens: int) -> None:
        """A prompt with these beginnings, of so many tokens, goes to that engine now."""
        self.follow(self.trail(hashes), engine, tokens)

    def learn(self, engine: "Engine", hashes: list[int], tokens: int) -> None:
        """One went to that engine, as another worker tells."""
        self._take(self.trail(hashes), engine, tokens)

    def follow(self, trail: Trail, engine: "Engine", tokens: int) -> None:
        """`note`, for who has the prompt's trail."""
        if self.has_others and hold_of(engine, trail.holds[trail.home_place]) is None:
            self.news.append((engine, trail.hashes, tokens))
        self._take(trail, engine, tokens)

    def _take(self, trail: Trail, engine: "Engine", tokens: int) -> None:
        """The longest is touched first: of one prompt's blocks vLLM too gives up the last ones first."""
        self._remember(trail, engine)
        held = engine.held
        line = held.line
        hashes, holds = trail.hashes, trail.holds
        place = len(hashes)
        upto = max(tokens, TOKENS[place])
        while place:
            place -= 1
            before = TOKENS[place]
            first = holds[place]
            hold = hold_of(engine, first)
            if hold is not None:
                line.touch(hold)
            else:
                self._add(Hold(engine, hashes[place], upto - before), first)
            upto = before
        while held.tokens > held.tokens_max or self._entries > self._entries_max:
            oldest = line.oldest
            if oldest is None:
                break
            self._drop(cast("Hold", oldest))

    def _remember(self, trail: Trail, engine: "Engine") -> None:
        line, home = self._homes_line, trail.home
        if home is not None:
            line.touch(home)
            home.engine, home.incarnation = engine, engine.incarnation
            return
        home = Home(trail.home_hash, engine)
        self._homes[home.value] = home
        line.add(home)
        if line.count > self._entries_max:
            oldest = cast("Home", line.oldest)
            line.remove(oldest)
            del self._homes[oldest.value]

    def _add(self, hold: Hold, first: Hold | None) -> None:
        """An engine holds something more, of which `first` is the first holder."""
        held = hold.engine.held
        held.line.add(hold)
        held.tokens += hold.tokens
        self._entries += 1
        if first is None:
            self._known[hold.value] = hold
            return
        last, count = first, 2
        while last.next is not None:
            last = last.next
            count += 1
        last.next = hold
        if count > HOLDERS_MAX:
            self._drop(first)

    def _drop(self, hold: Hold) -> None:
        """An engine holds something no more."""
        held, following = hold.engine.held, hold.next
        held.line.remove(hold)
        held.tokens -= hold.tokens
        self._entries -= 1
        before = self._known.get(hold.value)
        if before is not hold:
            while before is not None and before.next is not hold:
                before = before.next
            if before is not None:  # else another one has its place, as two of one prompt have the same hash
                before.next = following
        elif following is not None:
            self._known[hold.value] = following
        else:
            del self._known[hold.value]

    def forget(self, engine: "Engine") -> None:
        """It was started anew, or it left: its cache is gone."""
        line = engine.held.line
        while (oldest := line.oldest) is not None:
            self._drop(cast("Hold", oldest))
