"""What gateways want of nodes, as rows: the state that stays, and commands, of which each is done once.

Any worker may write them; the worker that has the agent's control websocket hears of it by the change feed (kind
`node_command`), and the next heartbeat's reply carries what no websocket did. Sending is left to `gateway.control`.
"""

import json
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import asyncpg

from nodes.control_messages import COMMANDS_MAX, SERVE, Command, Progress
from nodes.protocol import WANTED_BY_STATE

EXPIRES_S = 900.0
"""A node that was away for longer than this has more to do than what was wanted of it then."""

KEPT_S = 7 * 86400.0
"""Commands that have ended are shown for so long."""

SHOWN_MAX = 100


class UnknownNode(Exception):
    """There is no such node."""


class TooManyCommands(Exception):
    """The node has not done so many commands yet that it gets no more."""


@dataclass(frozen=True, slots=True)
class Briefing:
    """What an agent is to know: `instance` has the lease, `commands` are not done yet."""

    account_id: int
    is_approved: bool  # its provider, whose account is active
    state: str
    instance: str
    wanted: str = SERVE
    commands: tuple[Command, ...] = field(default=())


class CommandStore:
    """The only place with SQL about commands."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool

    async def want(self, node_id: str, wanted: str) -> None:
        """Set what is wanted of a node, until something else is. Raises UnknownNode."""
        if await self._pool.execute(WANT, uuid.UUID(node_id), wanted) == "UPDATE 0":
            raise UnknownNode

    async def send(
        self, node_id: str, name: str, arguments: Mapping[str, str], *, expires_s: float = EXPIRES_S
    ) -> int:
        """Give a command; its id, or that of the same one that is not done yet. Raises UnknownNode, TooManyCommands.

        The name and arguments are checked by `Command.from_json`.
        """
        node, told = uuid.UUID(node_id), json.dumps(dict(arguments), sort_keys=True)
        async with self._pool.acquire() as connection, connection.transaction():
            if await connection.fetchval("select id from nodes where id = $1 for update", node) is None:
                raise UnknownNode
            await connection.execute(EXPIRE, node)
            known = await connection.fetchval(SAME, node, name, told)
            if known is not None:
                return int(known)
            if await connection.fetchval(COUNT, node) >= COMMANDS_MAX:
                raise TooManyCommands
            return int(await connection.fetchval(GIVE, node, name, told, expires_s))

    async def briefing(self, node_id: str) -> Briefing | None:
        """All that a node's agent is to know; None for an unknown node."""
        row = await self._pool.fetchrow(BRIEFING, uuid.UUID(node_id))
        if row is None:
            return None
        wanted = WANTED_BY_STATE.get(row["state"], row["wanted"])  # its provider may have paused it
        commands = tuple(Command(**given) for given in json.loads(row["commands"]))
        return Briefing(
            row["account_id"], row["is_approved"], row["state"], row["instance"], wanted, commands
        )

    async def progress(self, node_id: str, reports: Iterable[Progress]) -> None:
        """Write down how far commands have come; one that has ended stays as it ended."""
        await self._pool.executemany(PROGRESS, progress_values(node_id, reports))

    async def recent(self, node_id: str) -> list[dict[str, Any]]:
        """A node's commands, the newest first."""
        rows = await self._pool.fetch(RECENT, uuid.UUID(node_id), SHOWN_MAX)
        return [{**row, "arguments": json.loads(row["arguments"])} for row in rows]

    async def trim(self, kept_s: float = KEPT_S) -> None:
        """Delete commands that ended long ago, and end those that no agent came for."""
        await self._pool.execute(EXPIRE_ALL)
        await self._pool.execute(TRIM, kept_s)


def progress_values(node_id: str, reports: Iterable[Progress]) -> list[tuple[Any, ...]]:
    """For PROGRESS."""
    node = uuid.UUID(node_id)
    return [(each.id, node, each.status, each.percent, each.detail.replace("\x00", "")) for each in reports]


# The commands of the node `n` that are not done yet.
OPEN = """(
    select coalesce(jsonb_agg(
        jsonb_build_object('id', c.id, 'name', c.name, 'arguments', c.arguments) order by c.id), '[]')
    from node_commands c
    where c.node_id = n.id and c.status not in ('done', 'failed')
      and (c.status <> 'queued' or c.expires_at > clock_timestamp())
)"""

BRIEFING = f"""
select n.account_id, n.state, n.instance, n.wanted,
    a.status = 'active' and a.is_provider and a.approval_status = 'approved' as is_approved,
    {OPEN} as commands
from nodes n join accounts a on a.id = n.account_id where n.id = $1
"""  # noqa: S608 - a constant of this module

WANT = """
update nodes set wanted = $2, state = case
    when state not in ('online', 'paused', 'draining') then state
    when $2 = 'pause' then 'paused' when $2 = 'drain' then 'draining' else 'online' end
where id = $1
"""

EXPIRE = """
update node_commands set status = 'failed', detail = 'the agent did not come for it', updated_at = clock_timestamp()
where status = 'queued' and expires_at < clock_timestamp() and node_id = $1
"""

EXPIRE_ALL = EXPIRE.replace(" and node_id = $1", "")

SAME = """
select id from node_commands
where node_id = $1 and name = $2 and arguments = $3::jsonb and status not in ('done', 'failed')
"""

COUNT = "select count(*) from node_commands where node_id = $1 and status not in ('done', 'failed')"

GIVE = """
insert into node_commands (node_id, name, arguments, expires_at)
values ($1, $2, $3::jsonb, clock_timestamp() + make_interval(secs => $4)) returning id
"""

PROGRESS = """
update node_commands set status = $3, percent = $4, detail = $5, updated_at = clock_timestamp()
where id = $1 and node_id = $2 and status not in ('done', 'failed')
"""

RECENT = """
select id, name, arguments, status, percent, detail, created_at, updated_at from node_commands
where node_id = $1 order by id desc limit $2
"""

TRIM = """
delete from node_commands
where status in ('done', 'failed') and updated_at < clock_timestamp() - make_interval(secs => $1)
"""
