"""A low limit over four real workers at once; three minutes of it are in `make soak`, shorter windows in test_limits.py."""

from tests.soak import limits


async def test_60_of_a_burst_over_four_workers_are_admitted_and_the_rest_are_told_when(
    settings, pool, tmp_path
):
    numbers = await limits.a_minute_has_60(settings, pool, tmp_path, limits.SHORT)
    assert numbers["spread: most in a minute"] == numbers["pinned: least in a minute"] == limits.LIMIT
