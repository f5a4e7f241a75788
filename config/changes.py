"""The change log: tells each gateway process within a second which keys, accounts and nodes changed.

Rows are written by triggers (config/sql/0004_changes.sql) or `announce`; what a change means is its
subscribers' business. PostgreSQL is polled, so nothing depends on Valkey: a message there only brings the
next poll forward.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import asyncpg
from redis.asyncio import Redis
from redis.exceptions import RedisError

from config.defaults import Settings
from config.postgres import AWAY
from config.valkey import listen

log = logging.getLogger("poolgate.changes")

CHANNEL = "poolgate:changes"

EVERYTHING = "*"
"""Delivered in place of an entity when single changes can't be told: forget, or read again, the whole kind.
"""

CHANGES_READ_MAX = 10_000
"""Rows of one poll; past it, telling subscribers EVERYTHING costs less than telling them each."""

CHANGES_KEPT_S = 24 * 3600.0
"""Age at which rows are deleted. A reader that was away for half of it is told EVERYTHING."""

PASSING_KINDS = ("recall",)
PASSING_KEPT_S = 600.0
"""What is over within seconds: nobody waits any more for what such a row asks, and they come with every turn that waits."""

TRIMMED_MAX = 50_000
"""Rows deleted in one statement, which thus ends long before its time-out."""

WAKE_GAP_S = 0.02
"""Least time between two polls: a storm of messages makes PostgreSQL answer 50 polls a second, no more."""

# New is what the last poll's snapshot did not see. That is exact in whatever order ids and times become
# visible, and however long a transaction stays open; the index finds it from the snapshot's oldest running
# transaction on.
READ = """
select pg_current_snapshot()::text as snapshot, c.id, c.kind, c.entity
from (select) as once left join lateral (
    select id, kind, entity from changes
    where xid >= pg_snapshot_xmin($1::text::pg_snapshot)
      and not pg_visible_in_snapshot(xid, $1::text::pg_snapshot)
    order by id limit $2
) as c on true
"""
NOTHING_SEEN = "1:1:"

TRIM = """
delete from changes where id = any (array(
    select id from changes
    where at < clock_timestamp() - make_interval(secs => $1) and ($2::text[] is null or kind = any ($2))
    order by at limit $3
))
"""


async def announce(conn: Any, kind: str, entity: str) -> None:
    """Write a change in the caller's transaction; it is delivered after that commits, and only then."""
    await conn.execute("insert into changes (kind, entity) values ($1, $2)", kind, entity)


async def wake_feeds(valkey: Redis | None) -> None:
    """Have every process poll now; to be called after commit. Without Valkey they poll a little later."""
    if valkey is None:
        return
    try:
        await valkey.publish(CHANNEL, b"")
    except (RedisError, OSError, TimeoutError):
        log.debug("changes are delivered by polling alone", extra={"action": "changes_wake_failed"})


async def trim_changes(pool: asyncpg.Pool, keep_s: float = CHANGES_KEPT_S) -> int:
    """Delete rows older than `keep_s` seconds, passing ones sooner, in bounded pieces; returns how many. A caretaker calls
    it now and then.
    """
    deleted = 0
    for kinds, age_s in ((None, keep_s), (PASSING_KINDS, min(keep_s, PASSING_KEPT_S))):
        piece = TRIMMED_MAX
        while piece == TRIMMED_MAX:
            done = await pool.execute(TRIM, float(age_s), kinds, TRIMMED_MAX)
            piece = int(done.rsplit(" ", 1)[1])
            deleted += piece
    return deleted


class ChangeFeed:
    """Delivers each change once to the callbacks of its kind; EVERYTHING after a start or a long absence."""

    def __init__(self, pool: asyncpg.Pool, valkey: Redis | None, settings: Settings) -> None:
        self._pool = pool
        self._valkey = valkey
        self._settings = settings
        self._callbacks: dict[str, list[Callable[[str], None]]] = {}
        self._wake = asyncio.Event()
        self._snapshot = NOTHING_SEEN  # of the last poll
        self._read_at: float | None = None  # loop time of the last poll that succeeded
        self._is_reading = True
        self._is_listening = True

    def on(self, kind: str, callback: Callable[[str], None]) -> None:
        """Call `callback(entity)` for each change of `kind`; it must be idempotent, quick and know
        EVERYTHING.
        """
        self._callbacks.setdefault(kind, []).append(callback)

    @property
    def was_read(self) -> bool:
        """Whether a poll succeeded since the start."""
        return self._read_at is not None

    @property
    def is_reading(self) -> bool:
        """Whether the last poll succeeded: if not, this process may not know yet what was revoked."""
        return self._read_at is not None and self._is_reading

    async def run(self) -> None:
        """Poll until cancelled; neither store's absence ends it."""
        async with asyncio.TaskGroup() as tasks:
            if self._valkey is not None:
                hearing = listen(
                    self._valkey, CHANNEL, lambda message: self._wake.set(), changed=self._hearing
                )
                tasks.create_task(hearing, name="changes-listen")
            while True:
                await self._poll_safely()
                await asyncio.sleep(WAKE_GAP_S)
                await self._wait_for_wake()

    async def _wait_for_wake(self) -> None:
        try:
            async with asyncio.timeout(max(0.0, self._settings.change_poll_s - WAKE_GAP_S)):
                await self._wake.wait()
        except TimeoutError:
            pass
        self._wake.clear()

    async def _poll_safely(self) -> None:
        try:
            async with asyncio.timeout(self._settings.database_timeout_s):
                limit = 0 if self._read_at is None else CHANGES_READ_MAX + 1
                rows = await self._pool.fetch(READ, self._snapshot, limit)
        except AWAY as error:
            if self._is_reading:
                log.warning(
                    "changes can't be read: %s",
                    error or type(error).__name__,
                    extra={"action": "changes_unreadable"},
                )
            self._is_reading = False
            return
        if not self._is_reading:
            log.info("changes are read again", extra={"action": "changes_readable"})
        self._is_reading = True
        self._deliver(rows)

    def _deliver(self, rows: list[asyncpg.Record]) -> None:
        snapshot = rows[0]["snapshot"]
        changes = [row for row in rows if row["id"] is not None]
        now = asyncio.get_running_loop().time()
        was_away = self._read_at is None or now - self._read_at > CHANGES_KEPT_S / 2
        is_other_database = _oldest(snapshot) < _oldest(self._snapshot)
        self._snapshot, self._read_at = snapshot, now
        if was_away or is_other_database or len(changes) > CHANGES_READ_MAX:
            for kind in self._callbacks:
                self._tell(kind, EVERYTHING)
            return
        for row in changes:
            self._tell(row["kind"], row["entity"])

    def _tell(self, kind: str, entity: str) -> None:
        for callback in self._callbacks.get(kind, ()):
            try:
                callback(entity)
            except Exception:
                log.exception(
                    "a subscriber failed on a change",
                    extra={"action": "change_lost", "kind": kind, "entity": entity},
                )

    def _hearing(self, error: Exception | None) -> None:
        """Whether messages come has changed, or not."""
        if error is None and not self._is_listening:
            log.info("changes are heard again", extra={"action": "changes_heard"})
        elif error is not None and self._is_listening:
            log.warning("changes are polled only: %s", error, extra={"action": "changes_unheard"})
        self._is_listening = error is None
        self._wake.set()  # what came while nobody listened


def _oldest(snapshot: str) -> int:
    return int(snapshot.split(":", 1)[0])
