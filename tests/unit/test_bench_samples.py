"""The arithmetic of the benchmarks: pairs within rounds, medians, bodies of an exact size, and h2load's log."""

import json

import pytest

from bench.bodies import NUMBER, chat_body
from bench.latency import times_of
from bench.load import Job, requests_of
from bench.rounds import rounds_of
from bench.samples import Sample, Samples, Spread, paired_differences, plain, quantile
from bench.stamps import ages_ms, stamp


def samples_of(values: dict[str, list[float]], measure: str = "CPU", case: str = "4 KB") -> list[Sample]:
    return [
        Sample(measure, case, arm, "µs", number, value)
        for arm, row in values.items()
        for number, value in enumerate(row, 1)
    ]


def test_a_ratio_is_taken_within_a_round_and_not_between_medians():
    samples = Samples(samples_of({"ours": [10, 30, 20], "peer": [10, 60, 80]}))
    assert samples.ratio("CPU", "4 KB", "ours", "peer") == Spread(0.5, 0.25, 1.0, 3)


def test_a_round_without_the_peer_makes_no_pair():
    some = samples_of({"ours": [10, 30], "peer": [20]})
    assert Samples(some).ratio("CPU", "4 KB", "ours", "peer") == Spread(0.5, 0.5, 0.5, 1)
    assert Samples(some).ratio("CPU", "4 KB", "ours", "absent") is None
    assert Samples(some).spread("CPU", "64 KB", "ours") is None


def test_differences_are_taken_within_a_round_and_case():
    some = samples_of({"direct": [1, 2], "ours": [4, 9]}) + samples_of({"ours": [5]}, case="200 B")
    more = paired_differences(some, "CPU", "added", "direct")
    assert [(one.measure, one.case, one.arm, one.value) for one in more] == [
        ("added", "4 KB", "ours", 3),
        ("added", "4 KB", "ours", 7),
    ]


@pytest.mark.parametrize(("share", "value"), [(0.5, 51), (0.99, 100), (0.0, 1), (1.0, 100)])
def test_a_quantile_is_a_value_that_was_seen(share, value):
    assert quantile(range(100, 0, -1), share) == value


def test_the_quantile_of_nothing_is_zero():
    assert quantile([], 0.5) == 0


@pytest.mark.parametrize(
    ("value", "words"), [(8840.2, "8,840"), (44.25, "44.2"), (0.5, "0.50"), (-1.5, "-1.50")]
)
def test_a_number_is_shown_with_three_digits(value, words):
    assert plain(value) == words


def test_a_spread_below_zero_can_be_read():
    assert str(Spread.of([1.0, 2.0, 3.0])) == "2.00 (1.00-3.00)"
    assert str(Spread.of([-1.0, -2.0, -3.0])) == "-2.00 (-3.00 to -1.00)"


def test_each_round_has_every_arm_and_rounds_differ_in_their_order():
    orders = [order for _, order in rounds_of(list("abcdef"), 5)]
    assert all(sorted(order) == list("abcdef") for order in orders)
    assert len({tuple(order) for order in orders}) > 1
    assert [number for number, _ in rounds_of(["a"], 2)] == [0, 1, 2]


@pytest.mark.parametrize("size", [200, 4096, 65536])
def test_a_body_has_exactly_the_size_that_was_asked_for(size):
    assert len(json.dumps(chat_body(size, tokens=16))) == size
    assert len(json.dumps(chat_body(size, tokens=16, stream=True))) == size


def test_numbered_requests_differ_in_their_number_only():
    body = chat_body(300, tokens=16)
    requests = requests_of(Job("http://127.0.0.1:1", key="k", body=body))
    first, second = next(requests), next(requests)
    assert first != second
    assert len(first) == len(second)
    assert NUMBER.encode() not in first
    assert sum(a != b for a, b in zip(first, second, strict=True)) <= len(NUMBER)


def test_keys_take_turns_in_numbered_requests():
    requests = requests_of(Job("http://127.0.0.1:1", keys=["one", "two"], body=chat_body(300, tokens=16)))
    found = [b"Bearer one" in next(requests) for _ in range(4)]
    assert found == [True, False, True, False]


def test_a_stamp_tells_its_age_and_a_cut_one_nothing():
    mark = stamp()
    (age_ms, again_ms) = ages_ms(b'{"content":"%b"}{"content":"%b"}@0000' % (mark, mark))
    assert 0 <= age_ms < 60_000
    assert age_ms == again_ms


def test_h2load_s_log_gives_durations_of_good_answers_and_their_rate():
    lines = [f"{1_000_000 + number * 1000}\t200\t500" for number in range(100)] + ["1200000\t503\t9000"]
    times = times_of("\n".join(lines))
    assert times.milliseconds == [0.5] * 100
    assert times.rate == pytest.approx(1000)


def test_an_empty_log_of_h2load_is_a_rate_of_zero():
    assert times_of("").rate == 0
