"""The arithmetic of leases, without a database: what is free, taken and returned."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from billing.lease import (
    LEAST_TURNS,
    LeaseRow,
    Pot,
    block_nano,
    fit,
    grant_nano,
    is_small,
    surplus_nano,
)
from billing.lease_account import AccountLease, Budget, BudgetLease, Hold, Waiter, Window, serve

AMOUNTS = st.integers(0, 10**12)


def pot(free: int = 0, *, block: int = 0) -> Pot:
    made = Pot()
    made.sync(None)
    made.grant(free)
    made.block_nano = block
    return made


def quiet(_account: AccountLease) -> None:
    """Nobody is told."""


async def waiting(amount: int, least: int | None = None, budgets: tuple[Budget, ...] = ()) -> Waiter:
    return Waiter(amount, least, budgets, asyncio.get_running_loop().create_future())


@given(st.lists(st.tuples(st.sampled_from("ghsr"), AMOUNTS)))
def test_what_was_granted_is_free_held_settled_or_returned(steps: list[tuple[str, int]]) -> None:
    own, settled = pot(), 0
    for step, amount in steps:
        if step == "g":
            own.grant(amount)
        elif step == "h":
            own.hold(min(amount, own.free_nano))
        elif step == "s":
            held = own.held_nano
            own.release(held, min(amount, held))
            settled += min(amount, held)
        else:
            own.give_back(min(amount, own.free_nano))
        assert own.settled_nano == settled
        assert min(own.free_nano, own.held_nano, own.returned_nano) >= 0


def test_a_lost_grant_is_found_with_the_next_answer() -> None:
    own = pot(10)
    own.hold(4)
    own.sync(LeaseRow(granted_nano=25, settled_nano=0, returned_nano=0, used_nano=0))
    assert (own.free_nano, own.held_nano, own.settled_nano) == (21, 4, 0)


def test_a_lost_return_stays_returned() -> None:
    own = pot(10)
    own.give_back(6)
    assert not own.is_told
    own.sync(LeaseRow(granted_nano=10, settled_nano=0, returned_nano=6, used_nano=0))
    assert own.is_told
    assert own.free_nano == 4


def test_a_lease_taken_up_again_goes_on_where_it_was_dropped() -> None:
    own = Pot()
    own.sync(LeaseRow(granted_nano=100, settled_nano=10, returned_nano=60, used_nano=40))
    assert (own.free_nano, own.settled_nano) == (0, 40)
    lost = Pot()  # a grant of 7 came in between, in an answer that nobody heard
    lost.sync(LeaseRow(granted_nano=107, settled_nano=10, returned_nano=60, used_nano=40))
    assert (lost.free_nano, lost.settled_nano) == (7, 40)


@pytest.mark.parametrize(
    ("amount", "least", "room", "became"),
    [
        (5, None, 5, 5), (6, None, 5, 0), (100, 1, 50, 25), (100, 30, 50, 30), (100, 51, 50, 0), (100, 50, 50, 50),
        (30, 1, 50, 30), (100, 100, 150, 100),
    ],
)  # fmt: skip
def test_a_hold_becomes_what_the_room_allows(amount: int, least: int | None, room: int, became: int) -> None:
    assert fit(amount, least, room) == became


@given(AMOUNTS, st.none() | AMOUNTS, AMOUNTS)
def test_a_hold_is_never_more_than_asked_or_than_there_is(amount: int, least: int | None, room: int) -> None:
    assert 0 <= fit(amount, least, room) <= min(amount, room)


def test_a_wallet_is_small_if_it_buys_few_holds_for_each_process() -> None:
    assert is_small(159, 10, 2, 8)
    assert not is_small(160, 10, 2, 8)
    assert not is_small(0, 0, 2, 8)


def test_a_block_follows_the_peak_and_buys_a_few_turns_at_least() -> None:
    assert block_nano(1_000, 120.0, 10) == 120_000
    assert block_nano(0, 120.0, 10) == LEAST_TURNS * 10


@given(AMOUNTS, AMOUNTS, AMOUNTS, st.integers(1, 16), st.booleans(), AMOUNTS)
def test_a_grant_serves_the_turns_and_else_is_a_fair_part(
    need: int, free: int, available: int, live: int, small: bool, block: int
) -> None:
    if need > free + available:
        return  # such turns are not served, and not part of the need
    own = pot(free, block=block)
    coming = grant_nano(need, own, available, live, small=small)
    assert 0 <= coming <= available
    assert own.free_nano + coming >= need
    if coming > max(0, need - free):
        assert not small
        assert coming <= available // (2 * live)


def test_a_small_wallet_gives_back_all_that_is_not_waited_for_and_a_large_one_what_exceeds_two_blocks() -> (
    None
):
    assert surplus_nano(3, pot(10), 100, small=True) == 7
    assert surplus_nano(3, pot(10, block=5), 100, small=False) == 0
    assert surplus_nano(0, pot(11, block=5), 100, small=False) == 6


def test_a_lowered_limit_gets_back_what_is_free() -> None:
    assert surplus_nano(0, pot(10, block=50), -4, small=False) == 4
    assert surplus_nano(0, pot(10, block=50), -40, small=False) == 10


def test_a_hold_is_extended_from_all_its_pots_or_not_at_all() -> None:
    wallet, budget = pot(100), pot(60)
    hold = Hold(None, (wallet, budget), 50, (), quiet)
    assert not hold.extend(11)
    assert hold.extend(10)
    assert (wallet.free_nano, budget.free_nano, hold.amount_nano) == (40, 0, 60)
    assert hold.settle(70) == (60, 10)
    assert (wallet.settled_nano, budget.settled_nano) == (60, 60)


def test_a_charge_beyond_its_hold_takes_what_is_free_of_every_pot() -> None:
    wallet, budget = pot(100), pot(60)
    assert Hold(None, (wallet, budget), 50, (), quiet).settle(75) == (60, 15)


async def test_nobody_overtakes_a_turn_that_waits_for_the_wallet() -> None:
    account = AccountLease(1, 0.0, wallet=pot(5))
    first, second = await waiting(10), await waiting(1)
    account.waiters.extend((first, second))
    serve(account, 0.0, 0, quiet)
    assert not first.granted.done()
    assert not second.granted.done()
    account.wallet.grant(6)
    serve(account, 0.0, 0, quiet)
    assert (first.granted.result().amount_nano, second.granted.result().amount_nano) == (10, 1)
    assert not account.waiters


async def test_a_turn_that_waits_for_a_budget_holds_up_those_of_this_budget_only() -> None:
    own = Window(7, 0.0, ends_s=10.0, generation=0, pot=pot(5))
    account = AccountLease(1, 0.0, wallet=pot(100), budgets={7: BudgetLease(7, own)})
    budget = Budget(7, 1, "day")
    first, second = await waiting(10, budgets=(budget,)), await waiting(1, budgets=(budget,))
    other = await waiting(3)
    account.waiters.extend((first, second, other))
    serve(account, 0.0, 0, quiet)
    assert [waiter.granted.done() for waiter in (first, second, other)] == [False, False, True]
    assert list(account.waiters) == [first, second]


def test_a_window_that_is_over_is_not_held_from() -> None:
    own = Window(7, 0.0, ends_s=10.0, generation=0, pot=pot(5))
    account = AccountLease(1, 0.0, wallet=pot(100), budgets={7: BudgetLease(7, own)})
    budgets = (Budget(7, 1, "day"),)
    assert account.pots(budgets, 9.9, 0) == (account.wallet, own.pot)
    assert account.pots(budgets, 10.0, 0) is None
    assert account.pots(budgets, 0.0, 1) is None
