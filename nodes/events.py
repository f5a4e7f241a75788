"""What agents tell beside heartbeats, and what is told about them: events, and the GPU's samples. Old ones are deleted.

Samples are written with heartbeats (`heartbeats`); what a sum of them means for a provider's standing is `reputation`'s.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

import asyncpg

SEVERITIES = ("info", "warning", "error", "critical")

SAMPLES_KEPT_S = 24 * 3600.0
"""One a minute: what the contract's largest `limit` (1440) can ask for."""

EVENTS_KEPT_S = 30 * 24 * 3600.0
EVENTS_KEPT_MAX = 1000
"""Of one provider: the newest. An agent that crashes every second must not fill the table."""

TRIMMED_MAX = 50_000
"""Rows deleted in one statement, which thus ends long before its time-out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One event; texts are empty where nothing was told."""

    event_type: str
    severity: str = "info"
    daemon_version: str = ""
    hostname: str = ""
    os_info: str = ""
    python_version: str = ""
    details: str = ""
    job_id: str = ""
    happened_at: datetime | None = None  # by the agent's clock


ADD = """
insert into daemon_events (account_id, node_id, event_type, severity, daemon_version, hostname, os_info,
    python_version, details, job_id, happened_at)
values ($1, (select id from nodes where id = $2 and account_id = $1), $3, $4, $5, $6, $7, $8, $9, $10, $11)
"""

LIST = """
select id, node_id::text, event_type, severity, daemon_version, hostname, os_info, python_version, details, job_id,
    happened_at, at
from daemon_events where account_id = $1 and ($2::text is null or severity = $2)
order by id desc limit $3
"""

SAMPLES = """
select s.node_id::text, s.minute, s.util_pct, s.vram_used_mib, s.vram_free_mib, s.temp_c, s.power_w
from gpu_samples s join nodes n on n.id = s.node_id
where n.account_id = $1 and ($2::timestamptz is null or s.minute >= $2)
order by s.minute desc, s.node_id limit $3
"""

RUNTIME = """
select id::text as node_id, hostname, state, agent_version, last_heartbeat_at, readiness::text as readiness
from nodes where account_id = $1 order by last_heartbeat_at desc nulls last, id limit 100
"""


class EventStore:
    """The queries on events and samples of a provider's nodes."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool

    async def add(self, account_id: int, event: Event, node_id: str | None = None) -> None:
        """A node that is not the provider's is left out."""
        await self._pool.execute(
            ADD, account_id, None if node_id is None else UUID(node_id), event.event_type, event.severity,
            event.daemon_version, event.hostname, event.os_info, event.python_version, event.details,
            event.job_id, event.happened_at,
        )  # fmt: skip

    async def newest(self, account_id: int, limit: int, severity: str | None) -> list[dict[str, Any]]:
        """The newest first."""
        return [dict(row) for row in await self._pool.fetch(LIST, account_id, severity, limit)]

    async def samples(self, account_id: int, limit: int, since: datetime | None) -> list[dict[str, Any]]:
        """The newest `limit` from `since` on, the oldest first, as a chart draws them."""
        return [dict(row) for row in await self._pool.fetch(SAMPLES, account_id, since, limit)][::-1]

    async def runtime(self, account_id: int) -> list[dict[str, Any]]:
        """What runs on each node."""
        return [dict(row) for row in await self._pool.fetch(RUNTIME, account_id)]


async def trim_events(pool: asyncpg.Pool) -> None:
    """Delete what is too old, in bounded pieces."""
    for statement, kept in TRIMS:
        piece = TRIMMED_MAX
        while piece == TRIMMED_MAX:
            done = await pool.execute(statement, kept, TRIMMED_MAX)
            piece = int(done.rsplit(" ", 1)[1])


TRIM_SAMPLES = """
delete from gpu_samples where (node_id, minute) in (
    select node_id, minute from gpu_samples where minute < clock_timestamp() - make_interval(secs => $1) limit $2)
"""
TRIM_EVENTS = """
delete from daemon_events where id in (
    select id from daemon_events where at < clock_timestamp() - make_interval(secs => $1) limit $2)
"""
TRIM_MANY = """
delete from daemon_events where id in (
    select id from (
        select id, row_number() over (partition by account_id order by id desc) as place from daemon_events
    ) as placed
    where place > $1 limit $2)
"""
TRIMS = ((TRIM_SAMPLES, SAMPLES_KEPT_S), (TRIM_EVENTS, EVENTS_KEPT_S), (TRIM_MANY, EVENTS_KEPT_MAX))
