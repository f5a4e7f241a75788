"""Which engine is taken to hold which beginnings, for how long, and where a prompt goes that nobody holds."""

import subprocess
import sys
from collections import Counter, OrderedDict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nodes.routing.homes import WINDOW, Ring
from nodes.routing.prefixes import (
    BLOCK_BYTES,
    ENDS,
    HOLDERS_MAX,
    HOME_PLACES,
    NEWS_MAX,
    TOKENS,
    Prefixes,
    beginnings,
    holders_of,
    seed_of,
    sign_of,
)
from nodes.routing.snapshot import Engine
from tests.unit.test_router import engine

PROMPT = bytes(range(256)) * 64


def hashes_of(text: bytes, seed: int = 1) -> list[int]:
    return beginnings(text, 0, seed)


def home_hash(hashes: list[int]) -> int:
    return hashes[HOME_PLACES[len(hashes)]]


def match(prefixes: Prefixes, hashes: list[int]) -> tuple[int, list[Engine]]:
    """How many of the beginnings are held somewhere, and by whom the last of these is."""
    trail = prefixes.trail(hashes)
    return trail.depth, holders_of(trail.held)


def test_prompts_that_begin_alike_have_the_same_beginnings_up_to_where_they_differ():
    other = PROMPT[:5000] + b"!" + PROMPT[5001:]
    alike = sum(end <= 5000 for end in ENDS)
    first, second = hashes_of(PROMPT), hashes_of(other)
    assert first[:alike] == second[:alike]
    assert not set(first[alike:]) & set(second[alike:])


def test_where_a_prompt_stands_in_its_request_is_no_matter():
    assert beginnings(b"xyz" + PROMPT, 3, 1) == hashes_of(PROMPT)


@pytest.mark.parametrize("size", [0, 1023, 1024, 4095, 70_000, 1_000_000])
def test_a_beginnings_hash_is_made_of_every_byte_of_it_and_of_no_other(size):
    prompt = bytes(number * number % 251 for number in range(size + 20))
    for start in (0, 20):
        ends = [end for end in ENDS if start + end <= len(prompt)]
        hashes = beginnings(prompt, start, 7)
        assert len(hashes) == len(set(hashes)) == len(ends)
        for place, end in enumerate(ends):
            begin = ends[place - 1] if place else 0
            for at in (begin, (begin + end) // 2, end - 1):
                changed = bytearray(prompt)
                changed[start + at] ^= 1
                others = beginnings(bytes(changed), start, 7)
                assert others[:place] == hashes[:place]
                assert not set(others[place:]) & set(hashes)


def test_hashes_are_the_same_in_every_process():
    code = "from nodes.routing.prefixes import beginnings; print(beginnings(b'x' * 3000, 0, 7))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == str(beginnings(b"x" * 3000, 0, 7))


def test_accounts_and_models_share_no_beginning():
    seeds = {seed_of(sign_of(model), account) for model, account in [("m", 1), ("m", 2), ("n", 1)]}
    assert len(seeds) == 3
    assert len({hashes_of(PROMPT, seed)[0] for seed in seeds}) == 3


def test_what_is_shorter_than_a_block_has_no_beginning():
    assert hashes_of(PROMPT[: BLOCK_BYTES - 1]) == []
    assert len(hashes_of(PROMPT[:BLOCK_BYTES])) == 1


def test_the_longest_beginning_that_is_held_is_found_with_who_holds_it():
    prefixes, short, long = Prefixes(1000), engine("short"), engine("long")
    hashes = hashes_of(PROMPT)
    prefixes.note(short, hashes[:2], 600)
    prefixes.note(long, hashes[:4], 1100)
    assert match(prefixes, hashes) == (4, [long])
    assert match(prefixes, hashes[:2]) == (2, [short, long])
    assert match(prefixes, hashes_of(b"?" * 9000)) == (0, [])


def test_an_engine_holds_no_more_than_its_cache_and_gives_up_the_oldest_first():
    prefixes, one = Prefixes(1000), engine()
    one.held.tokens_max = 2 * TOKENS[3]
    prompts = [hashes_of(bytes([number]) * ENDS[2]) for number in range(3)]
    for hashes in prompts[:2]:
        prefixes.note(one, hashes, TOKENS[3])
    assert [match(prefixes, hashes)[0] for hashes in prompts] == [3, 3, 0]
    prefixes.note(one, prompts[0], TOKENS[3])  # used again: now the second is the oldest
    prefixes.note(one, prompts[2], TOKENS[3])
    assert [match(prefixes, hashes)[0] for hashes in prompts] == [3, 0, 3]
    assert one.held.tokens == one.held.tokens_max


def test_a_longer_prompt_than_the_cache_leaves_nothing_and_does_not_hang():
    prefixes, one = Prefixes(1000), engine()
    one.held.tokens_max = 10
    prefixes.note(one, hashes_of(PROMPT), 4096)
    assert (len(prefixes), one.held.tokens) == (0, 0)


def test_one_beginning_is_remembered_of_a_few_engines_only():
    prefixes, hashes = Prefixes(1000), hashes_of(PROMPT[:BLOCK_BYTES])
    engines = [engine(str(number)) for number in range(HOLDERS_MAX + 2)]
    for one in engines:
        prefixes.note(one, hashes, 256)
    assert match(prefixes, hashes) == (1, engines[2:])
    assert engines[0].held.tokens == 0


def test_an_engine_that_was_started_anew_holds_nothing():
    prefixes, one, other = Prefixes(1000), engine("1"), engine("2")
    hashes = hashes_of(PROMPT)
    prefixes.note(one, hashes, 4096)
    prefixes.note(other, hashes, 4096)
    prefixes.forget(one)
    assert match(prefixes, hashes) == (len(hashes), [other])
    assert (one.held.tokens, len(one.held.entries)) == (0, 0)


def test_news_is_what_went_where_not_even_its_first_half_was_held():
    prefixes, one, other = Prefixes(1000), engine("1"), engine("2")
    system, longer = hashes_of(PROMPT[:8000]), hashes_of(PROMPT[:8000] + b"?" * 8000)
    prefixes.note(one, system, 2000)
    prefixes.note(one, longer, 4000)  # as a conversation grows
    prefixes.note(other, system, 2000)
    assert list(prefixes.news) == [(one, system, 2000), (other, system, 2000)]
    prefixes.learn(one, hashes_of(b"?" * 9000), 2000)
    assert len(prefixes.news) == 2, "nobody tells what he was told"
    for number in range(NEWS_MAX + 5):
        prefixes.note(one, [number], 256)
    assert len(prefixes.news) == NEWS_MAX


STEPS = st.lists(
    st.tuples(st.sampled_from(["note", "forget"]), st.integers(0, 2), st.integers(0, 9)), max_size=60
)


@given(STEPS)
def test_whatever_happens_the_index_is_bounded_and_both_sides_agree(steps):
    prefixes, engines = Prefixes(12), [engine(str(number)) for number in range(3)]
    for one in engines:
        one.held.tokens_max = 2000
    for step, which, what in steps:
        one = engines[which]
        if step == "note":
            prefixes.note(one, hashes_of(bytes([what]) * (3000 + 700 * what)), 900 + 100 * what)
        else:
            prefixes.forget(one)
        held = [each.held for each in engines]
        assert len(prefixes) == sum(len(each.entries) for each in held) <= 12
        assert all(each.tokens == sum(each.entries.values()) <= each.tokens_max for each in held)
        pairs = {(value, each) for each in engines for value in each.held.entries}
        assert pairs == {(value, each) for value, row in prefixes.holders().items() for each in row}


class Plain:
    """The same index, a look-up at a time."""

    def __init__(self, entries_max: int) -> None:
        self.entries_max = entries_max
        self.held: dict[Engine, OrderedDict[int, int]] = {}
        self.holders: dict[int, list[Engine]] = {}
        self.last: OrderedDict[int, tuple[Engine, int]] = OrderedDict()
        self.news: list[tuple[Engine, list[int], int]] = []

    def note(self, one: Engine, hashes: list[int], tokens: int) -> None:
        if home_hash(hashes) not in self.held.get(one, ()):
            self.news.append((one, hashes, tokens))
        self.learn(one, hashes, tokens)

    def learn(self, one: Engine, hashes: list[int], tokens: int) -> None:
        home, entries = home_hash(hashes), self.held.setdefault(one, OrderedDict())
        self.last[home] = one, one.incarnation
        self.last.move_to_end(home)
        if len(self.last) > self.entries_max:
            self.last.popitem(last=False)
        for place in range(len(hashes) - 1, -1, -1):
            value = hashes[place]
            if value in entries:
                entries.move_to_end(value)
                continue
            upto = max(tokens, TOKENS[place + 1]) if place == len(hashes) - 1 else TOKENS[place + 1]
            entries[value] = upto - TOKENS[place]
            holders = self.holders.setdefault(value, [])
            holders.append(one)
            if len(holders) > HOLDERS_MAX:
                del self.held[holders.pop(0)][value]
        while entries and (
            sum(entries.values()) > one.held.tokens_max
            or sum(map(len, self.held.values())) > self.entries_max
        ):
            self.drop(one, next(iter(entries)))

    def drop(self, one: Engine, value: int) -> None:
        del self.held[one][value]
        self.holders[value].remove(one)
        if not self.holders[value]:
            del self.holders[value]

    def forget(self, one: Engine) -> None:
        for value in list(self.held.get(one, ())):
            self.drop(one, value)


CHAINS = st.integers(0, 99).flatmap(lambda seed: st.integers(1, 8).map(lambda size: chain(seed, size)))


def chain(seed: int, size: int) -> list[int]:
    """The beginnings of one of ten prompts, which begin alike by twos, up to a length."""
    return [place * 100 + (seed % 10 if place > 2 else seed % 5) for place in range(size)]


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["note", "note", "learn", "forget"]), st.integers(0, 6), CHAINS, st.integers(0, 9000)),
        max_size=80,
    ),
    st.integers(5, 40),
)  # fmt: skip
def test_the_index_is_as_one_that_is_plainly_written(steps, entries_max):
    engines = [engine(str(number)) for number in range(7)]
    for one in engines:
        one.held.tokens_max = 9000
    prefixes, plain = Prefixes(entries_max), Plain(entries_max)
    for step, which, hashes, tokens in steps:
        one = engines[which]
        for index in (prefixes, plain):
            if step == "forget":
                index.forget(one)
            else:
                getattr(index, step)(one, hashes, tokens)
        if step == "forget":
            one.incarnation += 1
        assert prefixes.holders() == plain.holders
        assert [list(each.held.entries.items()) for each in engines] == [
            list(plain.held.get(each, {}).items()) for each in engines
        ]
        assert [each.held.tokens for each in engines] == [sum(each.held.entries.values()) for each in engines]
        assert (list(prefixes.news), prefixes.homes) == (plain.news, len(plain.last))
        for seed in range(10):
            for size in range(1, 9):
                trail = prefixes.trail(chain(seed, size))
                last, life = plain.last.get(home_hash(chain(seed, size)), (None, 0))
                assert trail.last is (last if last is not None and last.incarnation == life else None)
                held = [value in plain.holders for value in chain(seed, size)]
                assert trail.depth == max((place + 1 for place in range(size) if held[place]), default=0)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.lists(st.integers(1, 3), min_size=1, max_size=6)), max_size=40)
)
def test_a_prompt_two_beginnings_of_which_have_one_hash_does_no_harm(steps):
    prefixes, engines = Prefixes(9), [engine(str(number)) for number in range(3)]
    for which, hashes in steps:
        prefixes.note(engines[which], hashes, 700)
        assert len(prefixes) == sum(each.held.line.count for each in engines) <= 9
    for one in engines:
        prefixes.forget(one)
    assert (len(prefixes), prefixes.holders()) == (0, {})


# --- homes ------------------------------------------------------------------------------------------------------


def ring(count: int) -> tuple[Ring, list[Engine]]:
    engines = [engine(f"node-{number}/e0") for number in range(count)]
    return Ring(engines), engines


def test_every_worker_computes_the_same_homes():
    (one, engines), other = ring(20), Ring([engine(f"node-{number}/e0") for number in reversed(range(20))])
    for value in range(100):
        assert [home.key for home in one.homes(value)] == [home.key for home in other.homes(value)]
    assert one.homes(1)[0] in engines


def test_homes_are_spread_over_pools_of_any_size():
    for count in (2, 4, WINDOW, WINDOW + 1, 50):
        of, engines = ring(count)
        found = Counter(of.homes(value)[0] for value in range(400 * count))
        assert len(found) == count
        assert max(found.values()) < 3 * 400, engines
    assert len({home for value in range(50) for home in ring(4)[0].homes(value)}) > 4


def test_an_engine_that_leaves_moves_only_prompts_near_it():
    of, engines = ring(50)
    smaller = Ring(engines[1:])
    moved = sum(of.homes(value)[0] is not smaller.homes(value)[0] for value in range(2000))
    assert moved < 2000 * 0.08


def test_a_single_engine_is_the_only_home():
    of, engines = ring(1)
    assert of.homes(7) == (engines[0],)


def test_prompts_with_different_endings_have_one_home_and_those_that_only_begin_alike_have_others():
    system = bytes(range(100, 200)) * 50  # 5,000 bytes, as a system prompt of 1,200 tokens
    values = {
        home_hash(hashes_of(system + b"question %d" % number + b"." * 20 * number)) for number in range(100)
    }
    assert len(values) == 1
    begin = b"You are helpful." * 64  # 1 KiB in common, then 8 KiB of a document
    values = {home_hash(hashes_of(begin + bytes([number]) * 8000)) for number in range(100)}
    assert len(values) == 100
    assert all(
        ENDS[HOME_PLACES[count]] <= max(BLOCK_BYTES, ENDS[count - 1] // 2) for count in range(1, len(ENDS))
    )
