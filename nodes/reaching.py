"""The rows that say how a node is reached: what its agent asks for, the listener that was checked, the open tunnel."""

import uuid
from dataclasses import dataclass
from datetime import datetime

import asyncpg

from config.postgres import Row
from nodes.protocol import ReachAsked
from nodes.reach import DIRECT, LISTENER, NONE, TUNNEL


@dataclass(frozen=True, slots=True)
class NodeReach:
    """What is known of a node's ways. `checked_at` is when its listener was checked last, good or not."""

    way: str
    advertised: str
    fingerprint: str
    checked_at: datetime | None
    problem: str


# Of the node `n`.
WAYS = """
    n.reach, n.advertised, n.fingerprint, n.listener_host, n.listener_checked_at, n.listener_problem,
    exists (select from tunnels t where t.node_id = n.id) as has_tunnel
"""


def reach_of(row: Row) -> NodeReach:
    """Of a row with WAYS."""
    if row["reach"] == "direct":
        way = DIRECT
    elif row["listener_host"] is not None:
        way = LISTENER
    else:
        way = TUNNEL if row["has_tunnel"] else NONE
    return NodeReach(
        way, row["advertised"], row["fingerprint"], row["listener_checked_at"], row["listener_problem"]
    )


class ReachStore:
    """The only place with SQL about ways to nodes, but for what `nodes.beats` writes with a heartbeat."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool

    async def listener_checked(
        self, node_id: str, asked: ReachAsked, address: tuple[str, int] | None, problem: str
    ) -> None:
        """Note the outcome of a check; of one that its agent has changed meanwhile nothing is noted."""
        host, port = address or (None, None)
        await self._pool.execute(
            CHECKED, uuid.UUID(node_id), asked.advertise, asked.fingerprint, host, port,
            asked.fingerprint if address else None, problem,
        )  # fmt: skip

    async def tunnel_opened(self, node_id: str, account_id: int, tunnel_id: uuid.UUID, worker: str) -> bool:
        """Whether the node is that account's and may have a tunnel; then this one is its tunnel from now on."""
        return bool(await self._pool.fetchval(OPENED, uuid.UUID(node_id), account_id, tunnel_id, worker))

    async def tunnel_closed(self, tunnel_id: uuid.UUID) -> None:
        """The tunnel has ended; one that was opened after it stays."""
        await self._pool.execute("delete from tunnels where tunnel_id = $1", tunnel_id)


CHECKED = """
update nodes set listener_host = $4, listener_port = $5, listener_fingerprint = $6, listener_problem = $7,
                 listener_checked_at = clock_timestamp()
where id = $1 and advertised = $2 and fingerprint = $3 and reach = 'agent'
"""

OPENED = """
insert into tunnels (node_id, tunnel_id, worker)
select n.id, $3, $4 from nodes n where n.id = $1 and n.account_id = $2 and n.state <> 'suspended'
on conflict (node_id) do update set
    tunnel_id = excluded.tunnel_id, worker = excluded.worker, opened_at = clock_timestamp()
returning true
"""
