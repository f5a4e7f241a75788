"""What one process has in mind of one account: its part of the wallet and of budgets, and the turns that wait for more.

Everything here is memory and decides in an instant; what PostgreSQL says comes through teller.py.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

from billing.lease import Pot, fit

Ended: TypeAlias = Callable[["AccountLease"], None]
"""Told that a hold of this account ended: something may be free."""


Purse: TypeAlias = tuple[tuple[Pot, ...], tuple[tuple[int, float], ...]]
"""What a turn is held from: pots; and of those that are budgets', the budget's id and its window's start in unix seconds."""

UNTOLD = -1
"""What PostgreSQL has been told is free, where that is not known."""


class InsufficientFunds(Exception):
    """The wallet does not buy this turn, not even with all that processes have leased of it."""

    def __init__(self, above_nano: int | None = None) -> None:
        """`above_nano`: all there is, where that is known."""
        super().__init__(above_nano)
        self.above_nano = above_nano


class BillingUnavailable(Exception):
    """Whether the wallet buys this turn can't be told: PostgreSQL is away, or too many turns wait for it."""


@dataclass(frozen=True, slots=True)
class Budget:
    """A budget that a key's turns count in, as its principal knows it."""

    id: int
    key_id: int | None  # None: of all keys together
    period: str  # hour, day, week, month, total


class BudgetExceeded(Exception):
    """What this budget allows in its window is spent."""

    def __init__(self, budget: Budget) -> None:
        super().__init__(f"the budget {budget.id} ({budget.period}) is spent")
        self.budget = budget


@dataclass(slots=True, eq=False)
class Window:
    """One window of a budget and this process's part of it."""

    budget_id: int
    starts_at: float  # unix seconds
    ends_s: float  # monotonic seconds; a little early: the clock was read before PostgreSQL's
    generation: int  # of the teller's when it was last read
    pot: Pot = field(default_factory=Pot)


@dataclass(slots=True, eq=False)
class BudgetLease:
    """A budget's window now, and those before it whose turns have not ended or whose remainder was not returned."""

    id: int
    window: Window | None = None
    older: list[Window] = field(default_factory=list)
    is_gone: bool = False  # it was removed: whoever still names it is not held back
    is_recalled: bool = False  # its terms changed: what is free goes back once
    refused: "Refusal | None" = None


@dataclass(frozen=True, slots=True)
class Refusal:
    """What PostgreSQL could not give, remembered for a moment: a flood of such turns must not reach it each."""

    above_nano: int  # all there was, with every lease
    until_s: float

    def holds(self, amount_nano: int, now_s: float) -> bool:
        return amount_nano > self.above_nano and now_s < self.until_s


@dataclass(slots=True, eq=False)
class Waiter:
    """A turn that waits for its hold."""

    amount_nano: int
    least_nano: int | None
    budgets: tuple[Budget, ...]
    granted: "asyncio.Future[Hold]"
    planned_nano: int = 0  # what was asked of PostgreSQL for it
    is_answered: bool = False  # PostgreSQL said how things stand
    is_late: bool = False  # it has waited as long as turns wait: an answer ends it, whatever it is
    short: Budget | None = None  # the budget that keeps it waiting; None: the wallet

    @property
    def need_nano(self) -> int:
        """The smallest hold that is of use."""
        return self.amount_nano if self.least_nano is None else min(self.least_nano, self.amount_nano)

    def run_out(self) -> None:
        """It waited in vain, and PostgreSQL said how things stand."""
        if not self.granted.done():
            self.granted.set_exception(BudgetExceeded(self.short) if self.short else InsufficientFunds())

    def refuse(self) -> None:
        """Nothing can be told about its money now."""
        if not self.granted.done():
            self.granted.set_exception(BillingUnavailable("the ledger can't be reached"))


@dataclass(slots=True, eq=False)
class AccountLease:
    """One account."""

    id: int
    used_s: float  # monotonic seconds of its last hold
    wallet: Pot = field(default_factory=Pot)
    budgets: dict[int, BudgetLease] = field(default_factory=dict)
    waiters: deque[Waiter] = field(default_factory=deque)
    is_returning: bool = False  # what a hold leaves goes back at once: a pot is small, or a window is over
    is_busy: bool = False  # with the teller
    is_dropping: bool = False  # idle: everything goes back, then it is forgotten
    refused: Refusal | None = None
    poll_s: float = 0.0
    poll: asyncio.TimerHandle | None = None
    told_free_nano: int = 0  # as last reported
    told_held_nano: int = 0
    hold_nano: int = 0  # about what its turns hold
    peak_nano_s: int = 0
    spent_nano: int = 0  # settled and held when the peak was last measured
    measured_s: float = 0.0
    taken_s: float = float("-inf")

    def pots(self, budgets: tuple[Budget, ...], now_s: float, generation: int) -> tuple[Pot, ...] | None:
        """The wallet's pot and that of each budget's window of now; None where a window is over or not known."""
        purse = self.purse(budgets, now_s, generation)
        return purse and purse[0]

    def purse(self, budgets: tuple[Budget, ...], now_s: float, generation: int) -> Purse | None:
        """The same pots, and what the usage record names: each budget with the start of its window."""
        if not budgets:
            return (self.wallet,), ()
        pots = [self.wallet]
        windows = []
        for budget in budgets:
            lease = self.budgets.get(budget.id)
            if lease is None:
                return None
            if lease.is_gone:
                continue
            window = lease.window
            if window is None or now_s >= window.ends_s or window.generation != generation:
                return None
            pots.append(window.pot)
            windows.append((lease.id, window.starts_at))
        return tuple(pots), tuple(windows)

    def waiting(self) -> Iterator[Waiter]:
        """Those who still wait, first come first."""
        return (waiter for waiter in self.waiters if not waiter.granted.done())

    def all_windows(self) -> Iterator[Window]:
        for lease in self.budgets.values():
            if lease.window is not None:
                yield lease.window
            yield from lease.older

    def all_pots(self) -> Iterator[Pot]:
        yield self.wallet
        for window in self.all_windows():
            yield window.pot

    @property
    def is_empty(self) -> bool:
        """Forgetting it would lose nothing."""
        return not self.waiters and all(pot.is_empty for pot in self.all_pots())

    def stop_polling(self) -> None:
        if self.poll is not None:
            self.poll.cancel()
            self.poll = None


class Hold:
    """Money set aside for one turn; ended once, by `settle` or `void`."""

    __slots__ = ("_account", "_ended", "_is_open", "_pots", "amount_nano", "budgets")

    def __init__(
        self, account: AccountLease | None, pots: tuple[Pot, ...], amount_nano: int,
        budgets: tuple[tuple[int, float], ...], ended: "Ended",
    ) -> None:  # fmt: skip
        self._account = account
        self._pots = pots
        self._ended = ended
        self._is_open = True
        self.amount_nano = amount_nano
        self.budgets = budgets  # (budget id, its window's start in unix seconds), for the usage record
        for pot in pots:
            pot.hold(amount_nano)

    def __repr__(self) -> str:
        return f"<Hold {self.amount_nano}{'' if self._is_open else ' ended'}>"

    def extend(self, amount_nano: int) -> bool:
        """Set so much more aside, of what is free here; False, and nothing changed, if that does not suffice."""
        if not self._is_open or not self._pots or any(pot.free_nano < amount_nano for pot in self._pots):
            return False
        for pot in self._pots:
            pot.hold(amount_nano)
        self.amount_nano += amount_nano
        return True

    def settle(self, amount_nano: int) -> tuple[int, int]:
        """What the turn cost: (charged, lost). Beyond the hold it is charged as far as something is free here, the rest
        is the platform's loss. A second end raises RuntimeError: somebody would be charged twice.
        """
        if not self._is_open:
            raise RuntimeError("this hold has ended")
        if amount_nano <= self.amount_nano:
            self._end(amount_nano)
            return amount_nano, 0
        if self._pots:
            beyond_nano = amount_nano - self.amount_nano
            self.extend(min(beyond_nano, *(max(0, pot.free_nano) for pot in self._pots)))
        charged_nano = min(amount_nano, self.amount_nano)
        self._end(charged_nano)
        return charged_nano, amount_nano - charged_nano

    def void(self) -> None:
        """Give all of it back. After an end it does nothing, so that it can stand in a `finally`."""
        if self._is_open:
            self._end(0)

    def _end(self, charged_nano: int) -> None:
        self._is_open = False
        for pot in self._pots:
            pot.release(self.amount_nano, charged_nano)
        if self._account is not None:
            self._ended(self._account)


def serve(account: AccountLease, now_s: float, generation: int, ended: Ended) -> None:
    """Give waiting turns what is free, first come first served: whoever lacks a pot keeps those behind from it, too."""
    waiters, blocked, kept = account.waiters, set[Pot](), list[Waiter]()
    while waiters and account.wallet not in blocked:
        waiter = waiters.popleft()
        if waiter.granted.done():
            continue
        purse = account.purse(waiter.budgets, now_s, generation)
        amount_nano = waiter.planned_nano or waiter.amount_nano
        if purse is None:  # its window must be read first, and nobody overtakes it at the wallet
            purse, amount_nano = ((account.wallet,), ()), account.wallet.free_nano + 1
        pots, windows = purse
        lacking = [pot for pot in pots if pot in blocked or pot.free_nano < amount_nano]
        if lacking:
            blocked.update(lacking)
            kept.append(waiter)
        else:
            waiter.granted.set_result(Hold(account, pots, amount_nano, windows, ended))
    waiters.extendleft(reversed(kept))


def serve_smaller(account: AccountLease, now_s: float, generation: int, ended: Ended) -> None:
    """While PostgreSQL is away: turns that a smaller hold is of use to get one, of what is free here."""
    for waiter in list(account.waiting()):
        pots = account.pots(waiter.budgets, now_s, generation)
        if pots is None:
            return
        room_nano = min(pot.free_nano for pot in pots)
        waiter.planned_nano = fit(waiter.amount_nano, waiter.least_nano, room_nano)
        if not waiter.planned_nano:
            return
        serve(account, now_s, generation, ended)
