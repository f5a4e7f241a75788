"""What is decided about providers: their status, their reputation, and whose count is odd; and which agent is older."""

import pytest

from nodes.providers import status_of
from nodes.reputation import Compared, Record, Reputation, reputation_of
from nodes.versions import is_older


@pytest.mark.parametrize(
    ("account", "is_paused", "states", "status"),
    [
        ("active", False, {}, "registered"),
        ("active", False, {"connected": 1}, "connected"),
        ("active", False, {"offline": 3, "online": 1}, "online"),
        ("active", False, {"offline": 3, "draining": 1}, "paused"),
        ("active", False, {"offline": 1, "suspended": 1}, "offline"),
        ("active", False, {"suspended": 1}, "suspended"),
        ("active", True, {"online": 1}, "paused"),
        ("suspended", True, {"online": 1}, "suspended"),
    ],
)
def test_a_provider_is_what_its_best_node_is(account, is_paused, states, status):
    assert status_of(account, is_paused, states) == status


@pytest.mark.parametrize(
    ("record", "uptime", "score"),
    [
        (Record(0, 0, 0, 0), None, None),
        (Record(900, 1000, 0, 0), 90.0, 90.0),
        (Record(1010, 1000, 980, 0), 100.0, 100.0),  # what was heard between two rolls may tip over
        (Record(1000, 1000, 0, 20), 100.0, 50.0),
        (Record(500, 1000, 80, 100), 50.0, 25.0),
    ],
)
def test_the_score_is_the_chance_that_a_turn_is_answered(record, uptime, score):
    assert reputation_of(record) == Reputation(uptime, score)


def test_a_newcomers_first_failure_costs_little():
    found = reputation_of(Record(100, 100, 0, 1)).reliability_score
    assert found is not None
    assert 95 < found < 100


@pytest.mark.parametrize(
    ("reported", "relayed", "is_odd"),
    [
        (0, 0, False), (9_999, 0, False), (10_001, 0, True), (0, 10_001, True), (1_000_000, 850_000, False),
        (1_000_000, 750_000, True), (750_000, 1_000_000, True),
    ],
)  # fmt: skip
def test_counts_may_differ_by_a_share_and_a_little(reported, relayed, is_odd):
    assert Compared("prompt", reported, relayed).is_odd(0.2) is is_odd


@pytest.mark.parametrize(
    ("version", "than", "is_so"),
    [
        ("1.9", "1.10", True), ("1.10", "1.9", False), ("0.1.0", "0.1", False), ("v0.0.9", "0.1.0", True),
        ("3.3.0-rc1", "3.3.0", False), ("", "0.1.0", False), ("dev", "0.1.0", False), ("9" * 30, "1", False),
    ],
)  # fmt: skip
def test_versions_are_compared_by_their_numbers(version, than, is_so):
    assert is_older(version, than) is is_so
