"""How dependable providers are, from heartbeats and turns, and whether engines' own counts fit what was relayed.

Counted beside the request path and brought up to date by the caretaker; nothing here moves money.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import asyncpg

WINDOW_DAYS = 30
"""What is older is forgiven."""

TURNS_ASSUMED = 20
"""Good turns that everybody starts with, so that a newcomer's first failure is not the end of it."""

GONE_AFTER_DAYS = 7
"""A node that was silent for so long was taken away: its absence counts no more."""

DIFFERENCE_TOKENS_MIN = 10_000
"""What an engine works on between two looks is told in the next one: less than this says nothing."""


@dataclass(frozen=True, slots=True)
class Record:
    """What a provider did in the window; seconds are those of all its nodes."""

    up_s: float
    watched_s: float
    turns: int  # that its engines served
    faults: int  # that they failed, whether another engine served them then or not


@dataclass(frozen=True, slots=True)
class Reputation:
    """What is shown of a record; None: nothing is known yet."""

    uptime_percent: float | None
    reliability_score: float | None  # 0 to 100


def reputation_of(record: Record) -> Reputation:
    """The score is the chance that a turn sent at a random moment is answered: up, and then served."""
    if record.watched_s <= 0:
        return Reputation(None, None)
    uptime = min(1.0, record.up_s / record.watched_s)
    served = (record.turns + TURNS_ASSUMED) / (record.turns + record.faults + TURNS_ASSUMED)
    return Reputation(round(100 * uptime, 2), round(100 * uptime * served, 2))


@dataclass(frozen=True, slots=True)
class Compared:
    """Tokens of one kind since the last comparison."""

    kind: str  # prompt, completion
    reported: int
    relayed: int

    @property
    def difference(self) -> int:
        """Above 0: worked on for others than the pool, or for clients that left; below: the engine hides some."""
        return self.reported - self.relayed

    def is_odd(self, share: float) -> bool:
        """Whether they differ by more than `share` of the larger."""
        return abs(self.difference) > max(DIFFERENCE_TOKENS_MIN, share * max(self.reported, self.relayed))


@dataclass(frozen=True, slots=True)
class EngineCompared:
    """What one engine said and what was relayed from it, since the last comparison."""

    node_id: str
    engine_id: str
    account_id: int
    prompt: Compared
    completion: Compared


@dataclass(frozen=True, slots=True)
class EngineTokens:
    """What was relayed from one engine."""

    node_id: str
    engine_id: str
    prompt: int
    completion: int


@dataclass(frozen=True, slots=True)
class ProviderTurns:
    """Turns of one provider's engines."""

    account_id: int
    turns: int
    faults: int


class ReputationStore:
    """The queries on what providers did."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool

    async def add(self, turns: Iterable[ProviderTurns], tokens: Iterable[EngineTokens]) -> None:
        """Count what a process has seen since it last told. What was deleted meanwhile is left out."""
        async with self._pool.acquire() as connection, connection.transaction():
            await connection.executemany(
                ADD_TURNS, sorted((each.account_id, each.turns, each.faults) for each in turns)
            )
            await connection.executemany(
                ADD_TOKENS,
                sorted((each.node_id, each.engine_id, each.prompt, each.completion) for each in tokens),
            )

    async def roll(self, watch_most_s: float) -> None:
        """Add each node's time up to its provider's day, and the time since the last roll as watched.

        Longer than `watch_most_s` nobody can have listened: that is no node's fault.
        """
        await self._pool.execute(ROLL, watch_most_s)

    async def judge(self) -> int:
        """Bring the reputation of every provider up to date; how many changed."""
        rows = await self._pool.fetch(RECORDS)
        changed = []
        for row in rows:
            found = reputation_of(Record(row["up_s"], row["watched_s"], row["turns"], row["faults"]))
            told = (found.uptime_percent, found.reliability_score, row["jobs_completed"])
            if told != (row["uptime_percent"], row["reliability_score"], row["jobs_known"]):
                changed.append((row["account_id"], *told))
        await self._pool.executemany(
            "update providers set uptime_percent = $2, reliability_score = $3, jobs_completed = $4"
            " where account_id = $1",
            changed,
        )
        return len(changed)

    async def compare(self, every_s: float) -> list[EngineCompared]:
        """The engines whose last comparison is `every_s` old, each once: the next one begins where this ends."""
        rows = await self._pool.fetch(COMPARE, every_s)
        return [
            EngineCompared(
                row["node_id"], row["engine_id"], row["account_id"],
                Compared("prompt", row["reported_prompt"], row["relayed_prompt"]),
                Compared("completion", row["reported_completion"], row["relayed_completion"]),
            )
            for row in rows
        ]  # fmt: skip


ADD_TURNS = """
insert into provider_days as d (account_id, day, turns, faults)
select account_id, (clock_timestamp() at time zone 'UTC')::date, $2, $3 from providers where account_id = $1
on conflict (account_id, day) do update set turns = d.turns + excluded.turns, faults = d.faults + excluded.faults
"""

ADD_TOKENS = """
insert into engine_usage as u (node_id, engine_id, relayed_prompt, relayed_completion)
select node_id, engine_id, $3, $4 from engines where node_id = $1::text::uuid and engine_id = $2
on conflict (node_id, engine_id) do update set
    relayed_prompt = u.relayed_prompt + excluded.relayed_prompt,
    relayed_completion = u.relayed_completion + excluded.relayed_completion
"""

ROLL = f"""
with old as (
    select node_id, up_s, rolled_at from node_facts
    where heard_at > clock_timestamp() - interval '{GONE_AFTER_DAYS} days' order by node_id for update
), rolled as (
    update node_facts f set up_s = 0, rolled_at = clock_timestamp() from old where f.node_id = old.node_id
    returning f.node_id, old.up_s, least(extract(epoch from f.rolled_at - old.rolled_at), $1) as watched_s
)
insert into provider_days as d (account_id, day, up_s, watched_s)
select account_id, (clock_timestamp() at time zone 'UTC')::date, sum(up_s), sum(watched_s)
from rolled join nodes n on n.id = rolled.node_id group by account_id
on conflict (account_id, day) do update set
    up_s = d.up_s + excluded.up_s, watched_s = d.watched_s + excluded.watched_s
"""  # noqa: S608 - a constant of this module

RECORDS = f"""
select p.account_id, p.uptime_percent, p.reliability_score, p.jobs_completed as jobs_known,
    d.up_s, d.watched_s, d.turns, d.faults, d.jobs_completed
from providers p join (
    select account_id,
        coalesce(sum(up_s) filter (where is_recent), 0) as up_s,
        coalesce(sum(watched_s) filter (where is_recent), 0) as watched_s,
        coalesce(sum(turns) filter (where is_recent), 0)::bigint as turns,
        coalesce(sum(faults) filter (where is_recent), 0)::bigint as faults,
        sum(turns)::bigint as jobs_completed
    from (select *, day > (clock_timestamp() at time zone 'UTC')::date - {WINDOW_DAYS} as is_recent
          from provider_days) as days
    group by account_id
) d on d.account_id = p.account_id
"""  # noqa: S608 - a constant of this module

COMPARE = """
with old as (
    select * from engine_usage
    where counter_completion is not null and checked_at < clock_timestamp() - make_interval(secs => $1)
    order by node_id, engine_id for update
)
update engine_usage u set
    checked_relayed_prompt = u.relayed_prompt, checked_relayed_completion = u.relayed_completion,
    checked_reported_prompt = u.reported_prompt, checked_reported_completion = u.reported_completion,
    checked_at = clock_timestamp()
from old join nodes n on n.id = old.node_id
where u.node_id = old.node_id and u.engine_id = old.engine_id
returning u.node_id::text, u.engine_id, n.account_id,
    u.reported_prompt - old.checked_reported_prompt as reported_prompt,
    u.relayed_prompt - old.checked_relayed_prompt as relayed_prompt,
    u.reported_completion - old.checked_reported_completion as reported_completion,
    u.relayed_completion - old.checked_relayed_completion as relayed_completion
"""
