"""The ledger: transfers between accounts of the book, applied in batches, each exactly once; and the posting of turns.

The work is done by functions of billing/sql/0005_ledger.sql, one round trip a batch, in the caller's transaction;
what an amount is due for, and when, is the callers'.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias
from uuid import UUID

import asyncpg

Connection: TypeAlias = (
    "asyncpg.Connection[asyncpg.Record] | asyncpg.pool.PoolConnectionProxy[asyncpg.Record]"
)

BASIS = 10_000
"""Basis points in the whole."""


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
    connection: Connection, incarnation_id: UUID, postings: Sequence[Posting], *, from_loss: bool, shard: int
) -> None:
    """Move what turns of one incarnation cost: from the wallets, whose leases settle it, to earnings and fee.

    `from_loss`: the platform's loss pays instead, as the leases were given up. Ledger accounts are opened as needed.
    A posting that was posted before, or has no room in its lease, raises asyncpg.IntegrityConstraintViolationError
    and nothing of the batch is done. The incarnation's row is the caller's to lock first.
    """
    if not postings:
        return
    ids = [posting.posting_id for posting in postings]
    await connection.execute(
        "select post_turns($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)",
        incarnation_id,
        ids,
        *([UUID(int=id_.int ^ leg) for id_ in ids] for leg in _LEGS),
        *([getattr(posting, name) for posting in postings] for name in _COLUMNS),
        from_loss,
        shard,
    )


# A posting's transfers are named after it, so the primary key refuses a posting that comes again.
_LEGS = (1, 2, 3)  # fee, share, loss
_COLUMNS = ("account_id", "provider_id", "amount_nano", "share_nano", "loss_share_nano")
