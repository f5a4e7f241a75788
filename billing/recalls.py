"""Recalls: having gateway processes return what of an account's wallet is free in their leases.

Processes hear of it through the change log and do it in billing/leases.py; why it is wanted is the callers'.
"""

import asyncio
from dataclasses import dataclass
from typing import Any

import asyncpg

from config.changes import announce

RECALL_S = 5.0
"""How long somebody who recalls waits: a change poll (0.5 s), a report (1 s) and a return, on a loaded machine."""

POLL_S = 0.05
"""How often the rows are looked at meanwhile."""

# What was settled in memory but not shipped is neither free nor held, and free to nobody.
LEFT = """
select coalesce(sum(least(l.free_nano, l.granted_nano - l.settled_nano - l.returned_nano)), 0)::bigint as free_nano,
    coalesce(sum(l.held_nano), 0)::bigint as held_nano
from spend_leases l join incarnations i on i.id = l.incarnation_id
where l.account_id = $1 and i.state = 'live'
"""


@dataclass(frozen=True, slots=True)
class Recalled:
    """What live processes still have of a wallet: `free_nano` is 0 unless one of them did not answer."""

    free_nano: int
    held_nano: int  # by turns that run; it comes back, or is charged, when they end


async def recall(connection: Any, account_id: int) -> None:
    """Ask for it, in the caller's transaction; processes hear of it after that commits."""
    await announce(connection, "recall", str(account_id))


async def recalled(pool: asyncpg.Pool, account_id: int, timeout_s: float = RECALL_S) -> Recalled:
    """Wait until no live process has a free remainder of this wallet, for at most `timeout_s`."""
    deadline = asyncio.get_running_loop().time() + timeout_s
    while True:
        row = await pool.fetchrow(LEFT, account_id)
        assert row is not None  # a sum always has a row
        left = Recalled(row["free_nano"], row["held_nano"])
        if not left.free_nano or asyncio.get_running_loop().time() >= deadline:
            return left
        await asyncio.sleep(POLL_S)
