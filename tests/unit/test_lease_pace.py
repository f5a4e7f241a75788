"""How fast an account spends, and when its lease is filled again for that."""

import pytest

from billing.lease import PEAK_KEPT_MS, Pot, low_after, peak_after


@pytest.mark.parametrize(
    ("peak", "spent", "elapsed_ms", "round_ms", "expected"),
    [
        (0, 5_000, 1_000, 1_000, 5_000),
        (0, 5_000, 60_000, 1_000, 5_000),  # after a pause it is as fast as it is now
        (8_000, 5_000, 1_000, 1_000, 8_000 - 8_000 * 1_000 // PEAK_KEPT_MS),
        (8_000, 0, PEAK_KEPT_MS, 1_000, 0),
        (0, 5_000, 10_000, 2_500, 2_000),  # a round that PostgreSQL held up is a longer one
    ],
)
def test_a_peak_is_of_the_round_and_fades_with_the_pause(peak, spent, elapsed_ms, round_ms, expected):
    assert peak_after(peak, spent, elapsed_ms, round_ms) == expected


@pytest.mark.parametrize(
    ("block", "low", "wanted", "expected"),
    [
        (4_000, 2_000, 600_000, 300_000),  # four holds, and an account that spends 5,000 a second
        (600_000, 300_000, 600_000, 300_000),
        (600_000, 300_000, 650_000, 300_000),  # it creeps
        (600_000, 300_000, 700_000, 350_000),
        (600_000, 20_000, 600_000, 20_000),  # a fair part is less than a block: half of that
        (600_000, 300_000, 10_000, 300_000),
        (0, 0, 600_000, 0),  # nothing was leased yet
    ],
)
def test_a_lease_is_filled_for_what_its_account_spends_now(block, low, wanted, expected):
    pot = Pot()
    pot.block_nano, pot.low_nano = block, low
    assert low_after(pot, wanted) == expected


def test_a_small_wallet_is_leased_a_turn_at_a_time_however_fast():
    pot = Pot()
    pot.is_small, pot.block_nano = True, 4_000
    assert low_after(pot, 600_000) == 0
