"""A breaker's whole life, step by step, by a clock that the test holds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.defaults import Settings
from nodes.breaker import Breaker

SETTINGS = Settings(breaker_failures=3, breaker_successes=2, breaker_open_s=1.0, breaker_open_max_s=30.0)


@pytest.fixture
def breaker() -> Breaker:
    return Breaker(SETTINGS)


def opened(breaker: Breaker, now_s: float = 0.0) -> Breaker:
    for _ in range(SETTINGS.breaker_failures):
        breaker.failed(now_s)
    return breaker


def closed_by_probes(breaker: Breaker, now_s: float) -> None:
    assert [breaker.probed(True, now_s) for _ in range(SETTINGS.breaker_successes)][-1]


def test_failures_in_a_row_open_it_and_only_the_last_one_says_so(breaker):
    assert [breaker.failed(0.0) for _ in range(5)] == [False, False, True, False, False]
    assert breaker.is_open


def test_a_good_turn_between_failures_starts_the_count_anew(breaker):
    for _ in range(10):
        breaker.failed(0.0)
        breaker.failed(0.0)
        breaker.succeeded()
    assert not breaker.is_open


def test_no_probe_is_wanted_before_the_pause_is_over_nor_while_it_is_closed(breaker):
    assert not breaker.wants_probe(1e9)
    opened(breaker, 10.0)
    assert not breaker.wants_probe(10.99)
    assert breaker.wants_probe(11.0)


def test_probes_in_a_row_close_it_and_only_the_last_one_says_so(breaker):
    opened(breaker)
    assert [breaker.probed(True, 1.0), breaker.probed(True, 1.1)] == [False, True]
    assert (breaker.is_open, breaker.failures) == (False, 0)


def test_a_bad_probe_starts_the_probes_anew_after_a_longer_pause(breaker):
    opened(breaker)
    assert not breaker.probed(True, 1.0)
    assert not breaker.probed(False, 1.0)
    assert not breaker.wants_probe(2.9)
    assert breaker.wants_probe(3.0)
    assert not breaker.probed(True, 3.0)
    assert breaker.is_open


def test_the_pause_doubles_up_to_its_bound(breaker):
    opened(breaker)
    now_s, pauses = 0.0, []
    for _ in range(7):
        pauses.append(breaker.probe_at_s - now_s)
        now_s = breaker.probe_at_s
        breaker.probed(False, now_s)
    assert pauses == [1, 2, 4, 8, 16, 30, 30]


def test_an_engine_that_answers_probes_but_fails_turns_waits_longer_each_time(breaker):
    opened(breaker, 0.0)
    closed_by_probes(breaker, 1.0)
    opened(breaker, 1.0)
    assert breaker.probe_at_s == 3.0


def test_a_good_turn_after_it_closed_makes_the_next_pause_short_again(breaker):
    opened(breaker, 0.0)
    closed_by_probes(breaker, 1.0)
    breaker.succeeded()
    opened(breaker, 10.0)
    assert breaker.probe_at_s == 11.0


def test_a_late_good_turn_does_not_close_an_open_breaker(breaker):
    opened(breaker)
    breaker.succeeded()
    assert breaker.is_open
    closed_by_probes(breaker, 1.0)
    opened(breaker, 1.0)
    assert breaker.probe_at_s == 3.0, "the pause still doubles"


def test_a_turn_that_fails_late_does_not_move_the_next_probe(breaker):
    opened(breaker, 0.0)
    breaker.failed(0.9)
    assert breaker.probe_at_s == 1.0


def test_a_new_engine_process_starts_clean(breaker):
    opened(breaker)
    breaker.probed(True, 1.0)
    breaker.reset()
    assert not breaker.is_open
    opened(breaker, 5.0)
    assert breaker.probe_at_s == 6.0
    assert not breaker.probed(True, 6.0), "probes of before the reset do not count"


def test_years_of_failing_do_not_overflow(breaker):
    opened(breaker)
    for _ in range(5000):
        breaker.probed(False, 0.0)
    assert breaker.probe_at_s == SETTINGS.breaker_open_max_s


@given(st.lists(st.sampled_from(["fail", "good", "probe good", "probe bad", "reset"]), max_size=60))
def test_whatever_happens_it_opens_only_by_failures_and_closes_only_by_probes_or_reset(steps):
    breaker, now_s, in_a_row = Breaker(SETTINGS), 0.0, 0
    for step in steps:
        was_open, was_trial, now_s = breaker.is_open, breaker.is_trial, now_s + 1.0
        if step.startswith("probe") and not breaker.is_open:
            continue  # the registry probes open ones only
        _take(breaker, step, now_s)
        in_a_row = in_a_row + 1 if step == "fail" else 0 if step in ("good", "reset") else in_a_row
        if breaker.is_open and not was_open:
            assert step == "fail"
            assert was_trial or in_a_row >= SETTINGS.breaker_failures
        if was_open and not breaker.is_open:
            assert step in ("probe good", "reset")
            in_a_row = 0
        if breaker.is_open:
            assert breaker.probe_at_s <= now_s + SETTINGS.breaker_open_max_s


def breaker_after_probes() -> Breaker:
    breaker = Breaker(SETTINGS)
    for _ in range(SETTINGS.breaker_failures):
        breaker.failed(1.0)
    for _ in range(SETTINGS.breaker_successes):
        breaker.probed(True, 2.0)
    assert not breaker.is_open
    return breaker


def test_after_probes_one_turn_at_a_time_is_admitted_until_one_went_well():
    breaker = breaker_after_probes()
    assert breaker.admits
    breaker.began()
    assert not breaker.admits
    breaker.ended()
    assert breaker.admits
    breaker.began()
    breaker.succeeded(begun_s=3.0)
    breaker.ended()
    breaker.began()
    assert breaker.admits


def test_a_failed_trial_opens_it_at_once():
    breaker = breaker_after_probes()
    breaker.began()
    assert breaker.failed(3.0)
    assert breaker.is_open


def test_a_turn_from_before_the_last_failure_says_nothing_of_now():
    breaker = Breaker(SETTINGS)
    breaker.failed(10.0)
    breaker.succeeded(begun_s=5.0)
    assert breaker.failures == 1
    breaker.succeeded(begun_s=11.0)
    assert breaker.failures == 0


def _take(breaker: Breaker, step: str, now_s: float) -> None:
    if step == "fail":
        breaker.failed(now_s)
    elif step == "good":
        breaker.succeeded()
    elif step == "reset":
        breaker.reset()
    else:
        breaker.probed(step == "probe good", now_s)
