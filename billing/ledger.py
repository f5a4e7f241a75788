"""The ledger: transfers between accounts of the book, applied in batches, each exactly once; and the posting of turns.

The work is done by functions of billing/sql/0005_ledger.sql, one round trip a batch, in the caller's transaction;
what an amount is due for, and when, is the callers'.
"""

import datetime as dt
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias
from uuid import UUID

import asyncpg

from config.ids import uuid7

Connection: TypeAlias = (
    "asyncpg.Connection[asyncpg.Record] | asyncpg.pool.PoolConnectionProxy[asyncpg.Record]"
)

Phase = Literal["posted", "pending", "post", "void", "expire"]
Status = Literal["done", "repeated", "refused", "conflict"]

OWNED = ("wallet", "earnings")
PLATFORM = ("fee", "clearing", "promotions", "withdrawals", "receivables", "loss")

BASIS = 10_000
"""Basis points in the whole."""

EXPIRED_MAX = 500
"""Pending transfers that one call expires: their accounts stay locked until its transaction ends."""


@dataclass(frozen=True, slots=True)
class AccountRef:
    """A ledger account by what it is for; it is opened when something is first moved."""

    kind: str
    owner_id: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in (PLATFORM if self.owner_id is None else OWNED):
            raise ValueError(f"{self}: there is no such ledger account")

    @classmethod
    def wallet(cls, account_id: int) -> "AccountRef":
        """What an account may spend."""
        return cls("wallet", account_id)

    @classmethod
    def earnings(cls, account_id: int) -> "AccountRef":
        """What a provider has earned and not withdrawn."""
        return cls("earnings", account_id)

    @classmethod
    def platform(cls, kind: str) -> "AccountRef":
        """One of PLATFORM."""
        return cls(kind)


@dataclass(frozen=True, slots=True)
class Transfer:
    """An amount to move. Pending ones set it aside; a `post` moves at most that and frees the rest, a `void` or
    `expire` frees it all. These three name the pending transfer, and may leave out what they have from it (None, 0, "").
    """

    id: UUID
    debit: AccountRef | None
    credit: AccountRef | None
    amount_nano: int
    kind: str
    phase: Phase = "posted"
    pending_id: UUID | None = None
    idempotency_key: str | None = None
    posting_id: UUID | None = None
    incarnation_id: UUID | None = None
    cause: str = ""
    expires_at: dt.datetime | None = None

    def __post_init__(self) -> None:
        is_resolution = self.phase in ("post", "void", "expire")
        if is_resolution != (self.pending_id is not None):
            raise ValueError(f"{self.phase} transfer: resolutions, and only they, name a pending transfer")
        if self.amount_nano < 0 or (is_resolution and self.phase != "post" and self.amount_nano):
            raise ValueError(f"{self.phase} transfer of {self.amount_nano} nano")
        if self.expires_at is not None and self.phase != "pending":
            raise ValueError(f"{self.phase} transfer: only a pending one expires")
        if is_resolution:
            return
        if not self.amount_nano or not self.kind or self.debit is None or self.credit is None:
            raise ValueError(f"{self.phase} transfer: amount, kind, debit and credit are needed")
        if self.debit == self.credit:
            raise ValueError(f"{self.debit} can't be moved to itself")


@dataclass(frozen=True, slots=True)
class Result:
    """What became of a transfer.

    done: moved. repeated: its id or idempotency key was there before, `transfer_id` is the first one. conflict: likewise,
    but `field` differed. refused: `reason` is insufficient_funds, pending_unknown, pending_expired, exceeds_pending,
    other_accounts, not_due, or already_posted, already_voided, already_expired by `transfer_id`; nothing is left of it,
    so the same key may be tried again.
    """

    status: Status
    transfer_id: UUID | None
    reason: str = ""
    field: str = ""

    @property
    def is_moved(self) -> bool:
        """Whether the transfer is in the book, now or from before."""
        return self.status in ("done", "repeated")


class Ledger:
    """Applies transfers. `shard`: which of the rows of each platform account this process uses."""

    def __init__(self, shard: int = 0) -> None:
        self._shard = shard

    async def apply(self, connection: Connection, transfers: Sequence[Transfer]) -> list[Result]:
        """One round trip for the batch, in the caller's transaction; each in turn, a refused one stops no other.

        Locks come in one order for all batches: one batch a transaction can never deadlock with another. The caller
        who wants all or nothing raises inside its transaction.
        """
        if not transfers:
            return []
        batch = json.dumps([_wanted(transfer) for transfer in transfers])
        answer = await connection.fetchval("select apply_transfers($1::jsonb, $2)", batch, self._shard)
        return [_result(one) for one in json.loads(answer)]

    async def expire_due(self, connection: Connection) -> int:
        """Free what pending transfers hold past their time; how many of at most EXPIRED_MAX. A caretaker calls it."""
        rows = await connection.fetch(
            "select id from open_transfers where expires_at <= clock_timestamp() order by expires_at limit $1",
            EXPIRED_MAX,
        )
        results = await self.apply(
            connection,
            [Transfer(uuid7(), None, None, 0, "", "expire", pending_id=row["id"]) for row in rows],
        )
        return sum(result.status == "done" for result in results)


@dataclass(frozen=True, slots=True)
class Posting:
    """Turns of one account on one provider's nodes, posted together."""

    posting_id: UUID  # what their usage rows name
    account_id: int
    provider_id: int | None  # None: the nodes are the platform's own
    amount_nano: int
    share_nano: int  # the provider's part of the amount; the fee is the rest
    loss_share_nano: int = 0  # the provider's part of what was delivered beyond holds, paid by the platform

    def __post_init__(self) -> None:
        if not 0 <= self.share_nano <= self.amount_nano or self.loss_share_nano < 0:
            raise ValueError(f"{self}: its parts are not parts of its amount")
        if self.provider_id is None and (self.share_nano or self.loss_share_nano):
            raise ValueError(f"{self}: nobody has its share")


def share_nano(amount_nano: int, share_bp: int, rounding: str) -> int:
    """`share_bp` hundredths of a percent of a non-negative amount, in whole nano."""
    whole, rest = divmod(amount_nano * share_bp, BASIS)
    if rounding == "up":
        return whole + (rest > 0)
    if rounding == "half_even":
        return whole + (2 * rest > BASIS or (2 * rest == BASIS and whole % 2 == 1))
    return whole


async def post_turns(
    connection: Connection, incarnation_id: UUID, postings: Sequence[Posting], *, shard: int
) -> None:
    """Move what turns of one incarnation cost: from the wallets, whose leases settle it, to earnings and fee.

    Ledger accounts are opened as needed. A posting that was posted before, or has no room in its lease, raises
    asyncpg.IntegrityConstraintViolationError and nothing of the batch is done. The incarnation's row is the caller's to
    lock first.
    """
    if not postings:
        return
    ids = [posting.posting_id for posting in postings]
    await connection.execute(
        "select post_turns($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)",
        incarnation_id,
        ids,
        *([UUID(int=id_.int ^ leg) for id_ in ids] for leg in _LEGS),
        *([getattr(posting, name) for posting in postings] for name in _COLUMNS),
        shard,
    )


# A posting's transfers are named after it, so the primary key refuses a posting that comes again.
_LEGS = (1, 2, 3)  # fee, share, loss
_COLUMNS = ("account_id", "provider_id", "amount_nano", "share_nano", "loss_share_nano")


def _wanted(transfer: Transfer) -> dict[str, Any]:
    wanted: dict[str, Any] = {
        "id": str(transfer.id),
        "amount_nano": transfer.amount_nano or None,
        "kind": transfer.kind or None,
        "phase": transfer.phase,
        "idempotency_key": transfer.idempotency_key,
        "cause": transfer.cause,
        "expires_at": transfer.expires_at and transfer.expires_at.isoformat(),
    }
    for name in ("pending_id", "posting_id", "incarnation_id"):
        value = getattr(transfer, name)
        wanted[name] = value and str(value)
    for side, ref in (("debit", transfer.debit), ("credit", transfer.credit)):
        wanted[f"{side}_kind"], wanted[f"{side}_owner"] = (ref.kind, ref.owner_id) if ref else (None, None)
    return wanted


def _result(answer: dict[str, Any]) -> Result:
    id_ = answer.get("id")
    return Result(
        answer["status"], UUID(id_) if id_ else None, answer.get("reason") or "", answer.get("field") or ""
    )
