"""The ledger on a real PostgreSQL: what is moved, what is refused, and what may come again."""

import asyncio
import datetime as dt
import random

import asyncpg
import pytest

from billing.ledger import AccountRef, Ledger, Posting, Result, Transfer, post_turns
from config.ids import uuid7
from tests.books import account, apply, available, incarnation, lease, resolving, spending, topup

FUTURE = dt.datetime(2100, 1, 1, tzinfo=dt.UTC)
PAST = dt.datetime(2020, 1, 1, tzinfo=dt.UTC)


async def balances(pool: asyncpg.Pool) -> dict[tuple[str, int | None], int]:
    rows = await pool.fetch(
        "select kind, owner_id, sum(credit_nano - debit_nano)::bigint as balance from ledger_accounts group by 1, 2"
    )
    return {(row["kind"], row["owner_id"]): row["balance"] for row in rows}


async def expire(pool: asyncpg.Pool) -> int:
    async with pool.acquire() as connection, connection.transaction():
        return await Ledger().expire_due(connection)


async def test_a_top_up_is_in_the_wallet_and_owed_by_clearing(pool: asyncpg.Pool) -> None:
    acme = await account(pool)
    transfer = topup(acme, 100)
    assert await apply(pool, transfer) == [Result("done", transfer.id)]
    assert await balances(pool) == {("wallet", acme): 100, ("clearing", None): -100}


async def test_what_a_wallet_has_not_is_refused_and_the_rest_of_the_batch_goes_on(pool: asyncpg.Pool) -> None:
    acme = await account(pool, 100)
    results = await apply(pool, spending(acme, 60), spending(acme, 41), spending(acme, 40))
    assert [result.status for result in results] == ["done", "refused", "done"]
    assert results[1] == Result("refused", None, "insufficient_funds")
    assert await available(pool, acme) == 0


async def test_the_transfers_of_a_batch_see_those_before_them(pool: asyncpg.Pool) -> None:
    acme = await account(pool)
    pending = spending(acme, 70, phase="pending")
    results = await apply(
        pool, topup(acme, 100), pending, resolving(pending.id, "post", 50), spending(acme, 50)
    )
    assert [result.status for result in results] == ["done"] * 4
    assert (await balances(pool))["fee", None] == 100


async def test_what_is_leased_or_pending_is_not_promised_again(pool: asyncpg.Pool) -> None:
    acme = await account(pool, 100)
    await lease(pool, await incarnation(pool), acme, 50)
    await apply(pool, spending(acme, 30, phase="pending"))
    assert (await apply(pool, spending(acme, 21)))[0].reason == "insufficient_funds"
    assert (await apply(pool, spending(acme, 20)))[0].status == "done"


async def test_the_database_itself_refuses_a_balance_below_zero(pool: asyncpg.Pool) -> None:
    await account(pool, 100)
    for column in ("debit_nano", "pending_debit_nano", "leased_nano"):
        with pytest.raises(asyncpg.CheckViolationError, match="never_below_zero"):
            await pool.execute(f"update ledger_accounts set {column} = 101 where kind = 'wallet'")


async def test_withdrawals_are_one_account_for_every_process_and_stay_above_zero(pool: asyncpg.Pool) -> None:
    rack = await account(pool, 100)
    wallet, parked, clearing = (
        AccountRef.wallet(rack), AccountRef.platform("withdrawals"), AccountRef.platform("clearing"),
    )  # fmt: skip
    await apply(pool, Transfer(uuid7(), wallet, parked, 60, "withdrawal"), shard=1)
    more, all_ = (Transfer(uuid7(), parked, clearing, amount, "payout") for amount in (61, 60))
    assert [result.status for result in await apply(pool, more, all_, shard=2)] == ["refused", "done"]


@pytest.mark.parametrize("statement", ["update transfers set amount_nano = 1", "delete from transfers"])
async def test_a_transfer_is_never_changed(pool: asyncpg.Pool, statement: str) -> None:
    await account(pool, 100)
    with pytest.raises(asyncpg.RaiseError, match="never changed"):
        await pool.execute(statement)


async def test_a_post_moves_at_most_what_is_pending_and_frees_the_rest(pool: asyncpg.Pool) -> None:
    acme = await account(pool, 100)
    pending = spending(acme, 80, phase="pending")
    await apply(pool, pending)
    assert await available(pool, acme) == 20
    too_much, post = resolving(pending.id, "post", 81), resolving(pending.id, "post", 30)
    assert await apply(pool, too_much, post) == [
        Result("refused", None, "exceeds_pending"),
        Result("done", post.id),
    ]
    assert await available(pool, acme) == 70


async def test_a_pending_transfer_is_resolved_once_and_the_second_is_told_how(pool: asyncpg.Pool) -> None:
    acme = await account(pool, 300)
    said = {"post": "already_posted", "void": "already_voided", "expire": "already_expired"}
    for phase, reason in said.items():
        pending = spending(acme, 10, phase="pending", expires_at=PAST if phase == "expire" else FUTURE)
        first = resolving(pending.id, phase, 10 if phase == "post" else 0)
        await apply(pool, pending, first)
        for again in said:
            late = resolving(pending.id, again, 10 if again == "post" else 0)
            assert await apply(pool, late) == [Result("refused", first.id, reason)]
    assert await available(pool, acme) == 290


async def test_resolutions_of_what_is_not_pending_are_refused(pool: asyncpg.Pool) -> None:
    acme, other = await account(pool, 100), await account(pool, 100)
    posted, pending = spending(acme, 10), spending(acme, 10, phase="pending")
    await apply(pool, posted, pending)
    elsewhere = Transfer(
        uuid7(), AccountRef.wallet(other), AccountRef.platform("fee"), 5, "job", "post", pending.id
    )
    results = await apply(
        pool,
        resolving(uuid7(), "void"),
        resolving(posted.id, "void"),
        resolving(pending.id, "expire"),
        elsewhere,
    )
    assert [result.reason for result in results] == [
        "pending_unknown", "pending_unknown", "not_due", "other_accounts",
    ]  # fmt: skip


async def test_what_is_past_its_time_can_not_be_posted_and_expires(pool: asyncpg.Pool) -> None:
    acme = await account(pool, 100)
    due, open_, endless = (spending(acme, 10, phase="pending", expires_at=at) for at in (PAST, FUTURE, None))
    await apply(pool, due, open_, endless)
    assert (await apply(pool, resolving(due.id, "post", 5)))[0].reason == "pending_expired"
    assert await expire(pool) == 1
    assert await expire(pool) == 0
    assert await available(pool, acme) == 80


async def test_a_repeated_key_returns_the_first_transfer(pool: asyncpg.Pool) -> None:
    acme = await account(pool)
    first = topup(acme, 100, idempotency_key="order-1")
    results = await apply(pool, first, topup(acme, 100, idempotency_key="order-1"))
    # Another process uses another row of clearing; it is the same account all the same.
    results += await apply(pool, topup(acme, 100, idempotency_key="order-1"), shard=3)
    assert results == [Result("done", first.id), Result("repeated", first.id), Result("repeated", first.id)]
    assert await available(pool, acme) == 100


async def test_a_transfer_that_comes_again_by_its_id_is_repeated(pool: asyncpg.Pool) -> None:
    acme = await account(pool)
    transfer = topup(acme, 100)
    assert [r.status for r in await apply(pool, transfer, transfer)] == ["done", "repeated"]
    pending = spending(acme, 10, phase="pending")
    void = resolving(pending.id, "void", idempotency_key="v")
    await apply(pool, pending, void)
    again = resolving(pending.id, "void", idempotency_key="v")
    assert await apply(pool, again) == [Result("repeated", void.id)]


async def test_a_repeated_key_with_another_field_is_a_conflict_that_names_it(pool: asyncpg.Pool) -> None:
    acme, other = await account(pool, 100), await account(pool, 100)
    wallet, fee = AccountRef.wallet(acme), AccountRef.platform("fee")
    pending, second = spending(acme, 5, phase="pending"), spending(acme, 5, phase="pending")
    await apply(pool, pending, second)

    def keyed(*of: object, key: str = "k") -> Transfer:
        return Transfer(uuid7(), *of, idempotency_key=key)  # type: ignore[arg-type]

    first = keyed(wallet, fee, 10, "job")
    void = keyed(None, None, 0, "", "void", pending.id, key="v")
    await apply(pool, first, void)
    differing = {
        "debit": keyed(AccountRef.wallet(other), fee, 10, "job"),
        "credit": keyed(wallet, AccountRef.earnings(other), 10, "job"),
        "amount": keyed(wallet, fee, 11, "job"),
        "kind": keyed(wallet, fee, 10, "refund"),
        "phase": keyed(wallet, fee, 10, "job", "pending"),
    }
    for field, transfer in differing.items():
        assert await apply(pool, transfer) == [Result("conflict", first.id, field=field)]
    other_pending = keyed(None, None, 0, "", "void", second.id, key="v")
    assert await apply(pool, other_pending) == [Result("conflict", void.id, field="pending")]
    same_id = Transfer(first.id, wallet, fee, 10, "job")
    assert await apply(pool, same_id) == [Result("conflict", first.id, field="idempotency_key")]


async def test_a_refused_transfer_leaves_its_key_free(pool: asyncpg.Pool) -> None:
    acme = await account(pool)
    assert (await apply(pool, spending(acme, 10, idempotency_key="k")))[0].status == "refused"
    await apply(pool, topup(acme, 10))
    assert (await apply(pool, spending(acme, 10, idempotency_key="k")))[0].status == "done"


async def test_of_duplicates_at_the_same_time_one_is_done(pool: asyncpg.Pool) -> None:
    acme, other = await account(pool), await account(pool)
    same = await asyncio.gather(*(apply(pool, topup(acme, 10, idempotency_key="k")) for _ in range(16)))
    assert sorted(result.status for (result,) in same) == ["done"] + ["repeated"] * 15
    assert len({result.transfer_id for (result,) in same}) == 1
    wallets = [acme, other] * 8  # disjoint accounts: no lock of theirs orders these
    mixed = await asyncio.gather(*(apply(pool, topup(of, 10, idempotency_key="m")) for of in wallets))
    assert sorted(result.status for (result,) in mixed) == ["conflict"] * 8 + ["done"] + ["repeated"] * 7


async def test_batches_in_any_order_never_deadlock(pool: asyncpg.Pool) -> None:
    wallets = [await account(pool, 10**6) for _ in range(6)]
    shuffled = random.Random(1)

    async def load() -> None:
        for _ in range(25):
            batch = []
            for _ in range(6):
                debit, credit = (AccountRef.wallet(of) for of in shuffled.sample(wallets, 2))
                key = shuffled.choice([None, str(shuffled.randrange(10**6))])
                batch.append(
                    Transfer(uuid7(), debit, credit, shuffled.randrange(1, 50), "job", idempotency_key=key)
                )
                batch.append(spending(shuffled.choice(wallets), 1))
                batch.append(topup(shuffled.choice(wallets), 1))
            await apply(pool, *batch, shard=shuffled.randrange(4))

    await asyncio.gather(*(load() for _ in range(8)))
    assert sum((await balances(pool)).values()) == 0


async def test_wrong_transfers_do_not_reach_the_database() -> None:
    wallet, fee = AccountRef.wallet(1), AccountRef.platform("fee")
    for wrong in (
        (wallet, fee, 0, "job"), (wallet, fee, -1, "job"), (wallet, fee, 1, ""), (wallet, wallet, 1, "job"),
        (None, fee, 1, "job"), (wallet, fee, 1, "job", "post"), (wallet, fee, 1, "job", "posted", uuid7()),
        (wallet, fee, 1, "job", "void", uuid7()),
    ):  # fmt: skip
        with pytest.raises(ValueError):
            Transfer(uuid7(), *wrong)  # type: ignore[arg-type]
    for kind, owner in (("fee", 1), ("wallet", None), ("purse", 1)):
        with pytest.raises(ValueError, match="no such ledger account"):
            AccountRef(kind, owner)


async def test_a_wallet_that_is_credited_is_told(pool: asyncpg.Pool) -> None:
    acme = await account(pool)
    await pool.execute("delete from changes")
    await apply(pool, topup(acme, 10), spending(acme, 5))
    rows = await pool.fetch("select kind, entity from changes")
    assert [tuple(row) for row in rows] == [("wallet", str(acme))]


# --- the posting of turns ------------------------------------------------------------------------------------------


async def leases(pool: asyncpg.Pool) -> list[tuple[int, int]]:
    rows = await pool.fetch("select account_id, settled_nano from spend_leases order by 1")
    return [(row["account_id"], row["settled_nano"]) for row in rows]


async def test_turns_go_from_the_leased_part_of_the_wallet_to_earnings_and_fee(pool: asyncpg.Pool) -> None:
    acme, other, rack = await account(pool, 1000), await account(pool, 1000), await account(pool)
    process = await incarnation(pool)
    for of in (acme, other):
        await lease(pool, process, of, 500)
    postings = [
        Posting(uuid7(), acme, rack, 100, 75),
        Posting(uuid7(), acme, None, 10, 0),
        Posting(uuid7(), other, rack, 40, 30, loss_share_nano=7),
    ]
    await post_turns(pool, process, postings, shard=2)
    assert await balances(pool) == {
        ("wallet", acme): 890, ("wallet", other): 960, ("wallet", rack): 0, ("earnings", rack): 112,
        ("fee", None): 45, ("loss", None): -7, ("clearing", None): -2000,
    }  # fmt: skip
    assert await leases(pool) == [(acme, 110), (other, 40)]
    assert [await available(pool, of) for of in (acme, other)] == [500, 500]
    rows = await pool.fetch(
        "select posting_id, kind, amount_nano, incarnation_id from transfers where incarnation_id is not null"
        " order by amount_nano"
    )
    one, two, three = (posting.posting_id for posting in postings)
    assert [tuple(row) for row in rows] == [
        (None, "loss", 7, process), (two, "turn", 10, process), (three, "turn", 10, process),
        (one, "turn", 25, process), (three, "turn", 30, process), (one, "turn", 75, process),
    ]  # fmt: skip


async def test_turns_that_cost_nothing_make_no_transfer(pool: asyncpg.Pool) -> None:
    acme = await account(pool, 1000)
    process = await incarnation(pool)
    await post_turns(pool, process, [Posting(uuid7(), acme, acme, 0, 0)], shard=0)
    await post_turns(pool, process, [], shard=0)
    assert await pool.fetchval("select count(*) from transfers") == 1


async def test_what_is_posted_is_not_reported_as_held_any_more(pool: asyncpg.Pool) -> None:
    acme = await account(pool, 1000)
    process = await incarnation(pool)
    await lease(pool, process, acme, 500)
    await pool.execute("update spend_leases set free_nano = 380, held_nano = 100")  # 20 are settled in memory
    for amount, left in ((20, (380, 100)), (30, (380, 70)), (80, (370, 0))):
        await post_turns(pool, process, [Posting(uuid7(), acme, None, amount, 0)], shard=0)
        assert tuple(await pool.fetchrow("select free_nano, held_nano from spend_leases")) == left


async def test_a_posting_that_comes_again_is_refused_whole(pool: asyncpg.Pool) -> None:
    acme = await account(pool, 1000)
    process = await incarnation(pool)
    await lease(pool, process, acme, 500)
    posting = Posting(uuid7(), acme, None, 100, 0)
    await post_turns(pool, process, [posting], shard=0)
    with pytest.raises(asyncpg.IntegrityConstraintViolationError):
        await post_turns(pool, process, [posting, Posting(uuid7(), acme, None, 5, 0)], shard=0)
    assert await leases(pool) == [(acme, 100)]


async def test_more_than_a_lease_has_is_refused_whole(pool: asyncpg.Pool) -> None:
    acme = await account(pool, 1000)
    process = await incarnation(pool)
    await lease(pool, await incarnation(pool), acme, 100)
    with pytest.raises(asyncpg.IntegrityConstraintViolationError, match="has no lease"):
        await post_turns(pool, process, [Posting(uuid7(), acme, None, 1, 0)], shard=0)
    await lease(pool, process, acme, 50)
    with pytest.raises(asyncpg.CheckViolationError, match="never_over_granted"):
        await post_turns(pool, process, [Posting(uuid7(), acme, None, 51, 0)], shard=0)


async def test_postings_and_transfers_in_any_order_never_deadlock(pool: asyncpg.Pool) -> None:
    wallets = [await account(pool, 10**6) for _ in range(5)]
    processes = [await incarnation(pool) for _ in range(4)]
    for process in processes:
        for of in wallets:
            await lease(pool, process, of, 10**5)
    shuffled = random.Random(2)

    async def post(process: object) -> None:
        for _ in range(20):
            postings = [
                Posting(uuid7(), of, shuffled.choice(wallets), 4, 3) for of in shuffled.sample(wallets, 5)
            ]
            await post_turns(pool, process, postings, shard=0)  # type: ignore[arg-type]

    async def move() -> None:
        for _ in range(20):
            await apply(pool, *(topup(of, 1) for of in shuffled.sample(wallets, 5)), spending(wallets[0], 1))

    await asyncio.gather(*(post(process) for process in processes), *(move() for _ in range(3)))
    assert sum((await balances(pool)).values()) == 0
    assert (await leases(pool))[0] == (wallets[0], 80)


def test_parts_that_are_no_parts_are_refused() -> None:
    for provider, amount, share, loss in ((1, 10, 11, 0), (1, 10, -1, 0), (None, 10, 1, 0), (None, 10, 0, 1)):
        with pytest.raises(ValueError):
            Posting(uuid7(), 1, provider, amount, share, loss)
