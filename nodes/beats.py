"""Heartbeats as rows, by the batch: what an unchanged report costs is its node's row and its readings, and little besides.

Locks are taken in the order of nodes' ids, each heartbeat is refused for itself, and none is answered before its commit.
What `gpu_status` says is `telemetry`'s, what follows from it all `reputation`'s and `events`'.
"""

import json
import uuid
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import asyncpg
import orjson

from config.postgres import AWAY
from nodes.commands import OPEN, PROGRESS, Command, progress_values
from nodes.control_messages import Progress
from nodes.protocol import WANTED_BY_STATE, EngineReport, Heartbeat
from nodes.providers import PREFERENCES, Preferences, UnknownProvider, preferences_of
from nodes.reaching import WAYS, NodeReach, reach_of
from nodes.telemetry import telemetry_of

SPOILING = (
    asyncpg.DataError, asyncpg.IntegrityConstraintViolationError, asyncpg.exceptions.TransactionRollbackError,
)  # fmt: skip
"""How one heartbeat may spoil its transaction: a value that can't be kept, a provider deleted amid it, a deadlock with who
deletes one. Each of its batch is then written alone."""


class NotApproved(Exception):
    """The node's provider is not approved."""


class NodeOfAnother(Exception):
    """The node id belongs to another provider."""


class NodeFenced(Exception):
    """Another agent has taken this node since: the one that asks has lost it for ever."""


class TooManyNodes(Exception):
    """The provider has as many nodes as one may have."""


class AddressOfAnother(Exception):
    """An engine of another provider has that address."""


@dataclass(frozen=True, slots=True)
class NodeLease:
    """What a node may count on after a heartbeat, and what its agent is to know."""

    epoch: int
    state: str
    wanted: str
    commands: tuple[Command, ...]  # not done yet
    preferences: Preferences
    reach: NodeReach


@dataclass(frozen=True, slots=True, eq=False)
class Report:
    """A heartbeat as rows in JSON: what can't be written as such is found out before it is one of many."""

    account_id: int
    node_id: str
    epoch: int
    instance: str
    urls: frozenset[str]  # that its engines are called at straight
    node: str
    engines: str = field(repr=False)  # rows with a comma between them
    progress: tuple[Progress, ...] = ()

    @classmethod
    def of(
        cls, account_id: int, beat: Heartbeat, engines: Sequence[EngineReport], progress: Iterable[Progress]
    ) -> "Report":
        """Raises TypeError for what JSON can't say."""
        node = {
            "node_id": beat.node_id, "account_id": account_id, "hostname": beat.provider_hostname,
            "cached_models": beat.cached_models, "gpu_status": beat.gpu_status, "agent_version": beat.agent_version,
            "instance": beat.instance, "reach": beat.reach.mode, "advertised": beat.reach.advertise,
            "fingerprint": beat.reach.fingerprint, **asdict(telemetry_of(beat.gpu_status)),
        }  # fmt: skip
        rows = [orjson.dumps({"node_id": beat.node_id, **engine.to_json()}) for engine in engines]
        urls = frozenset(engine.url for engine in engines) if beat.reach.mode == "direct" else frozenset()
        return cls(
            account_id, beat.node_id, beat.epoch, beat.instance, urls, orjson.dumps(node).decode(),
            b",".join(rows).decode(), tuple(progress),
        )  # fmt: skip


Found = dict[Report, NodeLease | Exception]


async def record(pool: asyncpg.Pool, reports: Sequence[Report], *, credit_s: float, nodes_max: int) -> Found:
    """Write them, each with all that it says or not at all; every one's lease, or what keeps it from having one:
    UnknownProvider, NotApproved, NodeOfAnother, NodeFenced, AddressOfAnother, TooManyNodes, or what PostgreSQL says.
    """
    found: Found = {}
    batches = deque(batches_of(reports))
    while batches:
        batch = batches.popleft()
        try:
            found |= await _record(pool, batch, credit_s, nodes_max)
        except SPOILING as error:
            if len(batch) == 1:
                found[batch[0]] = error
            else:
                batches.extendleft([report] for report in reversed(batch))
        except AWAY as error:
            return found | dict.fromkeys((report for left in (batch, *batches) for report in left), error)
    return found


def batches_of(reports: Iterable[Report]) -> list[list[Report]]:
    """Each has a node once, in the order of ids in which rows are locked; what a node said first comes first."""
    batches: list[dict[str, Report]] = []
    for report in reports:
        batch = next((batch for batch in batches if report.node_id not in batch), None)
        if batch is None:
            batches.append(batch := {})
        batch[report.node_id] = report
    return [[batch[node_id] for node_id in sorted(batch)] for batch in batches]


async def _record(pool: asyncpg.Pool, batch: list[Report], credit_s: float, nodes_max: int) -> Found:
    async with pool.acquire() as connection, connection.transaction():
        ids = [uuid.UUID(report.node_id) for report in batch]
        await connection.execute(LOCK, ids)
        known = await connection.fetch(KNOWN, ids, [report.account_id for report in batch])
        rows = dict(zip(batch, known, strict=True))
        found: Found = {report: error for report, row in rows.items() if (error := refusal(report, row))}
        found |= await _taken(connection, {report: rows[report] for report in batch if report not in found})
        new = [report for report in batch if report not in found and rows[report]["owner_id"] is None]
        found |= await _too_many(connection, new, nodes_max)
        good = [report for report in batch if report not in found]
        progress = [value for report in good for value in progress_values(report.node_id, report.progress)]
        if progress:
            await connection.executemany(PROGRESS, sorted(progress))
        nodes, engines = _array(report.node for report in good), _array(report.engines for report in good)
        told = await connection.fetch(WRITE, nodes, engines, credit_s) if good else ()
    leases = {str(row["id"]): row for row in told}
    for report in good:  # without a row: another provider's node of this id came at the same moment
        row = leases.get(report.node_id)
        found[report] = NodeOfAnother() if row is None else _lease(row, preferences_of(rows[report]))
    return found


def refusal(report: Report, known: Mapping[str, Any]) -> Exception | None:
    """What keeps a report from being written, as far as its node and its provider go; `known` is a row of KNOWN.

    An agent that begins (epoch 0) takes the node; the one that had it is fenced from then on.
    """
    if known["approval_status"] is None:
        return UnknownProvider()
    if known["approval_status"] != "approved":
        return NotApproved()
    if known["owner_id"] not in (None, report.account_id):
        return NodeOfAnother()
    is_its_own = report.instance in ("", known["instance"]) or not known["instance"]
    return None if is_its_own or report.epoch == 0 else NodeFenced()


async def _taken(connection: Any, rows: Mapping[Report, Any]) -> Found:
    """Those whose engines have the address of another provider's. Who had one already, had it before anybody else."""
    asked = [(r, url) for r, row in rows.items() for url in sorted(r.urls.difference(row["held"] or ()))]
    if not asked:
        return {}
    others = await connection.fetch(OTHERS, [r.account_id for r, _ in asked], [url for _, url in asked])
    owners = {row["url"]: row["owner_id"] for row in others}
    found: Found = {}
    for report, url in asked:
        if report not in found and owners.setdefault(url, report.account_id) != report.account_id:
            found[report] = AddressOfAnother()
    return found


async def _too_many(connection: Any, new: list[Report], nodes_max: int) -> Found:
    """Those for whose nodes there is no room any more."""
    if not new:
        return {}
    counts = {
        row["account_id"]: row["count"] for row in await connection.fetch(COUNTS, [r.account_id for r in new])
    }
    found: Found = {}
    for report in new:
        count = counts[report.account_id] = counts.get(report.account_id, 0) + 1
        if count > nodes_max:
            found[report] = TooManyNodes()
    return found


def _array(rows: Iterable[str]) -> str:
    return f"[{','.join(filter(None, rows))}]"


def _lease(row: asyncpg.Record, preferences: Preferences) -> NodeLease:
    commands = (
        () if row["commands"] == "[]" else tuple(Command(**given) for given in json.loads(row["commands"]))
    )
    wanted = WANTED_BY_STATE.get(row["state"], row["wanted"])  # its provider may have paused it
    return NodeLease(row["epoch"], row["state"], wanted, commands, preferences, reach_of(row))


LOCK = "select from nodes where id = any($1::uuid[]) order by id for no key update"

# A statement of its own: what it sees is not older than the locks.
KNOWN = f"""
select a.approval_status, a.time_zone, {", ".join(PREFERENCES)}, n.account_id as owner_id, n.instance,
    case when n.reach = 'direct' and n.state <> 'offline' then array(select url from engines where node_id = n.id) end
        as held
from unnest($1::uuid[], $2::bigint[]) with ordinality as b(node_id, account_id, place)
left join (providers p join accounts a on a.id = p.account_id and a.is_provider) on p.account_id = b.account_id
left join nodes n on n.id = b.node_id
order by b.place
"""  # noqa: S608 - constants of ours

OTHERS = """
select u.url, min(n.account_id) as owner_id
from unnest($1::bigint[], $2::text[]) as u(account_id, url) join engines e on e.url = u.url join nodes n on n.id = e.node_id
where n.account_id <> u.account_id and n.reach = 'direct' and n.state <> 'offline'
group by u.url
"""

COUNTS = "select account_id, count(*) from nodes where account_id = any($1::bigint[]) group by account_id"

AS_BEFORE = (
    "(n.reach, n.advertised, n.fingerprint) = (excluded.reach, excluded.advertised, excluded.fingerprint)"
)

# A node that was away gets its lease anew, under a higher epoch; a node that an admin paused stays paused. What was checked
# of a listener is forgotten when its agent says another thing of it. Of engines only what changed is written. A host without
# a GPU has no samples. An engine's counters begin anew with each of its starts; what it told before it was first heard
# counts for nothing. The time since the heartbeat before counts as up, at most $3 seconds of it.
WRITE = f"""
with beat as materialized (
    select * from jsonb_to_recordset($1::jsonb) as beat(
        node_id uuid, account_id bigint, hostname text, cached_models text[], gpu_status jsonb, agent_version text,
        instance text, reach text, advertised text, fingerprint text, gpu_name text, gpu_count int, vram_mib bigint,
        compute_capability text, cuda_version text, driver_version text, util_pct real, vram_used_mib bigint,
        vram_free_mib bigint, temp_c real, power_w real)
), told as materialized (
    select * from jsonb_to_recordset($2::jsonb) as told(
        node_id uuid, engine_id text, url text, state text, reason text, restarts bigint, models jsonb, block_size bigint,
        kv_tokens bigint, prompt_tokens bigint, completion_tokens bigint)
), node as (
    insert into nodes as n (id, account_id, hostname, state, last_heartbeat_at, cached_models, gpu_status, agent_version,
        instance, reach, advertised, fingerprint)
    select node_id, account_id, hostname,
        case when (select is_paused from providers p where p.account_id = beat.account_id) then 'paused' else 'online' end,
        clock_timestamp(), cached_models, gpu_status, agent_version, instance, reach, advertised, fingerprint
    from beat order by node_id
    on conflict (id) do update set
        hostname = excluded.hostname,
        state = case
            when n.state not in ('registered', 'connected', 'offline') then n.state
            when n.wanted = 'pause' then 'paused' when n.wanted = 'drain' then 'draining' else excluded.state end,
        epoch = n.epoch + (n.state = 'offline' or excluded.instance not in ('', n.instance))::int,
        instance = coalesce(nullif(excluded.instance, ''), n.instance),
        last_heartbeat_at = excluded.last_heartbeat_at,
        cached_models = excluded.cached_models, gpu_status = excluded.gpu_status, agent_version = excluded.agent_version,
        reach = excluded.reach, advertised = excluded.advertised, fingerprint = excluded.fingerprint,
        listener_host = case when {AS_BEFORE} then n.listener_host end,
        listener_port = case when {AS_BEFORE} then n.listener_port end,
        listener_fingerprint = case when {AS_BEFORE} then n.listener_fingerprint end,
        listener_checked_at = case when {AS_BEFORE} then n.listener_checked_at end,
        listener_problem = case when {AS_BEFORE} then n.listener_problem else '' end
    where n.account_id = excluded.account_id
    returning n.*
), engine as (
    insert into engines (node_id, engine_id, url, state, reason, restarts, models, block_size, kv_tokens)
    select node_id, engine_id, url, told.state, reason, restarts, models, block_size, kv_tokens
    from told join node on node.id = told.node_id
    where not exists (
        select from engines e where e.node_id = told.node_id and e.engine_id = told.engine_id
            and (e.url, e.state, e.reason, e.restarts, e.models, e.block_size, e.kv_tokens)
              = (told.url, told.state, told.reason, told.restarts, told.models, told.block_size, told.kv_tokens))
    order by node_id, engine_id
    on conflict (node_id, engine_id) do update set
        url = excluded.url, state = excluded.state, reason = excluded.reason, restarts = excluded.restarts,
        models = excluded.models, block_size = excluded.block_size, kv_tokens = excluded.kv_tokens,
        updated_at = clock_timestamp()
), gone as (
    delete from engines e using node where e.node_id = node.id
        and not exists (select from told where told.node_id = e.node_id and told.engine_id = e.engine_id)
), facts as (
    insert into node_facts as f (node_id, gpu_name, gpu_count, vram_mib, compute_capability, cuda_version, driver_version)
    select node_id, gpu_name, gpu_count, vram_mib, compute_capability, cuda_version, driver_version
    from beat join node on node.id = beat.node_id order by node_id
    on conflict (node_id) do update set
        gpu_name = excluded.gpu_name, gpu_count = excluded.gpu_count, vram_mib = excluded.vram_mib,
        compute_capability = excluded.compute_capability, cuda_version = excluded.cuda_version,
        driver_version = excluded.driver_version,
        up_s = f.up_s + least(extract(epoch from excluded.heard_at - f.heard_at), $3),
        heard_at = excluded.heard_at
), sample as (
    insert into gpu_samples (node_id, minute, util_pct, vram_used_mib, vram_free_mib, temp_c, power_w)
    select node_id, date_trunc('minute', clock_timestamp()), util_pct, vram_used_mib, vram_free_mib, temp_c, power_w
    from beat join node on node.id = beat.node_id where gpu_count > 0 order by node_id
    on conflict (node_id, minute) do update set
        util_pct = excluded.util_pct, vram_used_mib = excluded.vram_used_mib,
        vram_free_mib = excluded.vram_free_mib, temp_c = excluded.temp_c, power_w = excluded.power_w
), counted as (
    insert into engine_usage as u (node_id, engine_id, counter_prompt, counter_completion)
    select node_id, engine_id, prompt_tokens, completion_tokens from told join node on node.id = told.node_id
    where prompt_tokens is not null and completion_tokens is not null
        and not exists (
            select from engine_usage k where k.node_id = told.node_id and k.engine_id = told.engine_id
                and k.counter_prompt = prompt_tokens and k.counter_completion = completion_tokens)
    order by node_id, engine_id
    on conflict (node_id, engine_id) do update set
        reported_prompt = u.reported_prompt + excluded.counter_prompt - case
            when u.counter_prompt is null then excluded.counter_prompt
            when excluded.counter_prompt >= u.counter_prompt then u.counter_prompt else 0 end,
        reported_completion = u.reported_completion + excluded.counter_completion - case
            when u.counter_completion is null then excluded.counter_completion
            when excluded.counter_completion >= u.counter_completion then u.counter_completion else 0 end,
        checked_relayed_prompt = case
            when u.counter_prompt is null then u.relayed_prompt else u.checked_relayed_prompt end,
        checked_relayed_completion = case
            when u.counter_completion is null then u.relayed_completion else u.checked_relayed_completion end,
        counter_prompt = excluded.counter_prompt, counter_completion = excluded.counter_completion
)
select n.id, n.epoch, n.state, n.wanted, {OPEN} as commands, {WAYS} from node n
"""  # noqa: S608 - constants of ours
