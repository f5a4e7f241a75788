"""Random lives of several processes over one real PostgreSQL, held against a model of what everybody was charged.

Whatever is held, settled, recalled, shipped in any order, lost, or killed: no wallet and no budget is ever overspent, what
is leased is the sum of what leases have left, and in the end the last cent can be spent.
"""

import asyncio
import datetime as dt
import itertools
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import asyncpg
import uvloop
from hypothesis import HealthCheck, Phase
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from billing.budgets import BudgetStore, post_budgets
from billing.incarnations import Incarnation, close_incarnation, register
from billing.leases import BillingUnavailable, Budget, BudgetExceeded, Hold, InsufficientFunds, SpendLeases
from billing.ledger import Posting, post_turns
from config.defaults import Settings
from config.ids import uuid7
from config.postgres import open_pool
from tests.fakes.clock import FakeClock
from tests.integration.test_leases import LosingPool, make_account

REFUSALS = (InsufficientFunds, BudgetExceeded, BillingUnavailable)
PROCESSES, ACCOUNTS = st.integers(0, 1), st.integers(0, 1)
AMOUNTS = st.integers(0, 400)
OPEN_HOLDS = st.integers(0, 10**6)

_names = itertools.count()


@dataclass
class Charge:
    """A settled turn in the journal."""

    account: int
    amount: int
    budgets: tuple[tuple[int, float], ...]


@dataclass
class Life:
    """One incarnation."""

    incarnation: Incarnation
    leases: SpendLeases
    pool: LosingPool
    journal: list[Charge] = field(default_factory=list)
    holds: list[tuple[int, Hold]] = field(default_factory=list)


class LeaseModel(RuleBasedStateMachine):
    """The model: what each account was credited and charged, and what is in journals."""

    run: Callable[[Coroutine[Any, Any, Any]], Any]
    pool: asyncpg.Pool
    config: Settings

    @initialize(small=st.integers(0, 2_000), limit=st.integers(0, 3_000))
    def begin(self, small: int, limit: int) -> None:
        self.clock = FakeClock()
        self.credited = [small, 100_000]
        self.posted = [0, 0]
        self.lost = 0
        self.run(self._begin(limit))

    async def _begin(self, limit: int) -> None:
        await self.pool.execute("update incarnations set state = 'closed' where state = 'live'")
        self.accounts = [
            await make_account(self.pool, f"a{next(_names)}", credit) for credit in self.credited
        ]
        self.budgets = []
        for account in self.accounts:
            made = await BudgetStore(self.pool).set(account, None, "total", limit)
            self.budgets.append(Budget(made.id, None, "total"))
        self.limit = limit
        self.lives = [await self._born() for _ in range(2)]

    async def _born(self) -> Life:
        made = await register(self.pool, self.config, folder=Path("/nowhere"), host="model", pid=1)
        losing = LosingPool(self.pool)
        return Life(made, SpendLeases(losing, made, self.config, self.clock), losing)  # type: ignore[arg-type]

    def do(self, life: Life, work: Coroutine[Any, Any, Any]) -> Any:
        """Run it, and what it set going in the background."""

        async def whole() -> Any:
            try:
                return await work
            finally:
                await life.leases._teller.idle()

        return self.run(whole())

    @rule(
        process=PROCESSES,
        n=ACCOUNTS,
        amount=AMOUNTS,
        least=st.none() | st.integers(1, 50),
        counted=st.booleans(),
    )
    def hold(self, process: int, n: int, amount: int, least: int | None, counted: bool) -> None:
        life = self.lives[process]
        budgets = (self.budgets[n],) if counted else ()
        try:
            hold = self.do(life, life.leases.hold(self.accounts[n], amount, budgets, least_nano=least))
        except REFUSALS:
            return
        assert hold.amount_nano == amount or (least is not None and least <= hold.amount_nano < amount)
        life.holds.append((n, hold))

    @rule(process=PROCESSES, n=ACCOUNTS, amounts=st.lists(AMOUNTS, min_size=2, max_size=6))
    def crowd(self, process: int, n: int, amounts: list[int]) -> None:
        """Turns at once, each of which settles what it can as soon as it is served."""
        life = self.lives[process]

        async def turn(amount: int) -> None:
            try:
                hold = await life.leases.hold(self.accounts[n], amount, (self.budgets[n],))
            except REFUSALS:
                return
            await asyncio.sleep(0)
            charged, _ = hold.settle(amount // 2)
            life.journal.append(Charge(n, charged, hold.budgets))

        async def all_of_them() -> None:
            await asyncio.gather(*map(turn, amounts))

        self.do(life, all_of_them())

    def open_hold(self, process: int, which: int) -> tuple[Life, int, Hold] | None:
        life = self.lives[process]
        if not life.holds:
            return None
        n, hold = life.holds.pop(which % len(life.holds))
        return life, n, hold

    @rule(process=PROCESSES, which=OPEN_HOLDS, percent=st.sampled_from((0, 30, 100, 150)))
    def settle(self, process: int, which: int, percent: int) -> None:
        if found := self.open_hold(process, which):
            life, n, hold = found
            held, wanted = hold.amount_nano, hold.amount_nano * percent // 100

            async def work() -> tuple[int, int]:
                return hold.settle(wanted)

            charged, lost = self.do(life, work())
            assert charged + lost == wanted
            assert lost == 0 or charged >= held
            life.journal.append(Charge(n, charged, hold.budgets))

    @rule(process=PROCESSES, which=OPEN_HOLDS)
    def void(self, process: int, which: int) -> None:
        if found := self.open_hold(process, which):

            async def work() -> None:
                found[2].void()

            self.do(found[0], work())

    @rule(process=PROCESSES, which=OPEN_HOLDS, amount=AMOUNTS)
    def extend(self, process: int, which: int, amount: int) -> None:
        if found := self.open_hold(process, which):
            life, n, hold = found
            before = hold.amount_nano
            was_extended = hold.extend(amount)
            assert hold.amount_nano == before + (amount if was_extended else 0)
            life.holds.append((n, hold))

    @rule(process=PROCESSES, reverse=st.booleans(), part=st.integers(1, 5))
    def ship(self, process: int, reverse: bool, part: int) -> None:
        """Some of the journal, from either end; that nothing comes twice is the shipper's."""
        life = self.lives[process]
        batch = life.journal[-part:] if reverse else life.journal[:part]
        life.journal = life.journal[:-part] if reverse else life.journal[part:]
        self.run(self._post(life, batch))

    async def _post(self, life: Life, batch: list[Charge]) -> None:
        postings = [
            Posting(uuid7(), self.accounts[charge.account], None, charge.amount, 0)
            for charge in batch
            if charge.amount
        ]
        budgets = [
            (budget, dt.datetime.fromtimestamp(start, dt.UTC), charge.amount)
            for charge in batch
            for budget, start in charge.budgets
        ]
        async with self.pool.acquire() as connection, connection.transaction():
            await connection.execute(
                "select 1 from incarnations where id = $1 for no key update", life.incarnation.id
            )
            await post_turns(connection, life.incarnation.id, postings, shard=0)
            await post_budgets(connection, life.incarnation.id, budgets)
        for charge in batch:
            self.posted[charge.account] += charge.amount

    @rule(process=PROCESSES, seconds=st.sampled_from((0.0, 2.0, 100.0)))
    def time_passes(self, process: int, seconds: float) -> None:
        """Beats, reports and, after long enough, the return of what is idle."""
        self.clock.advance(seconds)
        life = self.lives[process]
        for _ in range(2):
            self.do(life, life.leases.tend())

    @rule(process=PROCESSES, n=ACCOUNTS)
    def recall(self, process: int, n: int) -> None:
        life = self.lives[process]

        async def work() -> None:
            life.leases.recall(str(self.accounts[n]))
            life.leases.forget_budget(str(self.budgets[n].id))

        self.do(life, work())

    @rule(n=ACCOUNTS, amount=st.integers(1, 500))
    def credit(self, n: int, amount: int) -> None:
        self.credited[n] += amount

        async def work() -> None:
            await self.pool.execute(
                "update ledger_accounts set credit_nano = credit_nano + $2 where kind = 'wallet' and owner_id = $1",
                self.accounts[n], amount,
            )  # fmt: skip
            for life in self.lives:
                life.leases.forget_wallet(str(self.accounts[n]))

        self.run(work())

    @rule(process=PROCESSES)
    def lose_an_answer(self, process: int) -> None:
        """PostgreSQL will commit the next batch and its answer will not arrive."""
        self.lives[process].pool.loses = 1

    @rule(process=PROCESSES, is_shipped=st.booleans())
    def crash(self, process: int, is_shipped: bool) -> None:
        """Open holds are gone; its journal is shipped and its leases closed, or both are given up."""
        life = self.lives[process]

        async def work() -> None:
            if is_shipped:
                await self._post(life, life.journal)
            async with self.pool.acquire() as connection, connection.transaction():
                await close_incarnation(
                    connection, life.incarnation.id, "closed" if is_shipped else "abandoned"
                )
            self.lives[process] = await self._born()

        self.run(work())
        for account in life.leases._accounts.values():
            account.stop_polling()

    @precondition(lambda self: hasattr(self, "lives"))
    @invariant()
    def the_book_adds_up(self) -> None:
        self.run(self._check())

    async def _check(self) -> None:
        for n, account in enumerate(self.accounts):
            wallet = await self.pool.fetchrow(
                "select credit_nano, debit_nano, leased_nano,"
                " (select coalesce(sum(granted_nano - settled_nano - returned_nano), 0)"
                " from spend_leases where account_id = $1) as left_nano"
                " from ledger_accounts where kind = 'wallet' and owner_id = $1",
                account,
            )
            window = await self.pool.fetchrow(
                "select spent_nano, leased_nano, (select coalesce(sum(granted_nano - settled_nano - returned_nano), 0)"
                " from budget_leases where budget_id = $1) as left_nano from budget_windows where budget_id = $1",
                self.budgets[n].id,
            )
            assert wallet["debit_nano"] == self.posted[n]
            assert wallet["leased_nano"] == wallet["left_nano"]
            unshipped = sum(
                charge.amount for life in self.lives for charge in life.journal if charge.account == n
            )
            held = sum(hold.amount_nano for life in self.lives for at, hold in life.holds if at == n)
            assert self.posted[n] + unshipped + held <= wallet["credit_nano"]
            assert unshipped + held <= wallet["leased_nano"]
            if window is not None:
                assert window["leased_nano"] == window["left_nano"]
                assert window["spent_nano"] + window["leased_nano"] <= self.limit
            for life in self.lives:
                self._check_memory(life, n, account)

    def _check_memory(self, life: Life, n: int, account: int) -> None:
        found = life.leases._accounts.get(account)
        if found is None:
            assert not any(at == n and hold.amount_nano for at, hold in life.holds)
            return
        assert all(pot.free_nano >= 0 and pot.held_nano >= 0 for pot in found.all_pots())
        assert found.wallet.held_nano == sum(hold.amount_nano for at, hold in life.holds if at == n)

    def teardown(self) -> None:
        if hasattr(self, "lives"):
            self.run(self._end())

    async def _end(self) -> None:
        for life in self.lives:
            life.pool.loses = 0
            for _, hold in life.holds:
                hold.void()
            life.holds.clear()
            await self._post(life, life.journal)
            life.journal.clear()
            await life.leases._teller.idle()
            await life.leases.close()
        await self._check()
        last = await self._born()
        for n, account in enumerate(self.accounts):
            left = self.credited[n] - self.posted[n]
            if left:
                hold = await last.leases.hold(account, left, ())
                last.journal.append(Charge(n, hold.settle(left)[0], ()))
            try:
                await last.leases.hold(account, 1, ())
                raise AssertionError("more was served than was there")
            except InsufficientFunds:
                pass
        await self._post(last, last.journal)
        await last.leases.close()
        assert self.posted == self.credited


def test_no_interleaving_overspends_or_loses_a_nano(database_url: str, settings: Settings) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        opened = runner.run(open_pool(database_url, max_size=4, timeout_s=10))

        class Model(LeaseModel):
            run = staticmethod(runner.run)
            pool = opened
            config = replace(settings, hold_wait_s=0.0, lease_small_holds=4)

        try:
            run_state_machine_as_test(
                Model,
                settings=hypothesis_settings(
                    max_examples=40, stateful_step_count=30, deadline=None, database=None,
                    suppress_health_check=list(HealthCheck), print_blob=True,
                    phases=(Phase.generate,),  # shrinking over a database takes minutes; add Phase.shrink to do it
                ),
            )  # fmt: skip
        finally:
            runner.run(opened.close())
