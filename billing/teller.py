"""The teller: brings what this process's accounts take and return to PostgreSQL, one batch after the other.

All accounts that ask in one tick of the loop go in one transaction. What to take is lease_plan.py's to decide, who is
served first lease_account.py's, and who asks leases.py's.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

import asyncpg

from billing.incarnations import Incarnation
from billing.lease_account import (
    UNTOLD,
    AccountLease,
    BudgetExceeded,
    Ended,
    InsufficientFunds,
    Refusal,
    serve,
    serve_smaller,
)
from billing.lease_plan import Plan, decide, wanted_budgets
from billing.lease_store import Book, NotRegistered, read_book, recall, transaction, write
from config.clock import Clock
from config.defaults import Settings
from config.metrics import Metrics
from config.postgres import AWAY

log = logging.getLogger("poolgate.leases")

BATCH_MAX = 1_000
"""Accounts in one transaction: it holds their wallets' locks for some 20 ms."""

POLL_MIN_S, POLL_MAX_S = 0.05, 0.2
"""How often PostgreSQL is asked again for an account whose turns wait, one question for all of them."""

REFUSAL_S = 1.0
"""How long it is remembered that a wallet or budget has not enough; a change of it is heard sooner."""

ATTEMPTS = 3
"""A batch is tried so often when its connection was dead or it met a deadlock or a budget just removed."""

PASSING = (
    asyncpg.DeadlockDetectedError, asyncpg.SerializationError, asyncpg.ForeignKeyViolationError,
    asyncpg.PostgresConnectionError, asyncpg.InterfaceError, asyncpg.InternalClientError,
    asyncpg.AdminShutdownError, ConnectionResetError,
)  # fmt: skip
"""Failures that the next attempt may not meet."""


class Teller:
    """One lane to PostgreSQL: batches never overtake each other, so that their answers can't be confused."""

    def __init__(
        self, pool: asyncpg.Pool, incarnation: Incarnation, settings: Settings, clock: Clock, *,
        live_s: float, metrics: Metrics | None, wake: Callable[[], Coroutine[Any, Any, None]] | None, ended: Ended,
    ) -> None:  # fmt: skip
        self._pool = pool
        self._incarnation = incarnation
        self._settings = settings
        self._clock = clock
        self._live_s = live_s
        self._metrics = metrics
        self._wake = wake
        self._ended = ended
        self._due: dict[AccountLease, None] = {}
        self._lane: asyncio.Task[None] | None = None
        self._waking: asyncio.Task[None] | None = None
        self.failed: set[AccountLease] = set()  # to be brought again
        self.live_count = 1
        self.generation = 0  # raised to have every budget's window read anew
        self.is_away = False
        self.is_lost = asyncio.Event()

    def bring(self, account: AccountLease) -> None:
        """Have this account in the next batch."""
        if self.is_lost.is_set():
            return
        account.is_busy = True
        self._due[account] = None
        if self._lane is None or self._lane.done():
            self._lane = asyncio.create_task(self._work(), name="lease-teller")

    async def idle(self) -> None:
        """Wait until nothing is due."""
        while self._lane is not None and not self._lane.done():
            await asyncio.wait([self._lane])

    def lose(self) -> None:
        """This incarnation was ended: all that it had leased belongs to the wallets again."""
        if not self.is_lost.is_set():
            log.critical(
                "this process was given up: its leases are void, and it ends", extra={"action": "leases_lost"}
            )
        self.is_lost.set()

    def note_away(self, error: BaseException) -> None:
        if not self.is_away:
            log.warning(
                "wallets can't be reached: %s", error or type(error).__name__, extra={"action": "leases_away"}
            )
        self.is_away = True

    def note_back(self) -> None:
        if self.is_away:
            log.info("wallets are reached again", extra={"action": "leases_back"})
        self.is_away = False

    async def _work(self) -> None:
        await asyncio.sleep(0)  # whoever asks in this tick comes along
        while self._due:
            batch = list(self._due)[:BATCH_MAX]
            for account in batch:
                del self._due[account]
            await self._bring(batch)

    async def _bring(self, batch: list[AccountLease]) -> None:
        try:
            plan = await self._exchange(batch)
        except asyncpg.IntegrityConstraintViolationError as error:
            await self._divide(batch, error)
        except (*AWAY, NotRegistered) as error:
            self._fail(batch, error)
        except Exception as error:
            # A fault of ours. Turns are refused, and nothing is granted that PostgreSQL did not confirm.
            log.exception("a batch of leases failed", extra={"action": "leases_failed"})
            self._fail(batch, error)
        else:
            self.note_back()
            if plan is None:
                self.lose()
                self._refuse_all(batch)
            else:
                self._apply(batch, plan)
                if plan.recall_accounts or plan.recall_budgets:
                    self._wake_others()
        for account in batch:
            account.is_busy = account in self._due

    async def _divide(self, batch: list[AccountLease], error: asyncpg.PostgresError) -> None:
        """Something is wrong with one account's money: the others' turns must not wait for a person to look at it."""
        if len(batch) > 1:
            middle = len(batch) // 2
            await self._bring(batch[:middle])
            await self._bring(batch[middle:])
            return
        log.error(
            "the wallet or a budget of account %d refuses: %s", batch[0].id, error,
            extra={"action": "lease_refused", "account_id": batch[0].id},
        )  # fmt: skip
        self._give_up(batch)

    def _wake_others(self) -> None:
        """Beside the lane: Valkey may be slow, and turns wait."""
        if self._wake is not None and (self._waking is None or self._waking.done()):
            self._waking = asyncio.create_task(self._wake(), name="lease-wake")

    async def _exchange(self, batch: list[AccountLease]) -> Plan | None:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return await self._exchange_once(batch)
            except PASSING:
                if attempt == ATTEMPTS:
                    raise
        raise AssertionError("the last attempt returns or raises")

    async def _exchange_once(self, batch: list[AccountLease]) -> Plan | None:
        """One transaction: lock and read, decide on memory as it is then, write."""
        settings, incarnation_id = self._settings, self._incarnation.id
        async with transaction(self._pool, settings.database_timeout_s) as connection:
            sent_s = self._clock.monotonic()
            asked = {budget_id for account in batch for budget_id in wanted_budgets(account)}
            opens = any(self._lacks_window(account, asked, sent_s) for account in batch)
            older = {
                (window.budget_id, window.starts_at)
                for account in batch for lease in account.budgets.values() if lease.id in asked
                for window in (*lease.older, lease.window) if window is not None
            }  # fmt: skip
            book = await read_book(
                connection, incarnation_id, self._live_s, [account.id for account in batch], asked, older,
                opens_windows=opens,
            )  # fmt: skip
            if book is None:
                return None
            self.live_count = book.live
            plan = self._decide(batch, asked, book, sent_s, opens)
            await write(connection, incarnation_id, plan.wallets, plan.windows)
            if plan.recall_accounts or plan.recall_budgets:
                await recall(connection, plan.recall_accounts, plan.recall_budgets)
            return plan

    def _decide(
        self, batch: list[AccountLease], asked: set[int], book: Book, sent_s: float, opened: bool
    ) -> Plan:
        return decide(
            batch, asked, book, self._settings, sent_s=sent_s, now_s=self._clock.monotonic(),
            generation=self.generation, opened=opened,
        )  # fmt: skip

    def _lacks_window(self, account: AccountLease, asked: set[int], now_s: float) -> bool:
        return any(
            lease.id in asked and (lease.window is None or now_s >= lease.window.ends_s)
            for lease in account.budgets.values()
        )

    def _apply(self, batch: list[AccountLease], plan: Plan) -> None:
        for change in plan.changes:
            change.commit()
        now_s = self._clock.monotonic()
        refused = False
        for account in batch:
            self.failed.discard(account)
            serve(account, now_s, self.generation, self._ended)
            refused |= self._answer(account, plan, now_s)
            account.is_dropping = False
            _tidy(account)
            if any(not waiter.granted.done() for waiter in account.waiters):
                self._poll_later(account)
            else:
                account.poll_s = 0.0
        for account in plan.unread:
            self.bring(account)
        if self._metrics is not None:
            self._metrics.lease_requests.labels("refused" if refused else "granted").inc()

    def _answer(self, account: AccountLease, plan: Plan, now_s: float) -> bool:
        """Those still waiting: refuse whom nothing that is leased anywhere could serve."""
        refused = False
        for waiter in account.waiting():
            pots = account.pots(waiter.budgets, now_s, self.generation)
            if pots is None or any(pot not in plan.totals for pot in pots):
                continue  # not read yet
            waiter.is_answered = True
            if waiter.need_nano > plan.totals[account.wallet]:
                account.refused = Refusal(plan.totals[account.wallet], now_s + REFUSAL_S)
                waiter.granted.set_exception(InsufficientFunds(plan.totals[account.wallet]))
                refused = True
                continue
            for budget in waiter.budgets:
                lease = account.budgets[budget.id]
                if lease.window is None or waiter.need_nano <= plan.totals[lease.window.pot]:
                    continue
                until_s = min(now_s + REFUSAL_S, lease.window.ends_s)
                lease.refused = Refusal(plan.totals[lease.window.pot], until_s)
                waiter.granted.set_exception(BudgetExceeded(budget))
                refused = True
                break
            if waiter.is_late:
                waiter.run_out()
        return refused

    def _poll_later(self, account: AccountLease) -> None:
        if account.poll is None:
            account.poll_s = min(max(POLL_MIN_S, 2 * account.poll_s), POLL_MAX_S)
            loop = asyncio.get_running_loop()
            account.poll = loop.call_later(account.poll_s, self._poll, account)

    def _poll(self, account: AccountLease) -> None:
        account.poll = None
        if any(not waiter.granted.done() for waiter in account.waiters):
            self.bring(account)

    def _fail(self, batch: list[AccountLease], error: BaseException) -> None:
        self.note_away(error)
        self._give_up(batch)

    def _give_up(self, batch: list[AccountLease]) -> None:
        """For now: their waiting turns are refused, and they are brought again in a while."""
        now_s = self._clock.monotonic()
        for account in batch:
            account.told_free_nano = UNTOLD
            serve_smaller(account, now_s, self.generation, self._ended)
        self.failed.update(batch)
        self._refuse_all(batch)
        if self._metrics is not None:
            self._metrics.lease_requests.labels("failed").inc()

    def _refuse_all(self, batch: list[AccountLease]) -> None:
        for account in batch:
            for waiter in account.waiting():
                waiter.refuse()


def _tidy(account: AccountLease) -> None:
    """Forget windows that are over and done with; see whether what holds leave goes back at once."""
    for lease in account.budgets.values():
        lease.older = [window for window in lease.older if not window.pot.is_empty]
    account.is_returning = account.wallet.is_small or any(
        lease.older or (lease.window is not None and lease.window.pot.is_small)
        for lease in account.budgets.values()
    )
