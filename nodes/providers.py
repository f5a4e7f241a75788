"""Providers as rows: what an account that owns nodes says of itself and wants of them, and what its nodes add up to.

The account itself, its keys and its money are gateway/identity's; single nodes and their heartbeats are `heartbeats`'.
"""

# ruff: noqa: S608 (statements are put together from this module's own texts, values are parameters)

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import asyncpg
import orjson

from config.postgres import Row
from nodes.telemetry import Telemetry

LISTED_MAX = 1000
"""Providers in one public list: a page of cards; the best come first."""

PREFERENCES = (
    "run_mode", "scheduled_start", "scheduled_end", "gpu_usage_cap_pct", "vram_reserve_gb", "temp_limit_c",
)  # fmt: skip
GPU_PROFILE = (
    "gpu_model", "vram_mib", "gpu_count", "compute_capability", "cuda_version", "driver_version", "location",
)  # fmt: skip


class UnknownProvider(LookupError):
    """The account is no provider."""


@dataclass(frozen=True, slots=True)
class Preferences:
    """What a provider's agents are to keep to. Hours are HH:MM in `time_zone`."""

    run_mode: str
    scheduled_start: str
    scheduled_end: str
    gpu_usage_cap_pct: int
    vram_reserve_gb: float
    temp_limit_c: int
    time_zone: str

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in (*PREFERENCES, "time_zone")}


@dataclass(frozen=True, slots=True)
class Standing:
    """Whether a provider's nodes may serve, and what it prefers."""

    approval_status: str  # pending, approved, rejected
    preferences: Preferences


@dataclass(frozen=True, slots=True)
class Provider:
    """A provider and the sum of its nodes. What nodes report of their GPUs stands before what their owner told."""

    id: int
    name: str
    email: str | None
    account_status: str
    approval_status: str
    is_paused: bool
    preferences: Preferences
    location: str
    gpu_model: str
    vram_mib: int  # of one GPU
    gpu_count: int
    compute_capability: str
    cuda_version: str
    driver_version: str
    daemon_version: str
    last_heartbeat_at: datetime | None
    heartbeat_age_s: float | None
    uptime_percent: float | None
    reliability_score: float | None
    jobs_completed: int
    cached_models: tuple[str, ...]
    states: Mapping[str, int]  # nodes by state
    readiness_status: str | None

    @property
    def status(self) -> str:
        """The contract's word for it."""
        return status_of(self.account_status, self.is_paused, self.states)


def status_of(account_status: str, is_paused: bool, states: Mapping[str, int]) -> str:
    """One word for all nodes of a provider: the best that any of them is; `draining` renders as `paused`."""
    if account_status == "suspended":
        return "suspended"
    if is_paused:
        return "paused"
    for state in ("online", "paused", "draining", "connected", "offline", "suspended"):
        if states.get(state):
            return "paused" if state == "draining" else state
    return "registered"


# The GPU of a provider with several nodes is that of its best one that is there, since a card shows one.
READ = """
select a.id, p.name, coalesce(p.email, a.email) as email, a.status as account_status, a.approval_status,
    p.is_paused, p.run_mode, p.scheduled_start, p.scheduled_end, p.gpu_usage_cap_pct, p.vram_reserve_gb,
    p.temp_limit_c, a.time_zone, p.location,
    coalesce(g.gpu_name, p.gpu_model) as gpu_model,
    coalesce(g.vram_mib, p.vram_mib) as vram_mib,
    coalesce(nullif(n.gpu_count, 0), p.gpu_count)::int as gpu_count,
    coalesce(nullif(g.compute_capability, ''), p.compute_capability) as compute_capability,
    coalesce(nullif(g.cuda_version, ''), p.cuda_version) as cuda_version,
    coalesce(nullif(g.driver_version, ''), p.driver_version) as driver_version,
    coalesce(n.daemon_version, '') as daemon_version, n.last_heartbeat_at,
    extract(epoch from clock_timestamp() - n.last_heartbeat_at)::float8 as heartbeat_age_s,
    p.uptime_percent, p.reliability_score, p.jobs_completed,
    array(select distinct model from nodes, unnest(cached_models) as model
          where account_id = p.account_id and state = 'online' order by model limit 256) as cached_models,
    coalesce(n.states, '{}') as states, r.readiness_status
from providers p
join accounts a on a.id = p.account_id
left join lateral (
    select json_object_agg(state, count) as states, sum(gpus) as gpu_count, max(heard_at) as last_heartbeat_at,
        max(version) as daemon_version
    from (
        select state, count(*), sum(gpu_count) filter (where state <> 'offline') as gpus,
            max(last_heartbeat_at) as heard_at, max(agent_version) as version
        from nodes left join node_facts on node_id = id where account_id = p.account_id group by state
    ) as by_state
) n on true
left join lateral (
    select gpu_name, vram_mib, compute_capability, cuda_version, driver_version from nodes join node_facts on node_id = id
    where account_id = p.account_id and gpu_name <> ''
    order by state = 'online' desc, vram_mib desc limit 1
) g on true
left join lateral (
    select readiness ->> 'status' as readiness_status from nodes
    where account_id = p.account_id and readiness is not null order by readiness ->> 'at' desc limit 1
) r on true
"""

LISTED = f"""
{READ}
where a.is_provider and a.status = 'active' and a.approval_status = 'approved' and not p.is_paused
  and exists (select from nodes where account_id = p.account_id and state = 'online')
order by vram_mib desc, p.reliability_score desc nulls last, a.id limit {LISTED_MAX}
"""

METRICS = """
select avg(s.util_pct)::float8 as util_pct, sum(s.vram_used_mib)::bigint as vram_used_mib,
    sum(s.vram_free_mib)::bigint as vram_free_mib, max(s.temp_c)::float8 as temp_c, sum(s.power_w)::float8 as power_w
from nodes n join lateral (
    select * from gpu_samples where node_id = n.id order by minute desc limit 1
) s on true
where n.account_id = $1 and n.state <> 'offline'
"""

# Before any of them is written: heartbeats lock nodes in this order, too.
LOCK_NODES = "select from nodes where account_id = $1 order by id for update"

PAUSE = """
update nodes set state = 'paused' where account_id = $1 and state in ('registered', 'connected', 'online')
"""
# Silence meanwhile is found out here as the caretaker would.
RESUME = """
update nodes set state = case
    when last_heartbeat_at >= clock_timestamp() - make_interval(secs => $2) then 'online' else 'offline' end
where account_id = $1 and state = 'paused'
"""


class ProviderStore:
    """The queries on providers, by the id of their account."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool

    async def standing(self, account_id: int) -> Standing:
        """Raises UnknownProvider."""
        row = await self._pool.fetchrow(
            f"select a.approval_status, a.time_zone, {', '.join(PREFERENCES)}"
            " from providers p join accounts a on a.id = p.account_id where p.account_id = $1 and a.is_provider",
            account_id,
        )
        if row is None:
            raise UnknownProvider
        return Standing(row["approval_status"], preferences_of(row))

    async def show(self, account_id: int) -> Provider:
        """Raises UnknownProvider."""
        row = await self._pool.fetchrow(f"{READ} where a.id = $1 and a.is_provider", account_id)
        if row is None:
            raise UnknownProvider
        return _provider(row)

    async def all(self) -> list[Provider]:
        """Every provider, oldest first; for its operator."""
        return [_provider(row) for row in await self._pool.fetch(f"{READ} where a.is_provider order by a.id")]

    async def listed(self) -> list[Provider]:
        """Those that may be shown to everybody: approved, active, not paused, with a node online; the largest first."""
        return [_provider(row) for row in await self._pool.fetch(LISTED)]

    async def readings(self, account_id: int) -> Telemetry:
        """The last readings of all its GPUs, of nodes that are there."""
        row = await self._pool.fetchrow(METRICS, account_id)
        assert row is not None  # an aggregate has a row
        return Telemetry(**dict(row))

    async def pause(self, account_id: int) -> None:
        """No new turns to its nodes, from the next change poll on; begun ones end. Raises UnknownProvider."""
        async with self._pool.acquire() as connection, connection.transaction():
            await _update(connection, account_id, {"is_paused": True})
            await connection.execute(LOCK_NODES, account_id)
            await connection.execute(PAUSE, account_id)

    async def resume(self, account_id: int, grace_s: float) -> str:
        """`online`, or `connected` while no node is. Nodes silent for `grace_s` are offline. Raises UnknownProvider."""
        async with self._pool.acquire() as connection, connection.transaction():
            await _update(connection, account_id, {"is_paused": False})
            await connection.execute(LOCK_NODES, account_id)
            await connection.execute(RESUME, account_id, grace_s)
            is_online = await connection.fetchval(
                "select exists (select from nodes where account_id = $1 and state = 'online')", account_id
            )
        return "online" if is_online else "connected"

    async def prefer(self, account_id: int, changes: Mapping[str, Any]) -> Preferences:
        """Change what is named of PREFERENCES; all of them as they are now. Raises UnknownProvider."""
        assert changes.keys() <= set(PREFERENCES)
        async with self._pool.acquire() as connection:
            await _update(connection, account_id, changes)
        return (await self.standing(account_id)).preferences

    async def describe(self, account_id: int, changes: Mapping[str, Any]) -> None:
        """Change what is named of GPU_PROFILE. Raises UnknownProvider."""
        assert changes.keys() <= set(GPU_PROFILE)
        async with self._pool.acquire() as connection:
            await _update(connection, account_id, changes)


async def _update(connection: Any, account_id: int, changes: Mapping[str, Any]) -> None:
    """The row is locked, so pauses and resumes of one provider take turns."""
    names = ", ".join(f"{name} = ${number}" for number, name in enumerate(changes, 2))
    done = await connection.fetchval(
        f"update providers set {names or 'name = name'} where account_id = $1 returning true",
        account_id, *changes.values(),
    )  # fmt: skip
    if not done:
        raise UnknownProvider


def preferences_of(row: Row) -> Preferences:
    """Of a row with their columns, and the account's time zone."""
    return Preferences(**{name: row[name] for name in (*PREFERENCES, "time_zone")})


def _provider(row: asyncpg.Record) -> Provider:
    values = {name: value for name, value in row.items() if name not in PREFERENCES and name != "time_zone"}
    values["preferences"] = preferences_of(row)
    values["cached_models"] = tuple(row["cached_models"])
    values["states"] = orjson.loads(row["states"])
    return Provider(**values)
