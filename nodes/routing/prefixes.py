"""Which engine holds which beginnings of prompts in its KV cache, as far as this worker sent them there.

A prompt is known by hashes of its beginnings at fixed lengths, each made from the one before. An engine is taken to keep as
many tokens as its KV cache has, the least recently used out first, which is what vLLM does; when it starts anew, everything
is forgotten. It is a guess that costs a microsecond: vLLM's own KV events name blocks by token ids, so using them would mean
to tokenise every prompt here, for milliseconds.
"""

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, cast
from zlib import crc32

from xxhash import xxh3_64_intdigest

from nodes.routing.lines import Line, Link

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


HOME_PLACES: Final = (0, *(_home_place(count) for count in range(1, len(ENDS) + 1)))


class Beginning(Link):
    """One that some engine holds, or that was a home of late, in the order of which these stand in line."""

    __slots__ = ("engine", "first", "incarnation", "is_known", "value")

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value
        self.is_known = False
        # Who holds it, the first one first.
        self.first: Hold | None = None
        # As a home: where it was sent last, and which life of that engine.
        self.engine: Engine | None = None
        self.incarnation = 0

    def hold_of(self, engine: "Engine") -> "Hold | None":
        """That engine's, if it holds it."""
        hold = self.first
        while hold is not None and hold.engine is not engine:
            hold = hold.next
        return hold

    def holders(self) -> "list[Engine]":
        """Those that hold it, the first one first."""
        found = []
        hold = self.first
        while hold is not None:
            found.append(hold.engine)
            hold = hold.next
        return found


class Hold(Link):
    """A beginning in an engine's cache, and what it has more than the one before it, in tokens."""

    __slots__ = ("beginning", "engine", "next", "tokens")

    def __init__(self, engine: "Engine", beginning: Beginning, tokens: int) -> None:
        super().__init__()
        self.engine = engine
        self.beginning = beginning
        self.tokens = tokens
        self.next: Hold | None = None


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
            found[hold.beginning.value] = hold.tokens
            link = link.newer
        return found


class Trail:
    """A prompt's beginnings as an index has them now, those too that it does not know. To be used at once."""

    __slots__ = ("beginnings", "depth", "home")

    def __init__(self, beginnings: list[Beginning], depth: int) -> None:
        self.beginnings = beginnings
        self.home = beginnings[HOME_PLACES[len(beginnings)]]
        # How many of them are held somewhere.
        self.depth = depth

    @property
    def held(self) -> Beginning | None:
        """The last one that is held."""
        return self.beginnings[self.depth - 1] if self.depth else None

    @property
    def is_cold(self) -> bool:
        """Nobody holds any of it, or had it before."""
        return not self.depth and self.last is None

    @property
    def tokens(self) -> int:
        """What they cover."""
        return TOKENS[len(self.beginnings)]

    @property
    def tokens_held(self) -> int:
        """What those cover that are held."""
        return TOKENS[self.depth]

    @property
    def last(self) -> "Engine | None":
        """Where a prompt that begins so was sent last, unless that was started anew since. It may hold some of it yet."""
        home = self.home
        engine = home.engine
        return engine if engine is not None and engine.incarnation == home.incarnation else None


class Prefixes:
    """The index of one worker: at most `entries_max` beginnings over all engines."""

    def __init__(self, entries_max: int) -> None:
        self._entries_max = entries_max
        self._entries = 0
        self._known: dict[Any, Beginning] = {}
        self._homes = Line()
        # Whether other workers want the news.
        self.has_others = True
        # Newest last: prompts that went where not even the first half of them was held. For the other workers.
        self.news: deque[tuple[Engine, list[int], int]] = deque(maxlen=NEWS_MAX)

    def __len__(self) -> int:
        return self._entries

    @property
    def homes(self) -> int:
        """How many prompts it knows the last engine of."""
        return self._homes.count

    def holders(self) -> "dict[int, list[Engine]]":
        """All that is held, and by whom."""
        return {value: one.holders() for value, one in self._known.items() if one.first is not None}

    def trail(self, hashes: list[Any]) -> Trail:
        """What it knows of a prompt with these beginnings, one at least."""
        known = self._known
        found: list[Beginning] = []
        depth = 0
        value: Any
        for value in hashes:
            beginning = known.get(value)
            if beginning is None:
                beginning = Beginning(value)
            found.append(beginning)
            if beginning.first is not None:
                depth = len(found)
        return Trail(found, depth)

    def match(self, hashes: list[int]) -> "tuple[int, Sequence[Engine]]":
        """How many of the beginnings are held somewhere, and by whom the last of these is."""
        trail = self.trail(hashes)
        held = trail.held
        return (0, ()) if held is None else (trail.depth, held.holders())

    def note(self, engine: "Engine", hashes: list[int], tokens: int) -> None:
        """A prompt with these beginnings, of so many tokens, goes to that engine now."""
        self.follow(self.trail(hashes), engine, hashes, tokens)

    def learn(self, engine: "Engine", hashes: list[int], tokens: int) -> None:
        """One went to that engine, as another worker tells."""
        self._take(self.trail(hashes), engine, tokens)

    def follow(self, trail: Trail, engine: "Engine", hashes: list[Any], tokens: int) -> None:
        """`note`, for who has the prompt's trail."""
        if self.has_others and trail.home.hold_of(engine) is None:
            self.news.append((engine, hashes, tokens))
        self._take(trail, engine, tokens)

    def _take(self, trail: Trail, engine: "Engine", tokens: int) -> None:
        """The longest is touched first: of one prompt's blocks vLLM too gives up the last ones first."""
        self._remember(trail.home, engine)
        held = engine.held
        line = held.line
        found = trail.beginnings
        place = len(found)
        upto = max(tokens, TOKENS[place])
        while place:
            place -= 1
            beginning = found[place]
            hold = beginning.hold_of(engine)
            before = TOKENS[place]
            if hold is not None:
                line.touch(hold)
            else:
                self._add(engine, beginning, upto - before)
            upto = before
        while held.tokens > held.tokens_max or self._entries > self._entries_max:
            oldest = line.oldest
            if oldest is None:
                break
            self._drop(cast("Hold", oldest))

    def _remember(self, home: Beginning, engine: "Engine") -> None:
        homes = self._homes
        if home.engine is not None:
            homes.touch(home)
        else:
            homes.add(home)
            self._know(home)
        home.engine, home.incarnation = engine, engine.incarnation
        if homes.count > self._entries_max:
            oldest = cast("Beginning", homes.oldest)
            homes.remove(oldest)
            oldest.engine = None
            self._forget(oldest)

    def _add(self, engine: "Engine", beginning: Beginning, tokens: int) -> None:
        hold = Hold(engine, beginning, tokens)
        held = engine.held
        held.line.add(hold)
        held.tokens += tokens
        self._entries += 1
        self._know(beginning)
        before = beginning.first
        if before is None:
            beginning.first = hold
            return
        count = 2
        while before.next is not None:
            before = before.next
            count += 1
        before.next = hold
        if count > HOLDERS_MAX and beginning.first is not None:
            self._drop(beginning.first)

    def _drop(self, hold: Hold) -> None:
        """An engine holds something no more."""
        held, beginning = hold.engine.held, hold.beginning
        held.line.remove(hold)
        held.tokens -= hold.tokens
        self._entries -= 1
        before = beginning.first
        if before is hold:
            beginning.first = hold.next
        else:
            while before is not None and before.next is not hold:
                before = before.next
            if before is not None:
                before.next = hold.next
        self._forget(beginning)

    def _know(self, beginning: Beginning) -> None:
        if not beginning.is_known:
            beginning.is_known = True
            self._known[beginning.value] = beginning

    def _forget(self, beginning: Beginning) -> None:
        """Unless it is held, or a home. Another one may have its place, where two of one prompt have the same hash."""
        if beginning.first is None and beginning.engine is None:
            beginning.is_known = False
            if self._known.get(beginning.value) is beginning:
                del self._known[beginning.value]

    def forget(self, engine: "Engine") -> None:
        """It was started anew, or it left: its cache is gone."""
        line = engine.held.line
        while (oldest := line.oldest) is not None:
            self._drop(cast("Hold", oldest))
