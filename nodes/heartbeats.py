"""What agents report, as rows: a heartbeat comes in, nodes and engines are written, silent nodes go offline.

PostgreSQL's clock decides who is late. The picture that turns are routed by is made from these rows in `nodes.registry`.
"""

import ipaddress
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import orjson

from nodes.protocol import EngineReport, Heartbeat
from nodes.samples import keep_sample


class EngineUrlRefused(ValueError):
    """An engine's address is not one that this gateway may call."""


class NodeOfAnother(Exception):
    """The node id belongs to another provider."""


class NodeFenced(Exception):
    """Another agent has taken this node since: the one that asks has lost it for ever."""


class TooManyNodes(Exception):
    """The provider has as many nodes as one may have."""


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
class EngineRow:
    """One engine that may serve: ready, on a node that is online."""

    node_id: str
    engine_id: str
    account_id: int
    url: str
    restarts: int
    models: tuple[dict[str, Any], ...]

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

    async def record(
        self, account_id: int, beat: Heartbeat, engines: Sequence[EngineReport], *, credit_s: float = 90.0,
        nodes_max: int = 10_000,
    ) -> NodeLease:  # fmt: skip
        """Write one heartbeat; its node is made at the first one. Raises NodeOfAnother, NodeFenced and TooManyNodes.

        An agent that begins (epoch 0) takes the node under a higher epoch; the one that had it is fenced from then on.
        The time since the heartbeat before counts as up, at most `credit_s` of it.
        """
        async with self._pool.acquire() as connection, connection.transaction():
            lease = await connection.fetchrow(
                BEAT, uuid.UUID(beat.node_id), account_id, beat.provider_hostname or "", list(beat.cached_models),
                orjson.dumps(beat.gpu_status).decode(), beat.agent_version, beat.instance, beat.epoch,
            )  # fmt: skip
            if lease is None:
                owner = await connection.fetchval(
                    "select account_id from nodes where id = $1", uuid.UUID(beat.node_id)
                )
                raise NodeFenced if owner == account_id else NodeOfAnother
            await connection.executemany(ENGINE, [_engine_values(beat.node_id, engine) for engine in engines])
            await connection.execute(
                "delete from engines where node_id = $1 and engine_id <> all($2::text[])",
                uuid.UUID(beat.node_id), [engine.engine_id for engine in engines],
            )  # fmt: skip
            is_new = await keep_sample(connection, beat, engines, credit_s)
            if is_new and await connection.fetchval(COUNT, account_id) > nodes_max:
                raise TooManyNodes
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

    async def connect(
        self, account_id: int, node_id: str, readiness: Mapping[str, Any], hostname: str, nodes_max: int
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
            if is_new and await connection.fetchval(COUNT, account_id) > nodes_max:
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


# A node that was away gets its lease anew, under a higher epoch; a node that an admin paused stays paused.
BEAT = """
insert into nodes (
    id, account_id, hostname, state, last_heartbeat_at, cached_models, gpu_status, agent_version, instance
)
values ($1, $2, $3, case when (select is_paused from providers where account_id = $2) then 'paused' else 'online' end,
    clock_timestamp(), $4, $5::jsonb, $6, $7)
on conflict (id) do update set
    hostname = excluded.hostname,
    state = case
        when nodes.state not in ('registered', 'connected', 'offline') then nodes.state
        when nodes.wanted = 'pause' then 'paused' when nodes.wanted = 'drain' then 'draining' else excluded.state end,
    epoch = nodes.epoch + (nodes.state = 'offline' or excluded.instance not in ('', nodes.instance))::int,
    instance = coalesce(nullif(excluded.instance, ''), nodes.instance),
    last_heartbeat_at = excluded.last_heartbeat_at,
    cached_models = excluded.cached_models,
    gpu_status = excluded.gpu_status,
    agent_version = excluded.agent_version
where nodes.account_id = excluded.account_id
  and (excluded.instance in ('', nodes.instance) or nodes.instance = '' or $8 = 0)
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
select n.id as node_id, n.account_id, e.engine_id, e.url, e.restarts, e.models
from nodes n join engines e on e.node_id = n.id join accounts a on a.id = n.account_id
where n.state = 'online' and e.state = 'ready' and a.status = 'active' and a.approval_status = 'approved'
order by n.id, e.engine_id
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
update nodes set state = 'offline'
where state in ('registered', 'connected', 'online', 'paused', 'draining')
  and coalesce(last_heartbeat_at, created_at) < $1
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
    )
