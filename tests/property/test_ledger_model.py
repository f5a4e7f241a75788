"""Random batches on the real ledger, alone and at the same time, held against a plain model of it.

Batches that run at once must come out as in some order of them; each example ends in a clean audit.
"""

import asyncio
import copy
import datetime as dt
import itertools
from dataclasses import dataclass, field, replace
from uuid import UUID

import asyncpg
import uvloop
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from billing import audit
from billing.ledger import AccountRef, Ledger, Phase, Result, Transfer
from config.defaults import Settings
from config.ids import uuid7
from config.postgres import open_pool
from tests import books
from tests.conftest import TEST_TIMEOUT_S

PAST, FUTURE = dt.datetime(2020, 1, 1, tzinfo=dt.UTC), dt.datetime(2100, 1, 1, tzinfo=dt.UTC)
WALLETS = 3


@dataclass(frozen=True)
class Step:
    """A transfer to be asked for; its numbers choose among what there is when its turn comes."""

    phase: Phase
    debit: int
    credit: int
    amount: int  # 0: all that is available; -1: one more
    key: int | None  # few, so that they come again with the same fields and with others
    target: int  # which pending transfer is resolved, which earlier one comes again
    expires_at: dt.datetime | None
    again: str  # an earlier transfer is sent once more: no, same, or changed


@dataclass(frozen=True)
class Round:
    """Batches that run at the same time; and before them a wallet that a process leases and spends from."""

    batches: list[list[Step]]
    leasing: int
    leased: int


steps = st.builds(
    Step,
    phase=st.sampled_from(
        ["posted", "posted", "posted", "pending", "pending", "post", "post", "void", "expire"]
    ),
    debit=st.integers(0, WALLETS + 1),
    credit=st.integers(0, WALLETS + 1),
    amount=st.integers(-1, 0) | st.integers(1, 60),
    key=st.none() | st.integers(0, 4),
    target=st.integers(0, 20),
    expires_at=st.sampled_from([None, PAST, FUTURE]),
    again=st.sampled_from(["no", "no", "no", "no", "same", "changed"]),
)
rounds = st.builds(
    Round,
    batches=st.lists(st.lists(steps, min_size=1, max_size=5), min_size=1, max_size=3),
    leasing=st.integers(0, WALLETS - 1),
    leased=st.integers(0, 20),
)


@dataclass
class Balance:
    debit: int = 0
    credit: int = 0
    pending_debit: int = 0
    pending_credit: int = 0
    leased: int = 0


@dataclass
class Model:
    """The ledger, as its description has it."""

    balances: dict[AccountRef, Balance] = field(default_factory=dict)
    book: dict[UUID, Transfer] = field(default_factory=dict)
    keys: dict[str, UUID] = field(default_factory=dict)
    resolved: dict[UUID, UUID] = field(default_factory=dict)

    def of(self, ref: AccountRef) -> Balance:
        return self.balances.setdefault(ref, Balance())

    def available(self, ref: AccountRef) -> int:
        of = self.of(ref)
        return of.credit - of.debit - of.pending_debit - of.leased

    def apply(self, wanted: Transfer) -> Result:
        first_id = self.keys.get(wanted.idempotency_key or "") or (
            wanted.id if wanted.id in self.book else None
        )
        if first_id is not None:
            field_ = self._differing(wanted, self.book[first_id])
            return Result("conflict", first_id, field=field_) if field_ else Result("repeated", first_id)
        return self._move(wanted) if wanted.pending_id is None else self._resolve(wanted, wanted.pending_id)

    def _differing(self, wanted: Transfer, first: Transfer) -> str:
        pairs = {
            "idempotency_key": (first.idempotency_key, wanted.idempotency_key),
            "phase": (first.phase, wanted.phase),
            "pending": (first.pending_id, wanted.pending_id),
            "kind": (first.kind, wanted.kind or first.kind),
            "amount": (first.amount_nano, wanted.amount_nano or first.amount_nano),
            "debit": (first.debit, wanted.debit or first.debit),
            "credit": (first.credit, wanted.credit or first.credit),
        }
        return next((name for name, (one, other) in pairs.items() if one != other), "")

    def _move(self, wanted: Transfer) -> Result:
        assert wanted.debit is not None
        assert wanted.credit is not None
        if wanted.debit.owner_id is not None and self.available(wanted.debit) < wanted.amount_nano:
            return Result("refused", None, "insufficient_funds")
        debit, credit = self.of(wanted.debit), self.of(wanted.credit)
        if wanted.phase == "pending":
            debit.pending_debit += wanted.amount_nano
            credit.pending_credit += wanted.amount_nano
        else:
            debit.debit += wanted.amount_nano
            credit.credit += wanted.amount_nano
        return self._written(wanted)

    def _resolve(self, wanted: Transfer, pending_id: UUID) -> Result:
        pending = self.book.get(pending_id)
        if pending is None or pending.phase != "pending":
            return Result("refused", None, "pending_unknown")
        if pending_id in self.resolved:
            before = self.book[self.resolved[pending_id]]
            said = {"post": "already_posted", "void": "already_voided", "expire": "already_expired"}
            return Result("refused", before.id, said[before.phase])
        is_due = pending.expires_at == PAST
        if wanted.phase == "post" and wanted.amount_nano > pending.amount_nano:
            return Result("refused", None, "exceeds_pending")
        if wanted.phase == "post" and is_due:
            return Result("refused", None, "pending_expired")
        if wanted.phase == "expire" and not is_due:
            return Result("refused", None, "not_due")
        assert pending.debit is not None
        assert pending.credit is not None
        moved = (wanted.amount_nano or pending.amount_nano) if wanted.phase == "post" else 0
        debit, credit = self.of(pending.debit), self.of(pending.credit)
        debit.pending_debit -= pending.amount_nano
        credit.pending_credit -= pending.amount_nano
        debit.debit += moved
        credit.credit += moved
        self.resolved[pending_id] = wanted.id
        amount_nano = moved or pending.amount_nano
        whole = copy.copy(pending)
        # A resolution as it stands in the book has what it left out from its pending transfer.
        for name, value in {
            "id": wanted.id, "phase": wanted.phase, "pending_id": pending_id, "amount_nano": amount_nano,
            "idempotency_key": wanted.idempotency_key, "expires_at": None,
        }.items():  # fmt: skip
            object.__setattr__(whole, name, value)
        return self._written(whole)

    def _written(self, transfer: Transfer) -> Result:
        self.book[transfer.id] = transfer
        if transfer.idempotency_key is not None:
            self.keys[transfer.idempotency_key] = transfer.id
        return Result("done", transfer.id)


class Example:
    """One example: its own accounts and keys in a book that all examples share."""

    def __init__(self, pool: asyncpg.Pool, settings: Settings) -> None:
        self.pool = pool
        self.settings = settings
        self.model = Model()
        self.sent: list[Transfer] = []
        self.name = str(uuid7())

    async def run(self, story: list[Round]) -> None:
        self.accounts = [await books.account(self.pool) for _ in range(WALLETS)]
        wallets = [AccountRef.wallet(of) for of in self.accounts]
        self.refs = [*wallets, AccountRef.earnings(self.accounts[0]), AccountRef.platform("clearing")]
        self.process = await books.incarnation(self.pool)
        self.sent = [books.topup(of, 100) for of in self.accounts]
        await self.at_once([self.sent])
        for part in story:
            await self.use(part)
            known = list(self.sent)  # at once, only what was there before is resolved: see resolve_pending
            asked = [self.batch(batch, known, is_alone=len(part.batches) == 1) for batch in part.batches]
            await self.at_once(asked)
        await self.expire_due()
        for finding in await audit.run(self.pool, self.settings):
            assert not finding.count, (finding.check.name, finding.rows)

    async def at_once(self, asked: list[list[Transfer]]) -> None:
        results = await asyncio.gather(
            *(books.apply(self.pool, *batch, shard=n % 2) for n, batch in enumerate(asked))
        )
        found = await self.balances()
        for order in itertools.permutations(range(len(asked))):
            model = copy.deepcopy(self.model)
            told = {n: [model.apply(transfer) for transfer in asked[n]] for n in order}
            if all(told[n] == results[n] for n in order) and self.expected(model) == moved(found):
                self.model = model
                return
        model = copy.deepcopy(self.model)
        one_after_the_other = [[model.apply(transfer) for transfer in batch] for batch in asked]
        raise AssertionError(
            f"in no order:\n{results}\n{found}\nlike\n{one_after_the_other}\n{self.expected(model)}"
        )

    def batch(self, batch: list[Step], known: list[Transfer], *, is_alone: bool) -> list[Transfer]:
        asked = []
        for step in batch:
            transfer = self.transfer(step, known)
            asked.append(transfer)
            self.sent.append(transfer)
            if is_alone:
                known.append(transfer)
        return asked

    def transfer(self, step: Step, known: list[Transfer]) -> Transfer:
        key = None if step.key is None else f"{self.name}:{step.key}"
        if step.again != "no":
            earlier = known[step.target % len(known)]
            changed = replace(earlier, cause="again")
            if step.again == "changed" and earlier.amount_nano:
                changed = replace(changed, amount_nano=abs(step.amount) + 1)
            return changed if earlier.idempotency_key is None else replace(changed, id=uuid7())
        if step.phase in ("post", "void", "expire"):
            pendings = [transfer for transfer in known if transfer.phase == "pending"] or known
            pending = pendings[step.target % len(pendings)]
            amount = step.amount if step.amount > 0 else pending.amount_nano - step.amount
            return Transfer(
                uuid7(), None, None, amount if step.phase == "post" else 0, "", step.phase, pending.id, key
            )
        debit, credit = self.refs[step.debit], self.refs[step.credit]
        if debit == credit:
            credit = self.refs[(step.credit + 1) % len(self.refs)]
        expires_at = step.expires_at if step.phase == "pending" else None
        amount = step.amount if step.amount > 0 else max(1, self.model.available(debit) - step.amount)
        return Transfer(
            uuid7(), debit, credit, amount, "job", step.phase, idempotency_key=key, expires_at=expires_at
        )

    async def use(self, part: Round) -> None:
        """A process leases from a wallet and posts a turn of half of it."""
        account, wallet = self.accounts[part.leasing], self.refs[part.leasing]
        if part.leased < 2 or self.model.available(wallet) < part.leased:
            return
        await books.lease(self.pool, self.process, account, part.leased)
        await books.use(self.pool, self.process, account, [part.leased // 2], provider_id=self.accounts[0])
        spent, share = part.leased // 2, part.leased // 2 * 3 // 4
        self.model.of(wallet).leased += part.leased - spent
        self.model.of(wallet).debit += spent
        self.model.of(AccountRef.earnings(self.accounts[0])).credit += share

    async def expire_due(self) -> None:
        async with self.pool.acquire() as connection, connection.transaction():
            await Ledger().expire_due(connection)
        for transfer in list(self.model.book.values()):
            if (
                transfer.phase == "pending"
                and transfer.expires_at == PAST
                and transfer.id not in self.model.resolved
            ):
                expired = Transfer(uuid7(), None, None, 0, "", "expire", transfer.id)
                assert self.model.apply(expired).status == "done"
        assert moved(await self.balances()) == self.expected(self.model)

    async def balances(self) -> dict[AccountRef, Balance]:
        rows = await self.pool.fetch(
            "select * from ledger_accounts where owner_id = any ($1) order by id", self.accounts
        )
        return {
            AccountRef(row["kind"], row["owner_id"]): Balance(
                row["debit_nano"], row["credit_nano"], row["pending_debit_nano"], row["pending_credit_nano"],
                row["leased_nano"],
            )
            for row in rows
        }  # fmt: skip

    def expected(self, model: Model) -> dict[AccountRef, Balance]:
        return moved({ref: of for ref, of in model.balances.items() if ref.owner_id is not None})


def moved(balances: dict[AccountRef, Balance]) -> dict[AccountRef, Balance]:
    """Without those that nothing was ever moved on."""
    return {ref: of for ref, of in balances.items() if of != Balance()}


def test_the_ledger_is_its_model(database_url: str, settings: Settings) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        pool = runner.run(opened(database_url))

        @hypothesis_settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
        @given(st.lists(rounds, min_size=1, max_size=7))
        def stories(story: list[Round]) -> None:
            runner.run(Example(pool, settings).run(story))

        try:
            stories()
        finally:
            runner.run(pool.close())


async def opened(url: str) -> asyncpg.Pool:
    return await open_pool(url, max_size=4, timeout_s=TEST_TIMEOUT_S)
