"""Rate limits' pure parts: what limits are, how they are told, and a process's own counting."""

import pytest

from billing.limits.headers import View, duration, headers_of
from billing.limits.local import Rolling, Share
from billing.limits.rules import (
    BadLimits,
    LimitExceeded,
    Limits,
    Subject,
    as_json,
    limits_of,
    plan_of,
    refusal_message,
    rounded_up,
)
from billing.limits.standing import Standing
from config.defaults import Settings
from tests.fakes.clock import FakeClock
from tests.fakes.limits import alone


@pytest.mark.parametrize("stored", [None, {}, "{}"])
def test_without_entries_nothing_is_limited(stored: object) -> None:
    assert not limits_of(stored).is_any  # type: ignore[arg-type]


def test_limits_are_read_from_their_json_and_written_back() -> None:
    limits = limits_of('{"requests_minute": 60, "concurrency": 3}')
    assert limits == Limits(requests_minute=60, concurrency=3)
    assert as_json(limits) == {"requests_minute": 60, "concurrency": 3}


@pytest.mark.parametrize(
    ("stored", "said"),
    [
        ({"requests_hour": 5}, "there is no limit 'requests_hour'"),
        ({"requests_minute": 0}, "requests_minute is a whole number from 1"),
        ({"requests_minute": True}, "requests_minute is a whole number"),
        ({"tokens_day": 1.5}, "tokens_day is a whole number"),
        ({"concurrency": 1_000_001}, "from 1 to 1000000"),
        ("[]", "limits are an object"),
    ],
)
def test_what_is_no_limit_is_refused_by_name(stored: object, said: str) -> None:
    if stored == "[]":
        stored = "[1]"
    with pytest.raises(BadLimits, match=said):
        limits_of(stored)  # type: ignore[arg-type]


def test_an_accounts_own_limit_wins_over_its_tiers_field_by_field() -> None:
    own, tier = Limits(requests_minute=5), Limits(requests_minute=60, concurrency=2)
    assert own.over(tier) == Limits(requests_minute=5, concurrency=2)


def test_a_subject_is_known_by_kind_and_id() -> None:
    assert Subject("key", 7, Limits()).name == "key:7"


@pytest.mark.parametrize(
    ("limits", "is_exact"),
    [
        (Limits(requests_minute=600), True),
        (Limits(requests_minute=601), False),
        (Limits(requests_minute=100_000, requests_day=100), True),
        (Limits(requests_minute=100_000, concurrency=10), True),
        (Limits(tokens_minute=5), False),
    ],
)
def test_one_low_limit_makes_a_subject_exact(limits: Limits, is_exact: bool) -> None:
    assert plan_of(limits, 600).is_exact is is_exact


@pytest.mark.parametrize(
    ("milliseconds", "text"),
    [(0, "0ms"), (12, "12ms"), (1000, "1s"), (1500, "1.5s"), (60_000, "1m0s"), (360_000, "6m0s"),
     (86_400_000, "24h0m0s"), (61_020, "1m1.02s")],
)  # fmt: skip
def test_durations_are_written_as_openai_writes_them(milliseconds: int, text: str) -> None:
    assert duration(milliseconds) == text


def test_headers_tell_the_tightest_window_of_each_kind() -> None:
    views = [View("requests", 60, 30, 60_000), View("requests", 1000, 100, 5000), View("tokens", 9, 0, 12)]
    assert headers_of(views) == {
        "x-ratelimit-limit-requests": "1000", "x-ratelimit-remaining-requests": "100",
        "x-ratelimit-reset-requests": "5s", "x-ratelimit-limit-tokens": "9",
        "x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "12ms", "x-ratelimit-limit": "1000",
        "x-ratelimit-remaining": "100", "x-ratelimit-reset": "5",
    }  # fmt: skip


def test_the_contracts_headers_tell_tokens_where_requests_are_not_limited() -> None:
    headers = headers_of([View("tokens", 9, 3, 1001)])
    assert (headers["x-ratelimit-limit"], headers["x-ratelimit-reset"]) == ("9", "2")
    assert headers_of([]) == {}


def test_headers_as_lines_of_a_head_are_made_once():
    headers = headers_of([View("tokens", 9, 3, 1001)])
    assert headers.lines.decode() == "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    assert headers.lines is headers.lines
    assert headers_of([]).lines == b""


def test_a_refusal_is_worded_as_openai_words_it() -> None:
    said = refusal_message("requests_minute", "key", 60, 60, 1, 11.2)
    assert said == (
        "Rate limit reached for requests per minute of this key: limit 60, used 60, requested 1. "
        "Please try again in 12s."
    )
    assert "concurrent requests of this account: limit 2" in refusal_message(
        "concurrency", "account", 2, 2, 1, 0
    )


@pytest.mark.parametrize(("wait_s", "told"), [(0.0, 1), (0.2, 1), (1.0, 1), (1.001, 2), (59.9, 60)])
def test_retry_after_is_rounded_up_and_never_zero(wait_s: float, told: int) -> None:
    assert rounded_up(wait_s) == told


def test_a_window_in_memory_admits_again_when_it_says_so() -> None:
    window = Rolling(60.0)
    for _ in range(3):
        window.add(100.0, 1)
    wait_s = window.wait_s(130.0, 3, 1)
    assert window.wait_s(130.0 + wait_s - 0.001, 3, 1) > 0
    assert window.wait_s(130.0 + wait_s, 3, 1) == 0.0


def test_an_empty_window_admits_what_is_larger_than_its_limit() -> None:
    window = Rolling(60.0)
    assert window.wait_s(0.0, 10, 50) == 0.0
    window.add(0.0, 50)
    assert window.wait_s(1.0, 10, 1) > 0


def test_what_is_given_back_makes_room() -> None:
    window = Rolling(60.0)
    window.add(0.0, 5)
    window.add(30.0, 5)
    window.add(31.0, -7)
    assert window.used == 3
    assert window.wait_s(31.0, 10, 7) == 0.0


def test_a_share_takes_from_none_when_it_only_looks() -> None:
    share = Share(plan_of(Limits(requests_minute=10, tokens_minute=100), 600))
    seen = share.look(0.0, 50, 0, 4)
    assert [(each.limit, each.used, each.wait_s) for each in seen] == [(2, 0, 0.0), (25, 0, 0.0)]


def test_a_block_is_a_small_share_and_only_for_a_subject_in_use() -> None:
    limits = Limits(requests_minute=60_000, tokens_minute=6_000_000)
    standing = Standing("key:1", limits, plan_of(limits, 600))
    assert standing.next_block(0.0, 100, 1.0) == (0, 0, 0)
    standing.used = 40
    assert standing.next_block(1.0, 100, 1.0) == (20, 2000, 0)
    standing.used = 100_000
    assert standing.next_block(2.0, 100, 1.0) == (600, 60_000, 0)


def test_requests_that_are_large_against_a_token_limit_get_no_block() -> None:
    limits = Limits(requests_minute=60_000, tokens_minute=10_000)
    standing = Standing("key:1", limits, plan_of(limits, 600))
    standing.next_block(0.0, 400, 1.0)
    standing.used = 1000
    assert standing.next_block(1.0, 400, 1.0) == (0, 0, 0)


async def test_alone_a_process_keeps_its_share_and_counts(clock: FakeClock) -> None:
    limiter = alone(Settings(), clock, processes=4)
    subjects = (Subject("key", 1, Limits(requests_minute=8)),)
    for _ in range(2):
        (await limiter.admit(subjects, 1)).end(1)
    with pytest.raises(LimitExceeded) as refused:
        await limiter.admit(subjects, 1)
    assert refused.value.limit == "requests_minute"
    clock.advance(refused.value.retry_after_s)
    await limiter.admit(subjects, 1)
    assert limiter._decided_alone == 4


async def test_alone_a_slot_that_is_freed_is_free_at_once(clock: FakeClock) -> None:
    limiter = alone(Settings(), clock, processes=1)
    subjects = (Subject("account", 1, Limits(concurrency=1)),)
    admission = await limiter.admit(subjects, 1)
    with pytest.raises(LimitExceeded, match="concurrent requests"):
        await limiter.admit(subjects, 1)
    admission.end(1)
    admission.end(1)
    await limiter.admit(subjects, 1)


async def test_alone_every_live_process_admits_at_least_one(clock: FakeClock) -> None:
    limiter = alone(Settings(), clock, processes=100)
    await limiter.admit((Subject("key", 1, Limits(requests_minute=3, concurrency=2)),), 1)


async def test_what_one_subject_refuses_takes_nothing_from_the_other(clock: FakeClock) -> None:
    limiter = alone(Settings(), clock, processes=1)
    key, account = (
        Subject("key", 1, Limits(requests_minute=5)),
        Subject("account", 1, Limits(requests_minute=2)),
    )
    for _ in range(2):
        await limiter.admit((key, account), 1)
    for _ in range(9):
        with pytest.raises(LimitExceeded):
            await limiter.admit((key, account), 1)
    for _ in range(3):
        await limiter.admit((key,), 1)


async def test_without_subjects_nothing_is_counted(clock: FakeClock) -> None:
    limiter = alone(Settings(), clock, processes=1)
    admission = limiter.try_admit((), 1)
    assert admission is limiter.try_admit((), 2)
    assert admission is not None
    assert admission.headers == {}
    admission.end(5)


async def test_memory_of_subjects_is_bounded_and_those_in_use_stay(clock: FakeClock) -> None:
    limiter = alone(Settings(limit_subjects_max=16), clock, processes=1)
    busy = (Subject("key", 0, Limits(concurrency=1)),)
    await limiter.admit(busy, 1)
    for number in range(1, 500):
        (await limiter.admit((Subject("key", number, Limits(requests_minute=5)),), 1)).end(1)
    assert len(limiter._known) <= 16
    with pytest.raises(LimitExceeded):
        await limiter.admit(busy, 1)
