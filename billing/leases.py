"""Spend leases: what this process may spend of each account without asking, and how turns get their holds from it.

The hot path is memory only. How PostgreSQL is asked is teller.py's, what is taken lease_plan.py's; the book is ledger.py's.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from heapq import nsmallest
from itertools import islice
from typing import Any

import asyncpg

from billing.incarnations import Incarnation
from billing.lease import block_nano, low_after, peak_after
from billing.lease_account import (
    UNTOLD,
    AccountLease,
    BillingUnavailable,
    Budget,
    BudgetExceeded,
    BudgetLease,
    Hold,
    InsufficientFunds,
    Waiter,
    serve,
)
from billing.lease_plan import SMALL_S
from billing.lease_store import beat, report
from billing.teller import Teller
from config.changes import EVERYTHING
from config.clock import Clock
from config.defaults import Settings
from config.metrics import Metrics
from config.postgres import AWAY

__all__ = ["BillingUnavailable", "Budget", "BudgetExceeded", "Hold", "InsufficientFunds", "SpendLeases"]

log = logging.getLogger("poolgate.leases")

WAITERS_MAX = 16_384
"""Turns of one process that wait for money; each is an open request, so a flood ends here and not in memory."""

BEAT_S = 5.0
BEATS_IN_GRACE = 20
"""How often a process says that it lives: often enough that many beats may fail within `lease_grace_s`."""

LIVE_BEATS = 4
"""Processes heard of within so many beats share the wallets."""

REPORT_MAX = 1_000
"""Leases reported in one statement: what a larger one needs for a moment would stay with the process."""

SWEEP_MIN = 1_000
"""Accounts looked at in one round of housekeeping, at least; all of them are seen once in `lease_idle_s`."""

AWAY_PATIENCE_S = 0.5
"""How long a turn waits for an answer from a PostgreSQL that did not give the last one."""


class SpendLeases:
    """The leases of one process. `is_lost` is set when the process was given up: it must end."""

    def __init__(
        self, pool: asyncpg.Pool, incarnation: Incarnation, settings: Settings, clock: Clock,
        metrics: Metrics | None = None, wake: Callable[[], Coroutine[Any, Any, None]] | None = None,
    ) -> None:  # fmt: skip
        """`wake` has other processes read the change log at once (config.changes.wake_feeds)."""
        self._pool = pool
        self._incarnation = incarnation
        self._settings = settings
        self._now_s = clock.monotonic
        self._metrics = metrics
        self._beat_s = min(BEAT_S, settings.lease_grace_s / BEATS_IN_GRACE)
        self._pause_s = min(self._beat_s, settings.lease_report_s, settings.lease_idle_s / 2)
        self._teller = Teller(
            pool, incarnation, settings, clock, live_s=LIVE_BEATS * self._beat_s, metrics=metrics, wake=wake,
            ended=self._ended,
        )  # fmt: skip
        self._accounts: dict[int, AccountLease] = {}
        self._by_budget: dict[int, AccountLease] = {}
        self._changed: set[AccountLease] = set()  # since the last report
        self._sweeping: list[AccountLease] = []
        self._waiting = 0
        self._is_closed = False
        self._beaten_s = float("-inf")
        self._reported_s = float("-inf")
        self._started_s = clock.monotonic()
        self._usable_until_s = clock.monotonic() + _trusted_s(settings)

    def __repr__(self) -> str:
        return f"<SpendLeases of {len(self._accounts)} accounts, {self._waiting} turns waiting>"

    @property
    def is_lost(self) -> asyncio.Event:
        """Set when PostgreSQL said that this incarnation was ended: what is free here belongs to the wallets again."""
        return self._teller.is_lost

    @property
    def live_count(self) -> int:
        """Processes that lease, this one included."""
        return self._teller.live_count

    @property
    def is_away(self) -> bool:
        """Whether PostgreSQL did not answer when it was last asked."""
        return self._teller.is_away

    def try_hold(self, account_id: int, amount_nano: int, budgets: tuple[Budget, ...]) -> Hold | None:
        """A hold out of what is leased already, or None: `hold` may still get one. Memory only.

        A hold of 0 needs no lease, and no budget stands in its way: nothing can be spent on it.
        """
        now_s = self._now_s()
        if not self._is_usable(now_s):
            return None
        if amount_nano <= 0:
            return Hold(None, (), 0, (), self._ended)
        account = self._accounts.get(account_id)
        if account is None or account.waiters or amount_nano > account.wallet.free_nano:
            return None
        purse = account.purse(budgets, now_s, self._teller.generation)
        if purse is None:
            return None
        pots, windows = purse
        is_low = False
        for pot in pots:  # a generator for each question would cost as much as the hold
            left_nano = pot.free_nano - amount_nano
            if left_nano < 0:
                return None
            if left_nano < pot.low_nano:
                is_low = True
        account.used_s = now_s
        hold = Hold(account, pots, amount_nano, windows, self._ended)
        self._changed.add(account)
        if is_low and not account.is_busy:
            self._teller.bring(account)
        return hold

    async def hold(
        self, account_id: int, amount_nano: int, budgets: tuple[Budget, ...], *, least_nano: int | None = None
    ) -> Hold:
        """A hold, if need be after asking PostgreSQL and waiting up to `hold_wait_s` for what others don't use.

        `least_nano`: where `amount_nano` is not available, a smaller hold is of use: half of what is available, but at
        least this. Raises InsufficientFunds, BudgetExceeded, BillingUnavailable.
        """
        held = self.try_hold(account_id, amount_nano, budgets)
        if held is not None:
            return held
        now_s = self._now_s()
        if not self._is_usable(now_s):
            raise BillingUnavailable("this process may not use its leases")
        if self._waiting >= WAITERS_MAX:
            raise BillingUnavailable("too many turns wait for their wallets")
        account = self._account(account_id, now_s)
        future: asyncio.Future[Hold] = asyncio.get_running_loop().create_future()
        waiter = Waiter(amount_nano, least_nano, budgets, future)
        self._check_refused(account, waiter, now_s)
        for budget in budgets:
            if budget.id not in account.budgets:
                account.budgets[budget.id] = BudgetLease(budget.id)
                self._by_budget[budget.id] = account
        account.used_s = now_s
        return await self._wait(account, waiter)

    async def run(self) -> None:
        """Beats, reports, returns what is idle, and brings again what failed; until cancelled."""
        while True:
            await self.tend()
            await asyncio.sleep(self._pause_s)

    async def tend(self) -> None:
        """One round of `run`."""
        now_s = self._now_s()
        if now_s - self._beaten_s >= self._beat_s:
            await self._beat(now_s)
        if now_s - self._reported_s >= self._settings.lease_report_s:
            round_s = min(now_s - self._reported_s, now_s - self._started_s)
            self._reported_s = now_s
            self._measure(now_s, max(round_s, self._settings.lease_report_s))
            await self._report()
        for account in list(self._teller.failed):
            self._teller.bring(account)
        self._sweep(now_s)
        if self._metrics is not None:
            self._metrics.leases.set(len(self._accounts))

    async def close(self) -> None:
        """Return all that is free, and report what is still held. Turns that wait are refused."""
        self._is_closed = True
        for account in self._accounts.values():
            account.stop_polling()
            account.is_dropping = True
            for waiter in account.waiting():
                waiter.refuse()
            self._teller.bring(account)
        try:
            async with asyncio.timeout(2 * self._settings.database_timeout_s):
                await self._teller.idle()
                await self._report()
        except TimeoutError:
            log.warning("leases were not returned: PostgreSQL is away", extra={"action": "leases_kept"})

    def forget_wallet(self, entity: str) -> None:
        """A wallet was credited, or its account changed: turns that were refused are heard again.

        EVERYTHING changes nothing: refusals are forgotten within a second anyhow.
        """
        account = self._find(entity)
        if account is not None:
            account.refused = None
            if account.waiters:
                self._teller.bring(account)

    def recall(self, entity: str) -> None:
        """Somebody lacks this wallet's money: return what is free, and lease turn by turn for a while.

        EVERYTHING changes nothing: after so long an absence what is idle went back, and who waits asks again.
        """
        account = self._find(entity)
        if account is not None:
            self._make_small(account)

    def _make_small(self, account: AccountLease) -> None:
        account.refused = None
        account.wallet.small_until_s = self._now_s() + SMALL_S
        account.wallet.is_small = account.is_returning = True
        account.wallet.low_nano = 0
        if account.wallet.free_nano > 0 or account.waiters:
            self._teller.bring(account)

    def forget_budget(self, entity: str) -> None:
        """A budget was set, reset or removed, or somebody lacks it: return what is free of it and read it anew.

        EVERYTHING has every budget read anew at its next turn; what is free of it counts until then.
        """
        if entity == EVERYTHING:
            self._teller.generation += 1
            return
        account = self._by_budget.get(int(entity)) if entity.isdecimal() else None
        lease = account.budgets.get(int(entity)) if account is not None else None
        if account is None or lease is None:
            return
        lease.refused = None
        lease.is_recalled = True
        if lease.window is not None:
            lease.window.generation = -1
        self._teller.bring(account)

    def _is_usable(self, now_s: float) -> bool:
        """A process that PostgreSQL has not heard of for long may have been given up, its money returned."""
        return now_s < self._usable_until_s and not self._is_closed and not self._teller.is_lost.is_set()

    def _account(self, account_id: int, now_s: float) -> AccountLease:
        account = self._accounts.get(account_id)
        if account is None:
            # The next sweep makes room; an eighth more is for what comes until then.
            if len(self._accounts) >= self._settings.leases_max * 9 // 8:
                raise BillingUnavailable("too many accounts are active in this process")
            account = self._accounts[account_id] = AccountLease(account_id, now_s, measured_s=now_s)
        return account

    def _check_refused(self, account: AccountLease, waiter: Waiter, now_s: float) -> None:
        if account.refused is not None and account.refused.holds(waiter.need_nano, now_s):
            raise InsufficientFunds(account.refused.above_nano)
        for budget in waiter.budgets:
            lease = account.budgets.get(budget.id)
            if (
                lease is not None
                and lease.refused is not None
                and lease.refused.holds(waiter.need_nano, now_s)
            ):
                raise BudgetExceeded(budget)

    async def _wait(self, account: AccountLease, waiter: Waiter) -> Hold:
        account.waiters.append(waiter)
        serve(account, self._now_s(), self._teller.generation, self._ended)
        if waiter.granted.done():  # those before it wait for a budget that is none of its
            return waiter.granted.result()
        self._waiting += 1
        self._teller.bring(account)
        loop = asyncio.get_running_loop()
        wait_s = self._settings.hold_wait_s
        ends = loop.call_later(
            min(wait_s, AWAY_PATIENCE_S) if self.is_away else wait_s, self._run_out, waiter
        )
        last = loop.call_later(max(wait_s, self._settings.database_timeout_s), waiter.refuse)
        try:
            return await waiter.granted
        except asyncio.CancelledError:
            if waiter.granted.done() and not waiter.granted.cancelled() and not waiter.granted.exception():
                waiter.granted.result().void()
            raise
        finally:
            ends.cancel()
            last.cancel()
            self._waiting -= 1
            self._leave(account, waiter)

    def _run_out(self, waiter: Waiter) -> None:
        """`hold_wait_s` is over: 402 only if PostgreSQL said how things stand, else it may answer a little longer."""
        waiter.is_late = True
        if waiter.is_answered:
            waiter.run_out()
        elif self.is_away:
            waiter.refuse()

    def _leave(self, account: AccountLease, waiter: Waiter) -> None:
        """Those behind it don't wait for one who left."""
        self._changed.add(account)
        if waiter in account.waiters:
            account.waiters.remove(waiter)
            serve(account, self._now_s(), self._teller.generation, self._ended)

    def _ended(self, account: AccountLease) -> None:
        """A hold ended: what is free goes to this process's own waiting turns first, then back if the pot is small."""
        self._changed.add(account)
        if account.waiters:
            serve(account, self._now_s(), self._teller.generation, self._ended)
        if account.is_returning and not account.waiters and not self._is_closed:
            self._teller.bring(account)

    def _find(self, entity: str) -> AccountLease | None:
        return self._accounts.get(int(entity)) if entity.isdecimal() else None

    async def _beat(self, now_s: float) -> None:
        self._beaten_s = now_s
        try:
            live = await beat(
                self._pool, self._incarnation.id, LIVE_BEATS * self._beat_s, self._settings.database_timeout_s
            )
        except AWAY as error:
            self._teller.note_away(error)
            self._beaten_s = float("-inf")  # again in the next round
            return
        self._teller.note_back()
        if live is None:
            self._teller.lose()
            return
        self._teller.live_count = live
        self._usable_until_s = now_s + _trusted_s(self._settings)

    def _measure(self, now_s: float, round_s: float) -> None:
        """How fast the accounts that changed in this round spend, and so how low their leases may run."""
        round_ms = round(round_s * 1000)
        for account in self._changed:
            wallet = account.wallet
            spent_nano = wallet.settled_nano + wallet.held_nano
            elapsed_ms = round((now_s - account.measured_s) * 1000)
            account.peak_nano_s = peak_after(
                account.peak_nano_s, max(0, spent_nano - account.spent_nano), elapsed_ms, round_ms
            )
            account.spent_nano, account.measured_s = spent_nano, now_s
            wanted_nano = block_nano(account.peak_nano_s, self._settings.lease_block_s, account.hold_nano)
            for pot in account.all_pots():
                pot.low_nano = low_after(pot, wanted_nano)

    async def _report(self) -> None:
        """Tell what is free and held of the leases that changed. What can't be told is told in the next round, and so is
        what the teller wrote meanwhile: which of the two came last can't be known.
        """
        changed, self._changed = self._changed, set()
        while changed:
            batch = [changed.pop() for _ in range(min(REPORT_MAX, len(changed)))]
            told = [account for account in batch if _tell(account)]
            rows = [(account.id, account.told_free_nano, account.told_held_nano) for account in told]
            if not rows:
                continue
            try:
                await report(self._pool, self._incarnation.id, rows, self._settings.database_timeout_s)
            except AWAY as error:
                self._teller.note_away(error)
                changed.update(batch)
                for account in changed:
                    account.told_free_nano = UNTOLD
                self._changed.update(changed)
                return
            for account, row in zip(told, rows, strict=True):
                if row != (account.id, account.told_free_nano, account.told_held_nano):
                    account.told_free_nano = UNTOLD
                    self._changed.add(account)

    def _sweep(self, now_s: float) -> None:
        """Give back what is idle; a slice of the accounts a round, so that no round is long."""
        most = self._settings.leases_max
        over = len(self._accounts) - most
        if over > 0:  # some more, so that not every round looks for the oldest of so many
            over += most // 64
            for account in nsmallest(over, self._accounts.values(), key=lambda account: account.used_s):
                self._drop(account)
        if not self._sweeping:
            self._sweeping = list(self._accounts.values())
        count = max(SWEEP_MIN, round(len(self._accounts) * self._pause_s / self._settings.lease_idle_s))
        for account in islice(self._sweeping, count):
            if now_s - account.used_s >= self._settings.lease_idle_s:
                self._drop(account)
            elif any(pot.free_nano > 2 * pot.block_nano > 0 for pot in account.all_pots()):
                self._teller.bring(account)
        del self._sweeping[:count]

    def _drop(self, account: AccountLease) -> None:
        """Return what is free; forgotten once PostgreSQL has it, and its own report is the last."""
        if account.is_busy or account.waiters or self._accounts.get(account.id) is not account:
            return
        wallet = account.wallet
        if account.is_empty and (wallet.is_fresh or _is_told_empty(account) or not wallet.granted_nano):
            account.stop_polling()
            del self._accounts[account.id]
            self._teller.failed.discard(account)
            for budget_id in account.budgets:
                self._by_budget.pop(budget_id, None)
            return
        account.is_dropping = True
        self._changed.add(account)  # also what could not be told is told once more
        self._teller.bring(account)


def _tell(account: AccountLease) -> bool:
    """Note what is free and held as told; False where it was told before, or is not ours to tell yet."""
    wallet = account.wallet
    free_nano, held_nano = max(0, wallet.free_nano), wallet.held_nano
    if wallet.is_fresh or (free_nano == account.told_free_nano and held_nano == account.told_held_nano):
        return False
    account.told_free_nano, account.told_held_nano = free_nano, held_nano
    return True


def _is_told_empty(account: AccountLease) -> bool:
    return account.told_free_nano == 0 and account.told_held_nano == 0


def _trusted_s(settings: Settings) -> float:
    """How long leases may be used after PostgreSQL was last heard: short of the grace, by what clocks and time-outs may
    differ (half of a grace that is shorter than those).
    """
    grace_s = settings.lease_grace_s
    return grace_s - min(grace_s / 2, max(grace_s / 10, 2 * settings.database_timeout_s))
