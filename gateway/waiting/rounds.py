"""Who is next: deficit round robin over accounts, by tokens. Pure.

In each round every account that waits gets a quantum of tokens, and its oldest turn goes as soon as what it got covers it.
So accounts get equal tokens while they wait, whatever they send and however many turns; what one got from another worker
counts too, as a debt, which rounds pay off whether it waits or not.
"""

from collections import deque
from collections.abc import Hashable, Iterator
from typing import Generic, Protocol, TypeVar

DEBTORS_MAX = 4096
"""Accounts whose debts are remembered while none of their turns waits here."""


class Waits(Protocol):
    """What waits, of whom, and how much it is."""

    @property
    def account(self) -> Hashable: ...

    @property
    def tokens(self) -> int: ...


Turned = TypeVar("Turned", bound=Waits)


class Rounds(Generic[Turned]):
    """The turns that wait, by account. `credit` is what each account has left of its quanta; less than none is a debt."""

    def __init__(self, quantum: int) -> None:
        self._quantum = quantum
        self._turns: dict[Hashable, deque[Turned]] = {}
        self._order: deque[Hashable] = deque()
        """Accounts that wait or owe; the one whose round it is stands first."""
        self._credit: dict[Hashable, int] = {}
        """Of those in `_order`."""
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Turned]:
        for turns in self._turns.values():
            yield from turns

    def add(self, turn: Turned) -> None:
        """It waits, behind those of its account."""
        turns = self._turns.get(turn.account)
        if turns is None:
            turns = self._turns[turn.account] = deque()
            if turn.account not in self._credit:
                self._credit[turn.account] = 0
                self._order.append(turn.account)
        turns.append(turn)
        self._count += 1

    def put_first(self, turn: Turned) -> None:
        """It was taken and could not go: it is the next one again, and its account gets back what it was charged."""
        self.add(turn)
        self._turns[turn.account].rotate(1)
        self._credit[turn.account] += turn.tokens
        self._order.remove(turn.account)
        self._order.appendleft(turn.account)

    def first(self) -> Turned | None:
        """The turn whose turn it is, until it is taken or leaves; None where nobody waits."""
        if not self._turns:
            return None
        if (turn := self._ready()) is not None:
            return turn
        self._skip_rounds()
        while (turn := self._ready()) is None:
            account = self._order[0]
            self._order.rotate(-1)
            self._give(account, self._quantum)
        return turn

    def _ready(self) -> Turned | None:
        """The oldest turn of the account whose round it is, if what that got covers it."""
        account = self._order[0]
        turns = self._turns.get(account)
        return turns[0] if turns and self._credit[account] >= turns[0].tokens else None

    def _skip_rounds(self) -> None:
        """Rounds in which nobody could go are given at once: debts may be large."""
        lacking = min(turns[0].tokens - self._credit[account] for account, turns in self._turns.items())
        rounds = max(0, -(-lacking // self._quantum) - 1)
        if rounds:
            for account in list(self._order):
                self._give(account, rounds * self._quantum)

    def _give(self, account: Hashable, tokens: int) -> None:
        self._credit[account] += tokens
        self._forget_idle(account)

    def take(self, turn: Turned) -> None:
        """The `first` one goes: it waits no more, and its account is charged."""
        self._credit[turn.account] -= turn.tokens
        self.remove(turn)

    def remove(self, turn: Turned) -> bool:
        """It waits no more, without having gone. False if it did not wait."""
        turns = self._turns.get(turn.account)
        if turns is None or turn not in turns:
            return False
        turns.remove(turn)
        self._count -= 1
        if not turns:
            del self._turns[turn.account]
            self._forget_idle(turn.account)
        if not self._turns:
            self._order.clear()
            self._credit.clear()
        return True

    def _forget_idle(self, account: Hashable) -> None:
        """An account without turns keeps no credit, which it could save up; its debt stays, until rounds have paid it."""
        if account not in self._turns and self._credit[account] >= 0:
            del self._credit[account]
            self._order.remove(account)

    def charge(self, account: Hashable, tokens: int) -> None:
        """The account got so much from another worker."""
        if not self._turns:
            return
        if account not in self._credit:
            if len(self._credit) - len(self._turns) >= DEBTORS_MAX:
                return
            self._credit[account] = 0
            self._order.append(account)
        self._credit[account] -= tokens

    @property
    def most(self) -> int:
        """The most turns that one account has waiting."""
        return max(map(len, self._turns.values()), default=0)

    def newest_of_the_greediest(self) -> Turned | None:
        """The last turn of the account with the most turns: who has to leave where there is no room."""
        if not self._turns:
            return None
        return max(self._turns.values(), key=len)[-1]

    def waiting_of(self, account: Hashable) -> int:
        """How many turns of the account wait."""
        return len(self._turns.get(account, ()))

    def position(self, turn: Turned) -> int:
        """Which place a turn has, the next one's being 1: of each account as many go before it as of its own."""
        before = self._turns[turn.account].index(turn)
        return 1 + before + sum(
            min(len(turns), before + 1) for account, turns in self._turns.items() if account != turn.account
        )  # fmt: skip
