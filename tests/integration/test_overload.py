"""Three times what the engines can do, by two accounts through two workers; the long form is in `make soak`."""

from tests.soak import overload


async def test_a_greedy_account_does_not_make_a_modest_one_wait_and_every_turn_ends_and_is_settled(
    settings, pool, tmp_path
):
    numbers = await overload.overloaded(settings, pool, tmp_path, overload.SHORT)
    assert numbers["greedy: served"] > 0
