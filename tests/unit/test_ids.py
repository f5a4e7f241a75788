"""UUIDv7 as RFC 9562 lays it out, and in order."""

import threading
import time
import uuid

import pytest

from config import ids
from config.ids import uuid7


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
    monkeypatch.setattr(ids, "_counter", (1 << 42) - 1)
    monkeypatch.setattr(ids.time, "time_ns", lambda: 1)
    after = uuid7()
    assert after > before
    assert after.int >> 80 == (before.int >> 80) + 1


def test_threads_never_make_the_same():
    made: list[uuid.UUID] = []
    threads = [threading.Thread(target=lambda: made.extend(uuid7() for _ in range(2000))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(made)) == 8000
