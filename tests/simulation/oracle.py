"""What should have been charged, from what the engines did and what the clients saw, held against the book.

It shares no arithmetic with the gateway: engines are witnesses (tests/fakes/witness.py), prices are the numbers that the
test wrote into its price book, and the formula is its own. The book must be at rest: all shipped, all processes ended.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncpg

from gateway.identity.accounts import AccountStore
from tests.fakes.clients import Sighting
from tests.fakes.witness import Work

LINGERS_S = 5.0
"""A turn may outlive its client's interest by so much: a keyed one runs to its end, and a client's leaving is heard late."""

SHARE_BP = 7500


@dataclass(frozen=True, slots=True)
class Prices:
    """Nano of the currency for a million tokens."""

    prompt: int
    cached: int
    completion: int

    def cost(self, prompt: int, cached: int, completion: int) -> int:
        exact = (prompt - cached) * self.prompt + cached * self.cached + completion * self.completion
        return exact // 1_000_000 + (exact % 1_000_000 > 0)


def write_price_book(path: Path, models: Mapping[str, Prices]) -> Path:
    """The setting `price_book`: these and no other numbers."""
    tables = {
        "default": Prices(10**9, 10**9, 10**9),
        **{f'models."{name}"': at for name, at in models.items()},
    }
    path.write_text(
        "".join(
            f'[{name}]\nprompt = "{_major(at.prompt)}"\ncached_prompt = "{_major(at.cached)}"\n'
            f'completion = "{_major(at.completion)}"\n\n'
            for name, at in tables.items()
        )
    )
    return path


def _major(nano: int) -> str:
    return f"{nano // 10**9}.{nano % 10**9:09d}"


@dataclass(frozen=True, slots=True)
class Charge:
    """A usage row, as far as money goes."""

    turn_id: str
    account_id: int
    node_id: str | None
    provider_id: int | None
    posting_id: str | None
    outcome: str
    amount_nano: int
    loss_nano: int


@dataclass(slots=True)
class Findings:
    """What was looked at, and what is wrong."""

    numbers: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def check(self, is_right: bool, words: str) -> None:
        if not is_right:
            self.wrong.append(words)

    def told(self) -> str:
        shown = "\n".join(f"- {words}" for words in self.wrong[:20])
        more = f"\n... and {len(self.wrong) - 20} more" if len(self.wrong) > 20 else ""
        return f"{len(self.wrong)} wrong:\n{shown}{more}\n{dict(self.numbers)}"


@dataclass(slots=True)
class Oracle:
    """`judge` once the book is at rest. `kills`: when processes of the gateway were killed, unix seconds: only what ran
    then may be missing from the book. `credited`: what each account was given; `budgets`: what it may spend of that."""

    prices: Mapping[str, Prices]
    work: Sequence[Work]
    sightings: Sequence[Sighting]
    credited: Mapping[int, int]
    kills: Sequence[float] = ()
    budgets: Mapping[int, int] = field(default_factory=dict)
    findings: Findings = field(default_factory=Findings)

    async def judge(self, pool: asyncpg.Pool) -> Findings:
        """All of it; raises nothing, tells everything."""
        charges = await _charges(pool)
        self.weigh(charges)
        await self._wallets(pool, charges)
        await self._platform(pool, charges)
        await self._at_rest(pool)
        return self.findings

    def weigh(self, charges: Sequence[Charge]) -> Findings:
        """Each charge against what was done, each answer against its charge."""
        by_turn = self._once(charges)
        works: dict[str, list[Work]] = defaultdict(list)
        for work in self.work:
            works[work.request_id].append(work)
        for charge in charges:
            self._has_work(charge, works.get(charge.turn_id, []))
        for seen in self.sightings:
            if seen.request_id is not None:
                self._is_right(seen, by_turn.get(seen.request_id), works.get(seen.request_id, []))
            else:
                self.findings.check(seen.status != 200 or seen.is_replay, f"no id: {seen.told()}")
        self._numbers_once(by_turn)
        self.findings.numbers.update(
            charged_turns=sum(charge.amount_nano > 0 for charge in charges), turns=len(charges),
            sightings=len(self.sightings), work=len(self.work),
            amount_nano=sum(charge.amount_nano for charge in charges),
        )  # fmt: skip
        return self.findings

    def _once(self, charges: Sequence[Charge]) -> dict[str, Charge]:
        """No turn is in the book twice."""
        by_turn: dict[str, Charge] = {}
        for charge in charges:
            self.findings.check(charge.turn_id not in by_turn, f"{charge.turn_id} is in the book twice")
            self.findings.check(
                charge.loss_nano == 0, f"{charge.turn_id} lost {charge.loss_nano}: its hold was no bound"
            )
            by_turn[charge.turn_id] = charge
        return by_turn

    def _has_work(self, charge: Charge, works: Sequence[Work]) -> None:
        """What is charged was done, by the engine that is named, and is no more than it sent."""
        if charge.amount_nano == 0:
            return
        most = max((self._most(work) for work in works if work.node_id == charge.node_id), default=None)
        if most is None:
            self.findings.check(False, f"{charge} is charged, and no such engine saw it")
        else:
            self.findings.check(charge.amount_nano <= most, f"{charge} is more than the engine sent: {most}")

    def _most(self, work: Work) -> int:
        written = work.tokens_max if work.how is None else work.tokens_written
        return self.prices[work.model].cost(work.prompt_tokens, 0, written)

    def _exact(self, charge: Charge | None, works: Sequence[Work]) -> int | None:
        """What the engine that finished it did, times the price; None if none finished it."""
        for work in works:
            if work.is_finished and charge is not None and work.node_id == charge.node_id:
                return self.prices[work.model].cost(
                    work.prompt_tokens, work.cached_tokens, work.tokens_written
                )
        return None

    def _is_right(self, seen: Sighting, charge: Charge | None, works: Sequence[Work]) -> None:
        """One client's answer against its charge, way out by way out."""
        numbers, check, told = self.findings.numbers, self.findings.check, seen.told()
        amount = charge.amount_nano if charge is not None else 0
        exact = self._exact(charge, works)
        ending = seen.ending
        numbers[f"seen_{ending}"] += 1
        was_killed = self._was_killed(seen)
        if ending != "refused" and seen.status == 200:
            check(charge is not None or was_killed, f"not in the book, and nobody was killed: {told}")
        if seen.status >= 400 or ending == "refused":
            check(amount == 0, f"refused and charged {amount}: {told}")
        elif ending == "whole":
            check(charge is not None, f"received whole and not charged: {told}")
            check(
                exact is not None and amount == exact,
                f"received whole, charged {amount}, not {exact}: {told}",
            )
        elif not seen.wants_stream or seen.ask.idempotency_key is not None:
            # In full or not at all: it was not delivered piece by piece, or it ran on without its client.
            self._full_or_partial(seen, charge, exact, works)
        elif ending == "error_event":
            delivered = self._delivered(seen, works)
            check(amount == delivered or (was_killed and amount == 0),
                  f"received {seen.tokens} tokens and an error, charged {amount}, not {delivered}: {told}")  # fmt: skip
        elif ending == "left":
            # An engine's last word tells what was cached: the gateway may have had it when the client left.
            least = self._delivered(seen, works, is_cached=any(work.is_finished for work in works))
            check(amount >= least or was_killed, f"received for {least}, charged {amount}: {told}")
        elif amount > self._delivered(seen, works):
            # Killed between a journal's append and the last write of the same tick: all of it was being sent.
            check(exact is not None and amount == exact and charge is not None and charge.outcome == "finished",
                  f"received {seen.tokens} tokens, charged {amount}: {told}")  # fmt: skip
            numbers["killed_while_sending"] += 1

    def _full_or_partial(
        self, seen: Sighting, charge: Charge | None, exact: int | None, works: Sequence[Work]
    ) -> None:
        amount = charge.amount_nano if charge is not None else 0
        if seen.ask.idempotency_key is not None and charge is not None and charge.outcome != "finished":
            return  # its engine died: what `_has_work` bounds
        self.findings.check(amount in (0, exact), f"charged {amount}, neither 0 nor {exact}: {seen.told()}")
        if amount and seen.ending != "left" and seen.ask.idempotency_key is None:
            self.findings.numbers["killed_while_sending"] += 1

    def _delivered(self, seen: Sighting, works: Sequence[Work], *, is_cached: bool = False) -> int:
        """What the tokens that arrived cost with the prompt; what of it was cached is told at an answer's end only."""
        if not seen.has_begun or not works:
            return 0
        work = works[-1]
        cached = work.cached_tokens if is_cached else 0
        return self.prices[work.model].cost(work.prompt_tokens, cached, seen.tokens)

    def _was_killed(self, seen: Sighting) -> bool:
        return any(seen.began_at - 1 <= at <= seen.ended_at + LINGERS_S for at in self.kills)

    def _numbers_once(self, by_turn: Mapping[str, Charge]) -> None:
        """A question is charged once, however often it was asked with one Idempotency-Key; unanswered and unseen, never."""
        charged: dict[int, list[str]] = defaultdict(list)
        known = {work.request_id: work.number for work in self.work}
        for turn_id, charge in by_turn.items():
            if charge.amount_nano > 0 and turn_id in known:
                charged[known[turn_id]].append(turn_id)
        keyed: dict[str, list[Sighting]] = defaultdict(list)
        for seen in self.sightings:
            if seen.ask.idempotency_key is not None:
                keyed[seen.ask.idempotency_key].append(seen)
        for number, turns in charged.items():
            self.findings.check(
                len(turns) == 1, f"question #{number} was charged {len(turns)} times: {turns}"
            )
        for key, sightings in keyed.items():
            if any(seen.ending == "whole" and seen.status == 200 for seen in sightings):
                number = sightings[0].ask.number
                self.findings.check(
                    len(charged[number]) == 1,
                    f"{key} was answered whole, and its question #{number} is not charged",
                )
                self.findings.numbers["keys_answered"] += 1
                self.findings.numbers["replays"] += sum(seen.is_replay for seen in sightings)

    async def _wallets(self, pool: asyncpg.Pool, charges: Iterable[Charge]) -> None:
        spent = Counter[int]()
        for charge in charges:
            spent[charge.account_id] += charge.amount_nano
        for account_id, most in self.budgets.items():
            self.findings.check(
                spent[account_id] <= most,
                f"account {account_id} spent {spent[account_id]} of a budget of {most}",
            )
        for row in await pool.fetch(
            "select owner_id, debit_nano, credit_nano, pending_debit_nano, leased_nano from ledger_accounts"
            " where kind = 'wallet'"
        ):
            account_id = row["owner_id"]
            given = self.credited.get(account_id, 0)
            check = self.findings.check
            check(
                row["credit_nano"] == given,
                f"wallet {account_id} was credited {row['credit_nano']}, not {given}",
            )
            check(row["debit_nano"] == spent[account_id],
                  f"wallet {account_id} paid {row['debit_nano']}, its turns cost {spent[account_id]}")  # fmt: skip
            check(
                row["debit_nano"] <= given,
                f"wallet {account_id} is overspent: {row['debit_nano']} of {given}",
            )
            check(
                row["leased_nano"] == row["pending_debit_nano"] == 0,
                f"wallet {account_id} is not at rest: {dict(row)}",
            )
            shown = await AccountStore(pool).show(account_id)
            parts = (shown.balance_nano, shown.held_nano, shown.spent_nano)
            check(
                sum(parts) == given, f"account {account_id}: balance, held and spent are {parts}, not {given}"
            )
            check(
                shown.spent_nano == spent[account_id],
                f"account {account_id} is told {shown.spent_nano} spent",
            )

    async def _platform(self, pool: asyncpg.Pool, charges: Iterable[Charge]) -> None:
        """Each posting is shared once: three quarters to the node's owner, rounded down, the rest is the fee."""
        postings = Counter[tuple[str | None, int | None]]()
        for charge in charges:
            if charge.amount_nano:
                self.findings.check(charge.posting_id is not None, f"{charge} has no posting")
                postings[charge.posting_id, charge.provider_id] += charge.amount_nano
        moved = {
            str(row["posting_id"]): int(row["amount"])
            for row in await pool.fetch(
                "select posting_id, sum(amount_nano)::bigint as amount from transfers"
                " where posting_id is not null group by 1"
            )
        }
        named = Counter[str | None]()
        for (posting_id, _), amount in postings.items():
            named[posting_id] += amount
        self.findings.check(
            moved == dict(named), f"postings moved {moved}, their turns cost {dict(named)}"[:2000]
        )
        earned, fee = Counter[int](), 0
        for (_, provider_id), amount in postings.items():
            share = amount * SHARE_BP // 10_000 if provider_id is not None else 0
            fee += amount - share
            if provider_id is not None:
                earned[provider_id] += share
        check = self.findings.check
        for row in await pool.fetch(
            "select kind, owner_id, sum(credit_nano - debit_nano)::bigint as net from ledger_accounts"
            " where kind in ('earnings', 'fee', 'loss') group by 1, 2"
        ):
            due = {"earnings": earned[row["owner_id"]], "fee": fee, "loss": 0}[row["kind"]]
            check(row["net"] == due, f"{row['kind']} of {row['owner_id']} is {row['net']}, not {due}")
            earned.pop(row["owner_id"], None)
        check(not +earned, f"nobody was paid {dict(earned)}")

    async def _at_rest(self, pool: asyncpg.Pool) -> None:
        left: list[Any] = await pool.fetch(
            "select id::text, state from incarnations where state <> 'closed'"
            " union all select incarnation_id::text, 'lease' from spend_leases"
            "  where granted_nano <> settled_nano + returned_nano"
            " union all select turn_id, reason from usage_quarantine"
        )
        self.findings.check(not left, f"not at rest: {[tuple(row) for row in left[:5]]}")


async def _charges(pool: asyncpg.Pool) -> list[Charge]:
    rows = await pool.fetch(
        "select turn_id, account_id, node_id, provider_id, posting_id, outcome, amount_nano, loss_nano from usage"
    )
    return [
        Charge(
            f"req_{row['turn_id'].hex}", row["account_id"], row["node_id"], row["provider_id"],
            str(row["posting_id"]) if row["posting_id"] else None, row["outcome"], row["amount_nano"], row["loss_nano"],
        )
        for row in rows
    ]  # fmt: skip
