"""Nodes and engines as rows: what agents report is gathered for `beats` to write, silent nodes go offline.

PostgreSQL's clock decides who is late. The picture that turns are routed by is made from these rows in `nodes.registry`.
"""

import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

import asyncpg
import orjson

from config.gathering import Gathering
from nodes.beats import record
from nodes.control_messages import Progress
from nodes.protocol import EngineReport, Heartbeat
from nodes.reports import NodeLease, NodeOfAnother, Report, TooManyNodes

GAP_S, GATHERED_MAX = 0.05, 256
"""Heartbeats that come closer together than this are written together, so that thousands of nodes cost 20 transactions a
second; none of them is awaited by anybody in a hurry."""


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """What the operator knows of a node and its owner asks for it: routing goes by it (`nodes.routing.filters`)."""

    region: str = ""
    tier: int = 0
    price_percent: int = 100
    reputation: float = 1.0


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
    kv_tokens: int = 0
    facts: NodeFacts = NodeFacts()

    @property
    def key(self) -> str:
        """Names the engine in the whole pool."""
        return f"{self.node_id}/{self.engine_id}"


class CachedRow(NamedTuple):
    """A model on the disk of a node that is online."""

    model: str
    node_id: str


class PoolRows(NamedTuple):
    """Every engine that may serve, the number of nodes online, and the models that these have on disk. Of engines and models
    only those of `nodes`, if not None: of them these are all."""

    engines: list[EngineRow]
    nodes_online: int
    cached: list[CachedRow]
    nodes: frozenset[str] | None = None


class NodeStore:
    """The only place with SQL about nodes and engines."""

    def __init__(self, pool: asyncpg.Pool, *, credit_s: float = 90.0, nodes_max: int = 10_000) -> None:
        """Of a time that no heartbeat told of, at most `credit_s` count as up; `nodes_max` is a provider's."""
        self._pool = pool
        self._credit_s = credit_s
        self._nodes_max = nodes_max
        self._reports = Gathering(self._record, gap_s=GAP_S, most=GATHERED_MAX)

    async def record(
        self,
        account_id: int,
        beat: Heartbeat,
        engines: Sequence[EngineReport],
        progress: Iterable[Progress] = (),
    ) -> NodeLease:
        """Write one heartbeat, together with others of this moment; its node is made at the first one.

        Raises UnknownProvider, NotApproved, NodeOfAnother, NodeFenced, AddressOfAnother, TooManyNodes; none of the others
        feels that.
        """
        return await self._reports.add(Report.of(account_id, beat, engines, progress))

    async def _record(self, reports: list[Report]) -> list[NodeLease | Exception]:
        found = await record(self._pool, reports, credit_s=self._credit_s, nodes_max=self._nodes_max)
        return [found[report] for report in reports]

    async def pool(self) -> PoolRows:
        """As it is now."""
        return await self._pool_of(None)

    async def changed(self, nodes: Iterable[str], accounts: Iterable[str]) -> PoolRows:
        """As it is now, of these nodes and of those that these accounts own."""
        owned = await self._pool.fetch(OWNED, [int(account_id) for account_id in accounts])
        return await self._pool_of(frozenset(nodes) | {str(row["id"]) for row in owned})

    async def _pool_of(self, nodes: frozenset[str] | None) -> PoolRows:
        only = None if nodes is None else [uuid.UUID(node_id) for node_id in nodes]
        async with (
            self._pool.acquire() as connection,
            connection.transaction(isolation="repeatable_read", readonly=True),
        ):
            rows = await connection.fetch(READY, only)
            online = await connection.fetchval("select count(*) from nodes where state = 'online'")
            cached = await connection.fetch(CACHED, only)
        return PoolRows(
            [_engine_row(row) for row in rows], online, [CachedRow(row[0], row[1]) for row in cached], nodes
        )

    async def overview(self, limit: int) -> list[dict[str, Any]]:
        """Nodes for people, those that were heard of last first: state, hardware, models on disk, what routing goes by."""
        rows = await self._pool.fetch(OVERVIEW, limit)
        return [dict(row) | {"gpu_status": orjson.loads(row["gpu_status"])} for row in rows]

    async def set_facts(self, node_id: str, facts: Mapping[str, Any]) -> bool:
        """Change some of what routing goes by (`NodeFacts`); False for an unknown node."""
        values = [facts.get(name) for name in ("region", "tier", "price_percent", "reputation")]
        return bool(await self._pool.fetchval(SET_FACTS, uuid.UUID(node_id), *values))

    async def connect(
        self, account_id: int, node_id: str, readiness: Mapping[str, Any], hostname: str
    ) -> None:
        """An agent has told whether its host is ready; its node is made if it is new.

        Raises NodeOfAnother, TooManyNodes.
        """
        async with self._pool.acquire() as connection, connection.transaction():
            is_new = await connection.fetchval(
                CONNECT, uuid.UUID(node_id), account_id, hostname, orjson.dumps(readiness).decode()
            )
            if is_new is None:
                raise NodeOfAnother
            if is_new and await connection.fetchval(COUNT, account_id) > self._nodes_max:
                raise TooManyNodes

    async def suspend(self, node_id: str) -> str | None:
        """No turns to a node until it is released, whatever it reports. None: no such node."""
        state: str | None = await self._pool.fetchval(SUSPEND, uuid.UUID(node_id))
        return state

    async def release(self, node_id: str, grace_s: float) -> str | None:
        """A suspended node is again what it reports; its state then. None: no such node."""
        state: str | None = await self._pool.fetchval(RELEASE, uuid.UUID(node_id), grace_s)
        return state

    async def expire(self, before: datetime) -> list[str]:
        """Nodes that were last heard of before that, by PostgreSQL's clock, go offline; their ids.

        A moment, not an age: a statement that a frozen PostgreSQL carries out late must not judge by the time it was frozen.
        """
        rows = await self._pool.fetch(EXPIRE, before)
        return [str(row["id"]) for row in rows]


READY = """
select n.id as node_id, n.account_id, e.engine_id, e.url, e.restarts, e.models, e.kv_tokens,
    n.region, n.tier, n.price_percent, n.reputation * coalesce(p.reliability_score, 100) / 100 as reputation,
    n.reach = 'agent' as is_behind_agent, n.listener_host, n.listener_port, n.listener_fingerprint, t.worker
from nodes n join engines e on e.node_id = n.id join accounts a on a.id = n.account_id
left join providers p on p.account_id = n.account_id
left join tunnels t on t.node_id = n.id
where n.state = 'online' and e.state = 'ready' and a.status = 'active' and a.approval_status = 'approved'
    and ($1::uuid[] is null or n.id = any($1))
order by n.id, e.engine_id
"""

CACHED = """
select model, n.id::text from nodes n join accounts a on a.id = n.account_id, unnest(n.cached_models) as model
where n.state = 'online' and a.status = 'active' and a.approval_status = 'approved'
    and ($1::uuid[] is null or n.id = any($1))
order by model, n.id
"""

OWNED = "select id from nodes where account_id = any($1::bigint[])"

OVERVIEW = """
select id::text as node_id, account_id, hostname, state, epoch, agent_version, cached_models, gpu_status,
    extract(epoch from clock_timestamp() - last_heartbeat_at)::float8 as heartbeat_age_s,
    region, tier::int, price_percent, reputation::float8
from nodes order by last_heartbeat_at desc nulls last, id limit $1
"""

SET_FACTS = """
update nodes set region = coalesce($2, region), tier = coalesce($3, tier),
    price_percent = coalesce($4, price_percent), reputation = coalesce($5, reputation)
where id = $1 returning true
"""

COUNT = "select count(*) from nodes where account_id = $1"

# A row that was inserted has no xmax yet.
CONNECT = """
insert into nodes (id, account_id, hostname, state, readiness) values ($1, $2, $3, 'connected', $4::jsonb)
on conflict (id) do update set
    state = case when nodes.state = 'registered' then 'connected' else nodes.state end,
    readiness = excluded.readiness
where nodes.account_id = excluded.account_id
returning xmax = 0
"""

SUSPEND = "update nodes set state = 'suspended' where id = $1 returning state"

RELEASE = """
update nodes n set state = case
    when n.state <> 'suspended' then n.state
    when coalesce(n.last_heartbeat_at, n.created_at) < clock_timestamp() - make_interval(secs => $2) then 'offline'
    when (select is_paused from providers where account_id = n.account_id) then 'paused'
    else 'online' end
where id = $1 returning state
"""

EXPIRE = """
with late as (
    select id from nodes
    where state in ('registered', 'connected', 'online', 'paused', 'draining')
      and coalesce(last_heartbeat_at, created_at) < $1
    order by id for no key update
)
update nodes set state = 'offline' from late where nodes.id = late.id returning nodes.id
"""


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
        kv_tokens=row["kv_tokens"],
        facts=NodeFacts(row["region"], row["tier"], row["price_percent"], row["reputation"]),
    )
