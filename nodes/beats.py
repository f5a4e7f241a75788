"""Heartbeats as rows, by the batch. Of a report that says nothing new only the node's row and its readings are written.

Locks are taken in the order of nodes' ids, each heartbeat is refused for itself, and none is answered before its commit.
What may be written is decided in `reports`; what follows from it all is `reputation`'s and `events`'.
"""

import uuid
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import asyncpg
import orjson

from config.postgres import AWAY, Row
from nodes.commands import OPEN, PROGRESS, progress_values
from nodes.control_messages import Command
from nodes.protocol import WANTED_BY_STATE
from nodes.providers import PREFERENCES, Preferences, preferences_of
from nodes.reaching import WAYS, reach_of
from nodes.reports import (
    AddressOfAnother,
    NodeLease,
    NodeOfAnother,
    Report,
    TooManyNodes,
    batches_of,
    engines_known,
    new_urls,
    refusal,
)

SPOILING = (
    asyncpg.DataError, asyncpg.IntegrityConstraintViolationError, asyncpg.exceptions.TransactionRollbackError,
)  # fmt: skip
"""How one heartbeat may spoil its transaction: a value that can't be kept, a provider deleted amid it, a deadlock with who
deletes one. Each of its batch is then written alone."""


Found: TypeAlias = dict[Report, NodeLease | Exception]


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


async def _record(pool: asyncpg.Pool, batch: list[Report], credit_s: float, nodes_max: int) -> Found:
    async with pool.acquire() as connection, connection.transaction():
        ids = [uuid.UUID(report.node_id) for report in batch]
        await connection.execute(LOCK, ids)
        rows = await connection.fetch(KNOWN, ids, [report.account_id for report in batch])
        known = dict(zip(batch, rows, strict=True))
        found: Found = {report: error for report in batch if (error := refusal(report, known[report]))}
        found |= await _taken(connection, {report: known[report] for report in batch if report not in found})
        new = [report for report in batch if report not in found and known[report]["owner_id"] is None]
        found |= await _too_many(connection, new, nodes_max)
        good = [report for report in batch if report not in found]
        progress = [value for report in good for value in progress_values(report.node_id, report.progress)]
        if progress:
            await connection.executemany(PROGRESS, sorted(progress))
        nodes = f"[{','.join(report.node for report in good)}]"
        written = await connection.fetch(WRITE, nodes, credit_s) if good else ()
        told = {str(row["id"]): row for row in written}
        await _write_engines(connection, {report: known[report] for report in good if report.node_id in told})
    for report in good:  # without a row: another provider's node of this id came at the same moment
        row = told.get(report.node_id)
        found[report] = NodeOfAnother() if row is None else _lease(row, preferences_of(known[report]))
    return found


async def _write_engines(connection: Any, known: Mapping[Report, Row]) -> None:
    """What of them is not as it was. Counts come last, since an engine's hang on its row."""
    changed, gone, counted = [], [], []
    for report, row in known.items():
        before = engines_known(row)
        node_id = report.node_id
        gone += [(node_id, engine_id) for engine_id in before.keys() - report.engines.keys()]
        for engine_id, engine in sorted(report.engines.items()):
            as_it_was, counters = before.get(engine_id, (None, None))
            if engine != as_it_was:
                changed.append(
                    [node_id, engine_id, *engine[:4], orjson.dumps(engine[4]).decode(), *engine[5:]]
                )
            if report.counters.get(engine_id, counters) != counters:
                counted.append([node_id, engine_id, *report.counters[engine_id]])
    for statement, values in ((GONE, gone), (ENGINES, changed), (USAGE, counted)):
        if values:
            await connection.execute(statement, *map(list, zip(*values, strict=True)))


async def _taken(connection: Any, known: Mapping[Report, Row]) -> Found:
    """Those whose engines have the address of another provider's. Who had one already, had it before anybody else."""
    asked = {report: urls for report, row in known.items() if (urls := new_urls(report, row))}
    if not asked:
        return {}
    pairs = [(report.account_id, url) for report, urls in asked.items() for url in urls]
    others = await connection.fetch(OTHERS, [pair[0] for pair in pairs], [pair[1] for pair in pairs])
    taken = {(row["account_id"], row["url"]) for row in others}
    owners: dict[str, int] = {}
    found: Found = {}
    for report, urls in asked.items():
        owner = report.account_id
        if any((owner, url) in taken or owners.get(url, owner) != owner for url in urls):
            found[report] = AddressOfAnother()
        else:
            owners |= dict.fromkeys(urls, owner)
    return found


async def _too_many(connection: Any, new: list[Report], nodes_max: int) -> Found:
    """Those for whose nodes there is no room any more."""
    if not new:
        return {}
    rows = await connection.fetch(COUNTS, [report.account_id for report in new])
    counts = {row["account_id"]: row["count"] for row in rows}
    found: Found = {}
    for report in new:
        count = counts[report.account_id] = counts.get(report.account_id, 0) + 1
        if count > nodes_max:
            found[report] = TooManyNodes()
    return found


def _lease(row: asyncpg.Record, preferences: Preferences) -> NodeLease:
    commands = tuple(Command(**given) for given in orjson.loads(row["commands"]))
    wanted = WANTED_BY_STATE.get(row["state"], row["wanted"])  # its provider may have paused it
    return NodeLease(row["epoch"], row["state"], wanted, commands, preferences, reach_of(row))


LOCK = "select from nodes where id = any($1::uuid[]) order by id for no key update"

# A statement of its own: what it sees is not older than the locks.
KNOWN = f"""
select a.approval_status, a.time_zone, {", ".join(PREFERENCES)}, n.account_id as owner_id, n.instance,
    n.reach = 'direct' and n.state <> 'offline' as holds_urls,
    (select json_agg(json_build_array(
        e.engine_id,
        json_build_array(e.url, e.state, e.reason, e.restarts, e.models, e.block_size, e.kv_tokens),
        json_build_array(u.counter_prompt, u.counter_completion)))
     from engines e left join engine_usage u on u.node_id = e.node_id and u.engine_id = e.engine_id
     where e.node_id = n.id) as engines
from unnest($1::uuid[], $2::bigint[]) with ordinality as b(node_id, account_id, place)
left join (providers p join accounts a on a.id = p.account_id and a.is_provider) on p.account_id = b.account_id
left join nodes n on n.id = b.node_id
order by b.place
"""  # noqa: S608 - constants of ours

OTHERS = """
select distinct u.account_id, u.url
from unnest($1::bigint[], $2::text[]) as u(account_id, url) join engines e on e.url = u.url join nodes n on n.id = e.node_id
where n.account_id <> u.account_id and n.reach = 'direct' and n.state <> 'offline'
"""

COUNTS = "select account_id, count(*) from nodes where account_id = any($1::bigint[]) group by account_id"

AS_BEFORE = (
    "(n.reach, n.advertised, n.fingerprint) = (excluded.reach, excluded.advertised, excluded.fingerprint)"
)

# A node that was away gets its lease anew, under a higher epoch; a node that an admin paused stays paused. What was checked
# of a listener is forgotten when its agent says another thing of it. A host without a GPU has no samples. The time since the
# heartbeat before counts as up, at most $2 seconds of it.
WRITE = f"""
with beat as materialized (
    select * from jsonb_to_recordset($1::jsonb) as beat(
        node_id uuid, account_id bigint, hostname text, cached_models text[], gpu_status jsonb, agent_version text,
        instance text, reach text, advertised text, fingerprint text, gpu_name text, gpu_count int, vram_mib bigint,
        compute_capability text, cuda_version text, driver_version text, util_pct real, vram_used_mib bigint,
        vram_free_mib bigint, temp_c real, power_w real)
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
), facts as (
    insert into node_facts as f (node_id, gpu_name, gpu_count, vram_mib, compute_capability, cuda_version, driver_version)
    select node_id, gpu_name, gpu_count, vram_mib, compute_capability, cuda_version, driver_version
    from beat join node on node.id = beat.node_id order by node_id
    on conflict (node_id) do update set
        gpu_name = excluded.gpu_name, gpu_count = excluded.gpu_count, vram_mib = excluded.vram_mib,
        compute_capability = excluded.compute_capability, cuda_version = excluded.cuda_version,
        driver_version = excluded.driver_version,
        up_s = f.up_s + least(extract(epoch from excluded.heard_at - f.heard_at), $2),
        heard_at = excluded.heard_at
), sample as (
    insert into gpu_samples (node_id, minute, util_pct, vram_used_mib, vram_free_mib, temp_c, power_w)
    select node_id, date_trunc('minute', clock_timestamp()), util_pct, vram_used_mib, vram_free_mib, temp_c, power_w
    from beat join node on node.id = beat.node_id where gpu_count > 0 order by node_id
    on conflict (node_id, minute) do update set
        util_pct = excluded.util_pct, vram_used_mib = excluded.vram_used_mib,
        vram_free_mib = excluded.vram_free_mib, temp_c = excluded.temp_c, power_w = excluded.power_w
)
select n.id, n.epoch, n.state, n.wanted, {OPEN} as commands, {WAYS} from node n
"""  # noqa: S608 - constants of ours

GONE = """
delete from engines e using unnest($1::uuid[], $2::text[]) as gone(node_id, engine_id)
where e.node_id = gone.node_id and e.engine_id = gone.engine_id
"""

ENGINES = """
insert into engines (node_id, engine_id, url, state, reason, restarts, models, block_size, kv_tokens)
select * from unnest(
    $1::uuid[], $2::text[], $3::text[], $4::text[], $5::text[], $6::bigint[], $7::jsonb[], $8::bigint[], $9::bigint[])
on conflict (node_id, engine_id) do update set
    url = excluded.url, state = excluded.state, reason = excluded.reason, restarts = excluded.restarts,
    models = excluded.models, block_size = excluded.block_size, kv_tokens = excluded.kv_tokens,
    updated_at = clock_timestamp()
"""

# A counter begins anew with each start of its engine; what it told before it was first heard counts for nothing.
USAGE = """
insert into engine_usage as u (node_id, engine_id, counter_prompt, counter_completion)
select * from unnest($1::uuid[], $2::text[], $3::bigint[], $4::bigint[])
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
"""
