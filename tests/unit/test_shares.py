"""A provider's share of an amount: whole nano, by the rule that is set."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from billing.ledger import share_nano

AMOUNTS = st.integers(0, 2**62)
SHARES = st.integers(0, 10_000)


@pytest.mark.parametrize(
    ("amount_nano", "share_bp", "down", "half_even", "up"),
    [
        (100, 7500, 75, 75, 75),
        (1, 7500, 0, 1, 1),
        (2, 7500, 1, 2, 2),  # 1.5: to the even one
        (10, 2500, 2, 2, 3),  # 2.5: likewise
        (1, 1, 0, 0, 1),
        (7, 0, 0, 0, 0),
        (7, 10_000, 7, 7, 7),
        (0, 7500, 0, 0, 0),
    ],
)
def test_each_rule_rounds_as_it_says(
    amount_nano: int, share_bp: int, down: int, half_even: int, up: int
) -> None:
    rules = ("down", "half_even", "up")
    assert [share_nano(amount_nano, share_bp, rule) for rule in rules] == [down, half_even, up]


@given(AMOUNTS, SHARES, st.sampled_from(["down", "half_even", "up"]))
def test_a_share_is_a_part_and_less_than_one_nano_off(amount_nano: int, share_bp: int, rule: str) -> None:
    share = share_nano(amount_nano, share_bp, rule)
    assert 0 <= share <= amount_nano
    assert abs(share * 10_000 - amount_nano * share_bp) < 10_000
