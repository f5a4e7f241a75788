"""What a batch of accounts takes and returns, decided on a book that is locked: memory and integers, no I/O.

What is returned stops being free here and now; what is granted becomes free when the transaction has ended well.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from billing.lease import Pot, block_nano, fit, grant_nano, is_small, surplus_nano
from billing.lease_account import AccountLease, Budget, BudgetLease, Waiter, Window
from billing.lease_store import Book, Entry, Source, WindowKey
from config.defaults import Settings

SMALL_S = 10.0
"""A wallet whose remainders were asked for is leased turn by turn for so long: others want it, too."""

RECALL_S = 0.5
"""Other processes are asked for their remainders this often while turns wait: one may have taken anew."""

BURST_S = 1.0
"""A block that lasted less was too small, whatever the measured rate says: the next one is twice as large."""

_NOTHING = Source(0, 0)


@dataclass(slots=True)
class Change:
    """What becomes of one pot when the transaction commits."""

    pot: Pot
    coming_nano: int
    returned_nano: int
    used_nano: int

    def commit(self) -> None:
        self.pot.told(self.returned_nano, self.used_nano)
        self.pot.grant(self.coming_nano)


@dataclass(slots=True)
class Plan:
    """What is to be written, and what follows from it."""

    wallets: dict[int, Entry] = field(default_factory=dict)
    windows: dict[WindowKey, Entry] = field(default_factory=dict)
    changes: list[Change] = field(default_factory=list)
    recall_accounts: list[int] = field(default_factory=list)
    recall_budgets: list[int] = field(default_factory=list)
    totals: dict[Pot, int] = field(default_factory=dict)  # all there is: available, ours, others' leases
    unread: list[AccountLease] = field(
        default_factory=list
    )  # a turn came that needs budgets which were not locked


def wanted_budgets(account: AccountLease) -> set[int]:
    """Budgets that this account's part of the batch must lock."""
    wanted = {budget.id for waiter in account.waiting() for budget in waiter.budgets}
    for lease in account.budgets.values():
        if lease.is_recalled or lease.older or account.is_dropping or _has_business(lease.window):
            wanted.add(lease.id)
    return {budget_id for budget_id in wanted if not account.budgets[budget_id].is_gone}


def _has_business(window: Window | None) -> bool:
    if window is None:
        return False
    pot = window.pot
    return (
        pot.free_nano < pot.low_nano
        or (pot.is_small and pot.free_nano > 0)
        or pot.returned_nano != pot.confirmed_nano
    )


def decide(
    accounts: Iterable[AccountLease], asked: set[int], book: Book, settings: Settings, *,
    sent_s: float, now_s: float, generation: int, opened: bool,
) -> Plan:  # fmt: skip
    """`asked`: the budgets that were locked, with windows made where they lacked if `opened`. `sent_s`: monotonic seconds
    before PostgreSQL's clock was read."""
    plan = Plan()
    for account in accounts:
        sources = {account.wallet: book.wallets.get(account.id, _NOTHING)}
        if account.wallet.is_fresh:  # what it spent in an earlier life is no spending of now
            account.wallet.sync(sources[account.wallet].lease)
            account.spent_nano = account.wallet.settled_nano
        else:
            account.wallet.sync(sources[account.wallet].lease)
        for lease in account.budgets.values():
            if lease.id in asked:
                _read_windows(lease, sources, book, sent_s, generation, opened=opened)
        for pot, source in sources.items():
            plan.totals[pot] = _total(pot, source)
        needs = _plan_waiters(account, sources, plan, asked, now_s, generation)
        _move(account, sources, needs, book.live, settings, plan, now_s)
    return plan


def _read_windows(
    lease: BudgetLease,
    sources: dict[Pot, Source],
    book: Book,
    sent_s: float,
    generation: int,
    *,
    opened: bool,
) -> None:
    current = book.current.get(lease.id)
    if lease.window is not None and (current is None or current.starts_at != lease.window.starts_at):
        lease.older.append(lease.window)
        lease.window = None
    if current is None:
        lease.is_gone = opened
    else:
        if lease.window is None:
            lease.window = Window(lease.id, current.starts_at, 0.0, generation)
        lease.window.ends_s = sent_s + (current.ends_at - book.at)
        lease.window.generation = generation
        lease.window.pot.sync(current.lease)
        sources[lease.window.pot] = current
    kept = []
    for window in lease.older:
        source = book.older.get((lease.id, window.starts_at))
        if source is not None:
            window.pot.sync(source.lease)
            sources[window.pot] = source
        # Without a source it was not locked yet, or the budget was removed, and with it all that was leased of it.
        if source is not None or not lease.is_gone:
            kept.append(window)
    lease.older = kept


def _others(source: Source) -> int:
    """What other processes have leased."""
    return source.leased_nano - (source.lease.left_nano if source.lease is not None else 0)


def _total(pot: Pot, source: Source) -> int:
    """The most that can become free by waiting: what is settled here but not shipped is gone, what others settled can't
    be seen until they ship it."""
    return source.available_nano + pot.free_nano + pot.held_nano + _others(source)


def _plan_waiters(
    account: AccountLease,
    sources: dict[Pot, Source],
    plan: Plan,
    asked: set[int],
    now_s: float,
    generation: int,
) -> dict[Pot, int]:
    """How much of each pot the waiting turns get, first come first served."""
    rooms = {pot: max(0, pot.free_nano + source.available_nano) for pot, source in sources.items()}
    needs = dict.fromkeys(sources, 0)
    largest_nano = 0
    for waiter in account.waiting():
        pots = account.pots(waiter.budgets, now_s, generation)
        if pots is None or any(pot not in rooms for pot in pots):
            plan.unread.append(account)
            break
        waiter.planned_nano = fit(waiter.amount_nano, waiter.least_nano, min(rooms[pot] for pot in pots))
        if waiter.planned_nano:
            largest_nano = max(largest_nano, waiter.planned_nano)
            for pot in pots:
                rooms[pot] -= waiter.planned_nano
                needs[pot] += waiter.planned_nano
        else:
            _keep_waiting(account, waiter, pots, sources, rooms, plan, now_s)
    account.hold_nano = max(largest_nano, account.hold_nano // 2 if largest_nano else account.hold_nano)
    return needs


def _keep_waiting(
    account: AccountLease, waiter: Waiter, pots: tuple[Pot, ...], sources: dict[Pot, Source],
    rooms: dict[Pot, int], plan: Plan, now_s: float,
) -> None:  # fmt: skip
    """It does not fit yet: others are asked for what they don't use, and those behind it don't overtake it."""
    lacking = [pot for pot in pots if not fit(waiter.amount_nano, waiter.least_nano, rooms[pot])]
    waiter.short = None if account.wallet in lacking else _budget_of(account, waiter, lacking[0])
    for pot in lacking:
        rooms[pot] = 0
        pot.small_until_s = now_s + SMALL_S
        could_help = _others(sources[pot]) > 0 and waiter.need_nano <= plan.totals[pot]
        if could_help and now_s - pot.recalled_s >= RECALL_S:
            pot.recalled_s = now_s
            _recall(account, pot, plan)


def _recall(account: AccountLease, pot: Pot, plan: Plan) -> None:
    if pot is account.wallet:
        plan.recall_accounts.append(account.id)
    for lease in account.budgets.values():
        if lease.window is not None and lease.window.pot is pot:
            plan.recall_budgets.append(lease.id)


def _budget_of(account: AccountLease, waiter: Waiter, pot: Pot) -> Budget:
    for budget in waiter.budgets:
        window = account.budgets[budget.id].window
        if window is not None and window.pot is pot:
            return budget
    raise AssertionError("a pot that is neither the wallet's nor a budget's")


def _move(
    account: AccountLease, sources: dict[Pot, Source], needs: dict[Pot, int], live: int, settings: Settings,
    plan: Plan, now_s: float,
) -> None:  # fmt: skip
    current = {lease.window.pot for lease in account.budgets.values() if lease.window is not None}
    recalled = {
        lease.window.pot
        for lease in account.budgets.values()
        if lease.is_recalled and lease.window is not None
    }
    is_burst = now_s - account.taken_s < BURST_S
    for pot, source in sources.items():
        need_nano, available_nano = needs[pot], source.available_nano
        pot.is_small = (
            account.is_dropping or now_s < pot.small_until_s
            or (pot is not account.wallet and pot not in current)
            or is_small(
                pot.free_nano + max(0, available_nano), account.hold_nano, live, settings.lease_small_holds
            )
        )  # fmt: skip
        coming_nano = _grant(account, pot, need_nano, available_nano, live, settings, is_burst=is_burst)
        if coming_nano:
            account.taken_s = now_s
        elif surplus := surplus_nano(need_nano, pot, available_nano, small=pot.is_small or pot in recalled):
            pot.give_back(surplus)
        if coming_nano or not pot.is_told:
            _enter(account, pot, source, coming_nano, plan)
    for lease in account.budgets.values():
        if lease.window is not None and lease.window.pot in sources:
            lease.is_recalled = False


def _grant(
    account: AccountLease, pot: Pot, need_nano: int, available_nano: int, live: int, settings: Settings, *,
    is_burst: bool,
) -> int:  # fmt: skip
    if pot.is_small:
        pot.block_nano = pot.low_nano = 0
        return grant_nano(need_nano, pot, available_nano, live, small=True)
    if pot.free_nano >= max(need_nano, pot.low_nano):
        return 0
    wanted_nano = block_nano(account.peak_nano_s, settings.lease_block_s, account.hold_nano)
    pot.block_nano = max(wanted_nano, 2 * pot.block_nano if is_burst else 0)
    coming_nano = grant_nano(need_nano, pot, available_nano, live, small=False)
    # Where the fair part is less than a block, half of that is what starts the next refill.
    pot.low_nano = min(pot.block_nano, pot.free_nano + coming_nano - need_nano) // 2
    return coming_nano


def _enter(account: AccountLease, pot: Pot, source: Source, coming_nano: int, plan: Plan) -> None:
    lease = source.lease
    before_nano = lease.granted_nano - lease.returned_nano if lease is not None else 0
    entry = Entry(
        granted_nano=pot.granted_nano + coming_nano, returned_nano=pot.returned_nano, used_nano=pot.settled_nano,
        moved_nano=pot.granted_nano + coming_nano - pot.returned_nano - before_nano,
        free_nano=pot.free_nano + coming_nano, held_nano=pot.held_nano,
    )  # fmt: skip
    if pot is account.wallet:
        plan.wallets[account.id] = entry
        account.told_free_nano, account.told_held_nano = entry.free_nano, entry.held_nano
    else:
        window = next(window for window in account.all_windows() if window.pot is pot)
        plan.windows[window.budget_id, window.starts_at] = entry
    plan.changes.append(Change(pot, coming_nano, entry.returned_nano, entry.used_nano))
