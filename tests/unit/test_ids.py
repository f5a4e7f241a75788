"""UUIDv7 as RFC 9562 lays it out, and in order."""

import copy
import pickle
import subprocess
import sys
import threading
import time
import uuid

import orjson
import pytest

from config import ids
from config.ids import hex7, uuid7


def test_version_and_variant_are_those_of_the_rfc():
    made = uuid7()
    assert made.version == 7
    assert made.variant == uuid.RFC_4122


def test_the_first_48_bits_are_the_unix_milliseconds():
    before, made, after = time.time_ns() // 10**6, uuid7(), time.time_ns() // 10**6
    assert before <= made.int >> 80 <= after + 1


def test_each_is_greater_than_the_one_before():
    made = [uuid7() for _ in range(10_000)]
    assert made == sorted(made)
    assert len(set(made)) == len(made)


def test_a_clock_that_goes_back_does_not_break_the_order(monkeypatch: pytest.MonkeyPatch):
    before = uuid7()
    monkeypatch.setattr(ids.time, "time_ns", lambda: 1)
    assert uuid7() > before


def test_a_counter_that_overflows_goes_on_in_the_next_millisecond(monkeypatch: pytest.MonkeyPatch):
    before = uuid7()
    ids._ids._stem, ids._ids._count = ids._ids._stem[:16] + "bfffff", 254
    monkeypatch.setattr(ids.time, "time_ns", lambda: 1)
    last, after = uuid7(), uuid7()
    assert before < last < after
    assert last.int >> 32 & (1 << 30) - 1 == (1 << 30) - 1
    assert last.int >> 64 == before.int >> 64
    assert after.int >> 80 == (before.int >> 80) + 1
    assert (last.version, last.variant, after.version) == (7, uuid.RFC_4122, 7)


def test_a_counter_carries(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ids.time, "time_ns", lambda: 0)
    stem = uuid7().hex[:16]
    for low, next_low in (("8000000f", "80000010"), ("800000ff", "80000100"), ("9fffffff", "a0000000")):
        ids._ids._stem, ids._ids._count = stem + low[:6], int(low[6:], 16)
        assert uuid7().hex[:24] == stem + next_low


def test_bits_that_shall_be_random_are():
    made = [uuid7().int for _ in range(2000)]
    for bit in range(32):
        assert 800 < sum(one >> bit & 1 for one in made) < 1200
    seeds = [made_at(ms) for ms in range(2000)]
    for bit in [*range(32, 32 + 29), *range(64, 64 + 11)]:
        assert 800 < sum(one >> bit & 1 for one in seeds) < 1200
    assert not any(one >> 75 & 1 or one >> 61 & 1 for one in seeds), "room to count"


def made_at(ms: int) -> int:
    """The first id of a millisecond in the far future, which then is no more."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_last_ms", "_count", "_stem"):
            patch.setattr(ids._ids, name, getattr(ids._ids, name))
        patch.setattr(ids.time, "time_ns", lambda: (2**43 + ms) * 10**6)
        return uuid7().int


def test_an_id_is_like_one_that_was_made_in_the_ordinary_way():
    made = uuid7()
    same = uuid.UUID(made.hex)
    assert (made, hash(made), str(made), made.is_safe) == (same, hash(same), str(same), same.is_safe)
    assert pickle.loads(pickle.dumps(made)) == copy.deepcopy(made) == made
    assert orjson.dumps(made) == orjson.dumps(same)


FORKS = """
import os
from config.ids import hex7, uuid7
uuid7(), hex7()
child = os.fork()
drawn = [made[-8:] for _ in range(8) for made in (uuid7().hex, hex7())]
if child:
    os.waitpid(child, 0)
print(*drawn, flush=True)
"""


def test_a_child_that_was_forked_draws_other_bits_than_its_parent():
    told = subprocess.run([sys.executable, "-c", FORKS], capture_output=True, text=True, check=True)
    theirs, ours = told.stdout.splitlines()
    assert not set(theirs.split()) & set(ours.split())


def test_threads_never_make_the_same():
    made: list[uuid.UUID] = []
    threads = [threading.Thread(target=lambda: made.extend(uuid7() for _ in range(2000))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(made)) == 8000


def test_digits_are_those_of_a_uuid_in_the_same_order():
    made = [hex7() for _ in range(1000)]
    assert made == sorted(set(made))
    assert [uuid.UUID(digits).hex for digits in made] == made
    assert {(uuid.UUID(digits).version, uuid.UUID(digits).variant) for digits in made} == {(7, uuid.RFC_4122)}
