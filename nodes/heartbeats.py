"""What agents report, as rows: a heartbeat comes in, nodes and engines are written, silent nodes go offline.

PostgreSQL's clock decides who is late. The picture that turns are routed by is made from these rows in `nodes.registry`.
"""

import ipaddress
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import asyncpg
import orjson

from nodes.protocol import EngineReport, Heartbeat


class EngineUrlRefused(ValueError):
    """An engine's address is not one that this gateway may call."""


class NodeOfAnother(Exception):
    """The node id belongs to another provider."""


@dataclass(frozen=True, slots=True)
class EngineAddress:
    """Where an engine listens; `host` is an IP address, so that no name can point elsewhere later."""

    host: str
    port: int


class AllowedNetworks:
    """The networks in which engines may be called over plain HTTP (setting `node_networks`)."""

    def __init__(self, networks: str, *, own_ports: Sequence[int] = ()) -> None:
        """`own_ports`: ports of this gateway, which on a loopback address are never an engine."""
        self._networks = tuple(
            ipaddress.ip_network(part.strip()) for part in networks.split(",") if part.strip()
        )
        self._own_ports = frozenset(own_ports)

    def address(self, url: str) -> EngineAddress:
        """The address in `url`. Raises EngineUrlRefused with what is allowed."""
        try:
            parts = urlsplit(url)
            host, port = parts.hostname or "", parts.port or 80
            ip = _ip_address("127.0.0.1" if host == "localhost" else host)
        except ValueError:
            raise EngineUrlRefused("an engine's url must be http://IP-ADDRESS:PORT") from None
        if (
            parts.scheme != "http"
            or parts.path not in {"", "/"}
            or parts.query
            or parts.fragment
            or parts.username
        ):
            raise EngineUrlRefused("an engine's url must be http://IP-ADDRESS:PORT")
        # 0.0.0.0 and :: would reach this very host, whatever networks are listed.
        if ip.is_unspecified or not any(ip in network for network in self._networks):
            raise EngineUrlRefused("the engine's address is outside the gateway's node_networks")
        if ip.is_loopback and port in self._own_ports:
            raise EngineUrlRefused("the engine's address is the gateway's own")
        return EngineAddress(str(ip), port)


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
        """Write one heartbeat; its node is made at the first one. Raises NodeOfAnother."""
        async with self._pool.acquire() as connection, connection.transaction():
            lease = await connection.fetchrow(
                BEAT, uuid.UUID(beat.node_id), account_id, beat.provider_hostname or "", list(beat.cached_models),
                orjson.dumps(beat.gpu_status).decode(), beat.agent_version,
            )  # fmt: skip
            if lease is None:
                raise NodeOfAnother
            await connection.executemany(ENGINE, [_engine_values(beat.node_id, engine) for engine in engines])
            await connection.execute(
                "delete from engines where node_id = $1 and engine_id <> all($2::text[])",
                uuid.UUID(beat.node_id), [engine.engine_id for engine in engines],
            )  # fmt: skip
        return NodeLease(lease["epoch"], lease["state"])

    async def pool(self) -> tuple[list[EngineRow], int, list[CachedRow]]:
        """Every engine that may serve, the number of nodes online, and the models that these have on disk."""
        async with (
            self._pool.acquire() as connection,
            connection.transaction(isolation="repeatable_read", readonly=True),
        ):
            rows = await connection.fetch(READY)
            online = await connection.fetchval("select count(*) from nodes where state = 'online'")
            cached = await connection.fetch(CACHED)
        return [_engine_row(row) for row in rows], online, [CachedRow(row[0], row[1]) for row in cached]

    async def overview(self, limit: int) -> list[dict[str, Any]]:
        """Nodes for people, those that were heard of last first: state, hardware, models on disk, what routing goes by."""
        rows = await self._pool.fetch(OVERVIEW, limit)
        return [dict(row) | {"gpu_status": orjson.loads(row["gpu_status"])} for row in rows]

    async def set_facts(self, node_id: str, facts: Mapping[str, Any]) -> bool:
        """Change some of what routing goes by (`NodeFacts`); False for an unknown node."""
        values = [facts.get(name) for name in ("region", "tier", "price_percent", "reputation")]
        return bool(await self._pool.fetchval(SET_FACTS, uuid.UUID(node_id), *values))

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
returning epoch, state
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
select n.id as node_id, n.account_id, e.engine_id, e.url, e.restarts, e.models, e.kv_tokens,
    n.region, n.tier, n.price_percent, n.reputation
from nodes n join engines e on e.node_id = n.id
where n.state = 'online' and e.state = 'ready'
order by n.id, e.engine_id
"""

CACHED = """
select model, id::text from nodes, unnest(cached_models) as model
where state = 'online' order by model, id
"""

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

EXPIRE = """
update nodes set state = 'offline'
where state in ('registered', 'connected', 'online', 'paused', 'draining')
  and last_heartbeat_at < $1
returning id
"""


def _ip_address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """An IPv4 address in IPv6's clothes is judged as what it is. Raises ValueError."""
    ip = ipaddress.ip_address(host)
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.scope_id is not None:
            raise ValueError(host)
        return ip.ipv4_mapped or ip
    return ip


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
        kv_tokens=row["kv_tokens"],
        facts=NodeFacts(row["region"], row["tier"], row["price_percent"], row["reputation"]),
    )
