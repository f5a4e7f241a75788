"""Who is next: deficit round robin over accounts, by tokens. Pure.

In each round every account that waits gets a quantum of tokens, and its oldest turn goes as soon as what it got covers it.
So accounts get equal tokens while they wait, whatever they send and however many turns; what one got from another worker
counts too, as a debt.
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
        self._order: deque[Hashable] = deque()  # the account whose round it is stands first
        self._credit: dict[Hashable, int] = {}
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
            self._order.append(turn.account)
            self._credit.setdefault(turn.account, 0)
        turns.append(turn)
        self._count += 1

    def put_first(self, turn: Turned) -> None:
        """It had been next and could not go: it is again the first of its account, with what it was charged."""
        self.add(turn)
        turns = self._turns[turn.account]
        turns.rotate(1)
        self._credit[turn.account] += turn.tokens

    def next(self) -> Turned | None:
        """The turn whose turn it is, which waits no more and is charged to its account; None where nobody waits."""
        if not self._order:
            return None
        self._skip_rounds()
        while True:
            account = self._order[0]
            turn = self._turns[account][0]
            if self._credit[account] >= turn.tokens:
                self._take(account, turn)
                return turn
            self._credit[account] += self._quantum
            self._order.rotate(-1)

    def _skip_rounds(self) -> None:
        """Rounds in which nobody could go are given at once: debts may be large."""
        lacking = min(turns[0].tokens - self._credit[account] for account, turns in self._turns.items())
        rounds = max(0, -(-lacking // self._quantum) - 1)
        if rounds:
            for account in self._order:
                self._credit[account] += rounds * self._quantum

    def _take(self, account: Hashable, turn: Turned) -> None:
        self._turns[account].popleft()
        self._credit[account] -= turn.tokens
        self._count -= 1
        self._forget_idle(account)

    def remove(self, turn: Turned) -> bool:
        """It waits no more, without having gone. False if it did not wait."""
        turns = self._turns.get(turn.account)
        if turns is None or turn not in turns:
            return False
        turns.remove(turn)
        self._count -= 1
        self._forget_idle(turn.account)
        return True

    def _forget_idle(self, account: Hashable) -> None:
        """An account without turns keeps no credit, which it could save up; its debts stay, while somebody waits."""
        if self._turns[account]:
            return
        del self._turns[account]
        self._order.remove(account)
        if self._credit[account] >= 0:
            del self._credit[account]
        if not self._turns or len(self._credit) - len(self._turns) > DEBTORS_MAX:
            self._credit = {each: self._credit[each] for each in self._turns}

    def charge(self, account: Hashable, tokens: int) -> None:
        """The account got so much from another worker."""
        if self._turns:
            self._credit[account] = self._credit.get(account, 0) - tokens

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
