"""What agents report, as rows: a heartbeat comes in, nodes and engines are written, silent nodes go offline.

PostgreSQL's clock decides who is late. The picture that turns are routed by is made from these rows in `nodes.registry`.
"""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import asyncpg
import orjson

from nodes.protocol import EngineReport, Heartbeat


class NodeOfAnother(Exception):
    """The node id belongs to another provider."""


class AddressOfAnother(Exception):
    """An engine of another provider has that address."""


@dataclass(frozen=True, slots=True)
class EngineRow:
    """One engine that may serve: ready, on a node that is online."""

    node_id: str
    engine_id: str
    account_id: int
    url: str
    restarts: int
    models: tuple[dict[str, Any], ...]
    is_behind_agent: bool = False  # `url` is then what it is called on its own host
    listener: tuple[str, int, str] | None = None  # host, port and fingerprint of its agent's, checked
    tunnel: str = ""  # where the worker in which its agent's ends takes hops

    @property
    def key(self) -> str:
        """Names the engine in the whole pool."""
        return f"{self.node_id}/{self.engine_id}"


@dataclass(frozen=True, slots=True)
class NodeLease:
    """What a node may count on after a heartbeat."""

    epoch: int
    state: str


class NodeStore:
    """The only place with SQL about nodes and engines."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool

    async def record(self, account_id: int, beat: Heartbeat, engines: Sequence[EngineReport]) -> NodeLease:
        """Write one heartbeat; its node is made at the first one. Raises NodeOfAnother and AddressOfAnother."""
        async with self._pool.acquire() as connection, connection.transaction():
            lease = await connection.fetchrow(
                BEAT, uuid.UUID(beat.node_id), account_id, beat.provider_hostname or "", list(beat.cached_models),
                orjson.dumps(beat.gpu_status).decode(), beat.agent_version,
            )  # fmt: skip
            if lease is None:
                raise NodeOfAnother
            if (lease["reach"], beat.reach.mode) != ("direct", "direct"):
                reach = beat.reach
                await connection.execute(
                    REACH, uuid.UUID(beat.node_id), reach.mode, reach.advertise, reach.fingerprint
                )
            urls = [engine.url for engine in engines]
            if beat.reach.mode == "direct" and await connection.fetchval(TAKEN, account_id, urls):
                raise AddressOfAnother
            await connection.executemany(ENGINE, [_engine_values(beat.node_id, engine) for engine in engines])
            await connection.execute(
                "delete from engines where node_id = $1 and engine_id <> all($2::text[])",
                uuid.UUID(beat.node_id), [engine.engine_id for engine in engines],
            )  # fmt: skip
        return NodeLease(lease["epoch"], lease["state"])

    async def ready_engines(self) -> tuple[list[EngineRow], int]:
        """Every engine that may serve, and the number of nodes online."""
        async with (
            self._pool.acquire() as connection,
            connection.transaction(isolation="repeatable_read", readonly=True),
        ):
            rows = await connection.fetch(READY)
            online = await connection.fetchval("select count(*) from nodes where state = 'online'")
        return [_engine_row(row) for row in rows], online

    async def expire(self, before: datetime) -> list[str]:
        """Nodes that were last heard of before that, by PostgreSQL's clock, go offline; their ids.

        A moment, not an age: a statement that a frozen PostgreSQL carries out late must not judge by the time it was frozen.
        """
        rows = await self._pool.fetch(EXPIRE, before)
        return [str(row["id"]) for row in rows]


# A node that was away gets its lease anew, under a higher epoch; a node that an admin paused stays paused.
BEAT = """
insert into nodes (id, account_id, hostname, state, last_heartbeat_at, cached_models, gpu_status, agent_version)
values ($1, $2, $3, 'online', clock_timestamp(), $4, $5::jsonb, $6)
on conflict (id) do update set
    hostname = excluded.hostname,
    state = case when nodes.state in ('registered', 'connected', 'offline') then 'online' else nodes.state end,
    epoch = nodes.epoch + (nodes.state = 'offline')::int,
    last_heartbeat_at = excluded.last_heartbeat_at,
    cached_models = excluded.cached_models,
    gpu_status = excluded.gpu_status,
    agent_version = excluded.agent_version
where nodes.account_id = excluded.account_id
returning epoch, state, reach
"""

# What was checked of a listener is forgotten when its agent says another thing of it.
REACH = """
update nodes set reach = $2, advertised = $3, fingerprint = $4,
    listener_host = null, listener_port = null, listener_fingerprint = null, listener_checked_at = null,
    listener_problem = ''
where id = $1 and (reach, advertised, fingerprint) is distinct from ($2, $3, $4)
"""

TAKEN = """
select true from engines e join nodes n on n.id = e.node_id
where e.url = any($2::text[]) and n.account_id <> $1 and n.reach = 'direct' and n.state <> 'offline'
limit 1
"""

ENGINE = """
insert into engines (node_id, engine_id, url, state, reason, restarts, models, block_size, kv_tokens)
values ($1, $2, $3, $4, $5, $6, $7::jsonb, $8, $9)
on conflict (node_id, engine_id) do update set
    url = excluded.url, state = excluded.state, reason = excluded.reason, restarts = excluded.restarts,
    models = excluded.models, block_size = excluded.block_size, kv_tokens = excluded.kv_tokens,
    updated_at = clock_timestamp()
"""

READY = """
select n.id as node_id, n.account_id, e.engine_id, e.url, e.restarts, e.models,
       n.reach = 'agent' as is_behind_agent, n.listener_host, n.listener_port, n.listener_fingerprint, t.worker
from nodes n join engines e on e.node_id = n.id left join tunnels t on t.node_id = n.id
where n.state = 'online' and e.state = 'ready'
order by n.id, e.engine_id
"""

EXPIRE = """
update nodes set state = 'offline'
where state in ('registered', 'connected', 'online', 'paused', 'draining')
  and last_heartbeat_at < $1
returning id
"""


def _engine_values(node_id: str, engine: EngineReport) -> tuple[Any, ...]:
    models = [
        {"id": model.id, "context_length": model.context_length, "kind": model.kind, "parent": model.parent}
        for model in engine.models
    ]
    return (
        uuid.UUID(node_id), engine.engine_id, engine.url, engine.state, engine.reason, engine.restarts,
        orjson.dumps(models).decode(), engine.block_size, engine.kv_tokens,
    )  # fmt: skip


def _engine_row(row: asyncpg.Record) -> EngineRow:
    return EngineRow(
        node_id=str(row["node_id"]),
        engine_id=row["engine_id"],
        account_id=row["account_id"],
        url=row["url"],
        restarts=row["restarts"],
        models=tuple(orjson.loads(row["models"])),
        is_behind_agent=row["is_behind_agent"],
        listener=None
        if row["listener_host"] is None
        else (row["listener_host"], row["listener_port"], row["listener_fingerprint"]),
        tunnel=row["worker"] or "",
    )
