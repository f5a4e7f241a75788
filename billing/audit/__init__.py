"""The audit: proves over the whole book, in one snapshot, that nothing was lost, doubled or moved by a nano.

`run` asks every check of `checks`; what is done about what it finds is for a person to decide.
"""

import json
from dataclasses import dataclass
from typing import Any

import asyncpg

from billing.audit.checks import CHECKS, HORIZON, Check
from config.defaults import Settings

ROWS_MAX = 20
"""Offending rows that are shown of one check; their count is always whole."""

CHECK_TIMEOUT_S = 3600.0
"""A check reads the whole book; 100 million rows take minutes."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found: how many rows break it, and the first of them."""

    check: Check
    count: int
    rows: tuple[dict[str, Any], ...]

    @property
    def state(self) -> str:
        """`ok`, `warning` or `broken`."""
        if not self.count:
            return "ok"
        return "warning" if self.check.is_warning else "broken"


async def run(pool: asyncpg.Pool, settings: Settings) -> list[Finding]:
    """Every check, all on one snapshot; writers are not hindered."""
    async with (
        pool.acquire() as connection,
        connection.transaction(isolation="repeatable_read", readonly=True),
    ):
        return await findings(connection, settings)


async def findings(connection: Any, settings: Settings) -> list[Finding]:
    """Every check as the caller's transaction sees the book."""
    await connection.execute(f"set local statement_timeout = {round(CHECK_TIMEOUT_S * 1000)}")
    return [await _find(connection, check, settings) for check in CHECKS]


async def _find(connection: Any, check: Check, settings: Settings) -> Finding:
    # What is not asked for of the horizon costs nothing: PostgreSQL leaves out parts of a query that nobody reads.
    row = await connection.fetchrow(
        f"with {HORIZON}, bad as materialized ({check.sql})"  # noqa: S608 - texts of checks.py
        " select (select count(*) from bad) as count,"
        f" coalesce((select json_agg(shown) from (select * from bad limit {ROWS_MAX}) as shown), '[]')::text as rows",
        settings.usage_hours_retention_days,
        timeout=CHECK_TIMEOUT_S,
    )
    return Finding(check, row["count"], tuple(json.loads(row["rows"])))
