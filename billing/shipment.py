"""One batch of a journal on its way into the book: rows, postings, budgets, rollups and the new position, all or nothing.

A batch comes as the journal has it and PostgreSQL decodes it: this process's core is for turns. When batches are sent
and what becomes of refused ones is shipper.py's.
"""

# ruff: noqa: S608 (statements are put together from this module's own texts, values are parameters)

from collections.abc import Iterable
from dataclasses import dataclass
from uuid import UUID

import asyncpg

from billing.budgets import post_budgets
from billing.journal_files import START, Batch, Position
from billing.ledger import Connection, Posting, post_turns, share_nano
from billing.records import OF_VERSION
from billing.retention import OLDEST_SHIPPED
from billing.usage import COLUMNS
from config.defaults import Settings
from config.ids import uuid7

LOCK = """
select shipped_segment, shipped_offset, state = 'live' as is_live from incarnations where id = $1 for no key update
"""

ADVANCE = """
update incarnations set shipped_segment = $2, shipped_offset = $3,
    seen_at = case when state = 'live' then clock_timestamp() else seen_at end
where id = $1
"""

# Element n + 1 of a record's list is its field n (billing/records.py).
_AT = {name: f"(r ->> {n})" for n, name in enumerate(COLUMNS, 1)}
_READ = {name: f"{_AT[name]}::{kind}" for name, kind in COLUMNS.items()} | {
    "started_at": f"to_timestamp({_AT['started_at']}::float8)",
    # $4: whether its leases still pay. If not, they went back to the wallets, and the platform pays.
    "amount_nano": f"case when $4 then {_AT['amount_nano']}::bigint else 0 end",
    "loss_nano": f"{_AT['loss_nano']}::bigint + case when $4 then 0 else {_AT['amount_nano']}::bigint end",
}
_FIELDS = ",\n        ".join(f"{read} as {name}" for name, read in _READ.items())
_BUDGETS = len(COLUMNS) + 1
_KEY = len(COLUMNS) + 2

_SUMS = ("turns", "prompt_tokens", "cached_tokens", "completion_tokens", "amount_nano")
_SUMMED = ", ".join(f"sum({name})::bigint" for name in _SUMS[1:])
_ADDED_UP = f"account_id, hour, key_id, model, {', '.join(_SUMS)}"

# One row of the answer is: of turns, what a posting takes of those that are new; all sums for the rollups, as a text that
# goes back as it is; a budget's charge; the claim of a turn that was answered or charged; how many are too old. A posting's
# id is made from a UUIDv7 of ours ($2), so that those of a time lie together.
INSERT = f"""
with sent as materialized (
    select {_FIELDS},
        r -> {_BUDGETS} as budgets,
        r ->> {_KEY} as idempotency_key,
        (substr($2, 1, 19) || substr(gen_random_uuid()::text, 20))::uuid as own_id
    from jsonb_array_elements($1::text::jsonb) as r
), named as (
    select *, case when amount_nano > 0 then
        first_value(own_id) over (partition by account_id, provider_id)
    end as posting_id
    from sent
), fresh as (
    insert into usage ({", ".join(COLUMNS)}, posting_id)
    select {", ".join(COLUMNS)}, posting_id from named
    on conflict do nothing
    returning *
), summed as (
    select account_id, date_trunc('hour', started_at, 'UTC') as hour, key_id, model, count(*), {_SUMMED}
    from fresh group by 1, 2, 3, 4
)
select 'turns' as kind, account_id as id, provider_id, posting_id as uuid, null::timestamptz as at, null as text,
    count(*) as turns, sum(amount_nano)::bigint as amount_nano, sum(loss_nano)::bigint as loss_nano
from fresh group by account_id, provider_id, posting_id
union all
select 'rollups', null, null, null, null, json_agg(json_build_array({_ADDED_UP}))::text, null, null, null
from summed as s ({_ADDED_UP}) having count(*) > 0
union all
select 'budget', (b ->> 0)::bigint, null, null,
    case when b ->> 1 is null then '-infinity' else to_timestamp((b ->> 1)::float8) end,
    null, null, sum(s.amount_nano)::bigint, null
from (select distinct on (turn_id) turn_id, amount_nano, budgets from sent
      where amount_nano > 0 and budgets <> '[]') as s
join fresh using (turn_id) cross join lateral jsonb_array_elements(s.budgets) as b group by 2, 5
union all
select 'claim', account_id, null, turn_id, null, idempotency_key, null, null, null
from sent where idempotency_key is not null and (amount_nano + loss_nano > 0 or status = 200)
union all
select 'old', null, null, null, null, null, count(*), null, null
from sent where started_at < {OLDEST_SHIPPED.format(days="$3")} having count(*) > 0
"""

_ADDED = ", ".join(f"{name} = r.{name} + excluded.{name}" for name in _SUMS)

# Rows are taken in the order of their keys, so that two shippers can't wait for each other. A key's last use is kept to
# the minute, which spares most writes; one that somebody else holds is left for the next batch.
ADD_UP = f"""
with added as materialized (
    select (r ->> 0)::bigint as account_id, (r ->> 1)::timestamptz as hour, (r ->> 2)::bigint as key_id, r ->> 3 as model,
        {", ".join(f"(r ->> {n})::bigint as {name}" for n, name in enumerate(_SUMS, 4))}
    from jsonb_array_elements($1::text::jsonb) as r
), hours as (
    insert into usage_hours as r ({_ADDED_UP})
    select * from added order by 1, 2, 3, 4
    on conflict (account_id, hour, key_id, model) do update set {_ADDED}
), days as (
    insert into usage_days as r (account_id, day, key_id, model, {", ".join(_SUMS)})
    select account_id, (hour at time zone 'UTC')::date, key_id, model, {", ".join(f"sum({name})::bigint" for name in _SUMS)}
    from added group by 1, 2, 3, 4 order by 1, 2, 3, 4
    on conflict (account_id, day, key_id, model) do update set {_ADDED}
)
update api_keys set last_used_at = clock_timestamp() where id in (
    select id from api_keys where id in (select key_id from added)
        and coalesce(last_used_at < clock_timestamp() - interval '1 minute', true)
    for no key update skip locked
)
"""

FINISH_CLAIMS = """
update idempotency_claims c set state = 'finished', finished_at = clock_timestamp()
from unnest($1::bigint[], $2::text[], $3::uuid[]) as done (account_id, key, turn_id)
where c.account_id = done.account_id and c.key = done.key and c.turn_id = done.turn_id and c.state = 'running'
"""

QUARANTINE = (
    "insert into usage_quarantine (turn_id, reason, record) values ($1, $2, $3) on conflict do nothing"
)


class UnknownIncarnation(LookupError):
    """This database knows nothing of the journal's process."""


class TooOld(ValueError):
    """A turn from before the usage that is kept: whether it was charged already can't be seen any more."""


@dataclass(frozen=True, slots=True)
class Place:
    """How far the book has an incarnation's journal, and whether its leases still pay."""

    position: Position
    is_live: bool


@dataclass(frozen=True, slots=True)
class Shipped:
    """What became of a batch; nothing where the book was elsewhere (`place` says where)."""

    place: Place
    is_done: bool
    turns: int = 0  # the new ones
    amount_nano: int = 0
    loss_nano: int = 0
    is_quarantined: bool = False
    charged: tuple[tuple[int, int], ...] = ()  # account and amount, of new turns


async def read_place(connection: Connection, incarnation_id: UUID) -> Place:
    """Lock the incarnation's row: nobody else ships it, and nobody gives it up, before the transaction ends."""
    row = await connection.fetchrow(LOCK, incarnation_id)
    if row is None:
        raise UnknownIncarnation(str(incarnation_id))
    position = Position(row["shipped_segment"], row["shipped_offset"])
    return Place(max(position, START), row["is_live"])


async def ship(
    connection: Connection, incarnation_id: UUID, batch: Batch, settings: Settings, shard: int
) -> Shipped:
    """The batch in the caller's transaction, if the book is where it starts.

    Raises what PostgreSQL says of a record that it refuses, TooOld, UnknownIncarnation.
    """
    place = await read_place(connection, incarnation_id)
    if place.position != batch.start:
        return Shipped(place, is_done=False)
    if not all(payload.startswith(OF_VERSION) for payload in batch.payloads):
        raise ValueError("a record that this version of poolgate can't read")
    text = (b"[" + b",".join(batch.payloads) + b"]").decode()
    rows = await connection.fetch(INSERT, text, str(uuid7()), settings.usage_retention_days, place.is_live)
    kinds: dict[str, list[asyncpg.Record]] = {
        "turns": [],
        "rollups": [],
        "budget": [],
        "claim": [],
        "old": [],
    }
    for row in rows:
        kinds[row["kind"]].append(row)
    if kinds["old"]:
        raise TooOld(
            "it started before the usage that is kept: whether it was charged can't be seen any more"
        )
    turns = kinds["turns"]
    postings = _postings(turns, settings)
    if postings:
        await post_turns(connection, incarnation_id, postings, shard=shard)
    if kinds["budget"]:
        charges = [(row["id"], row["at"], row["amount_nano"]) for row in kinds["budget"]]
        await post_budgets(connection, incarnation_id, charges)
    for row in kinds["rollups"]:
        await connection.execute(ADD_UP, row["text"])
    if kinds["claim"]:
        claims = [(row["id"], row["text"], row["uuid"]) for row in kinds["claim"]]
        await connection.execute(FINISH_CLAIMS, *map(list, zip(*sorted(claims), strict=True)))
    await connection.execute(ADVANCE, incarnation_id, *batch.next)
    return Shipped(
        place,
        is_done=True,
        turns=sum(row["turns"] for row in turns),
        amount_nano=sum(row["amount_nano"] for row in turns),
        loss_nano=sum(row["loss_nano"] for row in turns),
        charged=tuple(
            (posting.account_id, posting.amount_nano) for posting in postings if posting.amount_nano
        ),
    )


async def quarantine(
    connection: Connection, incarnation_id: UUID, batch: Batch, record: tuple[str, str], reason: str
) -> Shipped:
    """Put what a batch has, one record or one bad piece, aside as (its id, its text), and go on behind it."""
    place = await read_place(connection, incarnation_id)
    if place.position != batch.start:
        return Shipped(place, is_done=False)
    await connection.execute(QUARANTINE, record[0], ascii(reason)[1:-1], record[1])
    await connection.execute(ADVANCE, incarnation_id, *batch.next)
    return Shipped(place, is_done=True, is_quarantined=True)


def _postings(turns: Iterable[asyncpg.Record], settings: Settings) -> list[Posting]:
    """One for each account and provider; the share is rounded once, of the sum."""
    sums: dict[tuple[int, int | None], tuple[UUID | None, int, int]] = {}
    for row in turns:
        group = (row["id"], row["provider_id"])
        id_, amount_nano, loss_nano = sums.get(group, (None, 0, 0))
        sums[group] = (
            id_ or row["uuid"],
            amount_nano + row["amount_nano"],
            loss_nano + row["loss_nano"],
        )
    return [
        # Only a loss: no turn names it, as none cost anything.
        Posting(id_ or uuid7(), *group, amount_nano, *_shares(group[1], amount_nano, loss_nano, settings))
        for group, (id_, amount_nano, loss_nano) in sums.items()
        if amount_nano or (loss_nano and group[1] is not None)
    ]


def _shares(provider_id: int | None, amount_nano: int, loss_nano: int, settings: Settings) -> tuple[int, int]:
    if provider_id is None:
        return 0, 0
    share_bp, rounding = settings.provider_share_bp, settings.provider_share_rounding
    return share_nano(amount_nano, share_bp, rounding), share_nano(loss_nano, share_bp, rounding)
