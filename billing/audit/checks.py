"""What must hold in the book: each invariant a name, a sentence, and the query that finds the rows that break it.

They run in one snapshot (`billing.audit.run`); none of them reads what only a running process knows.
"""

# ruff: noqa: S608 (statements are put together from this module's own texts)

from dataclasses import dataclass

from billing.incarnations import ROWS_KEPT_DAYS

# Usage is dropped by day, and hours by age ($1: days that they are kept): what is older can't be held against it.
#   since: postings after it still have all of their usage rows; a turn is shipped within a day of its start
#   day: usage from it on is all there
#   hour: likewise usage_hours
HORIZON = """
days as (
    select to_date(substr(c.relname, 7), 'YYYYMMDD') as day
    from pg_inherits i join pg_class c on c.oid = i.inhrelid
    where i.inhparent = 'usage'::regclass and c.relname ~ '^usage_[0-9]{8}$'
), oldest as (
    select coalesce(min(day), '-infinity') as day, coalesce(min(day)::timestamp at time zone 'UTC', '-infinity') as at
    from days
), horizon as (
    select o.day, o.at,
        case when exists (select from transfers t where t.posting_id is not null and t.at < o.at)
            then o.at + interval '1 day' else '-infinity' end as since,
        greatest(
            o.at, (select min(hour) from usage_hours),
            date_trunc('day', clock_timestamp(), 'UTC') - make_interval(days => $1 - 1)
        ) as hour
    from oldest o
)
"""

NIL = "'00000000-0000-0000-0000-000000000000'"
"""The posting of usage from before the ledger."""

TRIMMED = f"i.ended_at < clock_timestamp() - interval '{ROWS_KEPT_DAYS - 1} days'"
"""An incarnation whose lease rows may be gone."""


@dataclass(frozen=True, slots=True)
class Check:
    """One invariant; `sql` returns the rows that break it."""

    name: str
    description: str
    sql: str
    is_warning: bool = False


def _rollup(table: str, column: str, moment: str, since: str) -> str:
    """Rows of a rollup that differ from the usage that they sum."""
    sums = ("turns", "prompt_tokens", "cached_tokens", "completion_tokens", "amount_nano")
    counted = ", ".join(f"sum({name})::bigint as {name}" for name in sums[1:])
    return f"""
    select account_id, {column}, key_id, model, {
        ", ".join(f"coalesce(r.{n}, 0) as {n}, coalesce(u.{n}, 0) as {n}_of_usage" for n in sums)
    }
    from (select * from {table} where {column} >= (select {since} from horizon)) as r
    full join (
        select account_id, {moment} as {column}, key_id, model, count(*) as turns, {counted}
        from usage where {moment} >= (select {since} from horizon) group by 1, 2, 3, 4
    ) as u using (account_id, {column}, key_id, model)
    where ({", ".join(f"coalesce(r.{n}, 0)" for n in sums)}) <> ({
        ", ".join(f"coalesce(u.{n}, 0)" for n in sums)
    })
    order by 1, 2, 3, 4"""


CHECKS = (
    Check(
        "entries_sum_to_zero",
        "what was credited anywhere was debited somewhere, pending amounts too",
        """
        select sum(credit_nano) - sum(debit_nano) as too_much_nano,
            sum(pending_credit_nano) - sum(pending_debit_nano) as too_much_pending_nano
        from ledger_accounts
        having sum(credit_nano) <> sum(debit_nano) or sum(pending_credit_nano) <> sum(pending_debit_nano)""",
    ),
    Check(
        "balances_rebuild",
        "each ledger account's sums are those of its transfers",
        """
        with entries as (
            select debit_id as id, amount_nano as debit, 0 as credit, 0 as pending_debit, 0 as pending_credit
                from transfers where phase in ('posted', 'post')
            union all
            select credit_id, 0, amount_nano, 0, 0 from transfers where phase in ('posted', 'post')
            union all
            select s.id, 0, 0, s.debit, s.credit
                from transfers p cross join lateral
                (values (p.debit_id, p.amount_nano, 0), (p.credit_id, 0, p.amount_nano)) as s (id, debit, credit)
                where p.phase = 'pending' and not exists (select from transfers r where r.pending_id = p.id)
        ), rebuilt as (
            select id, sum(debit) as debit, sum(credit) as credit, sum(pending_debit) as pending_debit,
                sum(pending_credit) as pending_credit
            from entries group by id
        )
        select l.id, l.kind, l.owner_id, l.debit_nano, coalesce(r.debit, 0) as debit_of_transfers, l.credit_nano,
            coalesce(r.credit, 0) as credit_of_transfers, l.pending_debit_nano,
            coalesce(r.pending_debit, 0) as pending_debit_of_transfers, l.pending_credit_nano,
            coalesce(r.pending_credit, 0) as pending_credit_of_transfers
        from ledger_accounts l left join rebuilt r using (id)
        where (l.debit_nano, l.credit_nano, l.pending_debit_nano, l.pending_credit_nano) is distinct from
            (coalesce(r.debit, 0), coalesce(r.credit, 0), coalesce(r.pending_debit, 0), coalesce(r.pending_credit, 0))
        order by l.id""",
    ),
    Check(
        "never_below_zero",
        "no wallet, earnings or withdrawals account has less than nothing available",
        """
        select id, kind, owner_id, credit_nano - debit_nano - pending_debit_nano - leased_nano as available_nano
        from ledger_accounts
        where kind in ('wallet', 'earnings', 'withdrawals')
            and credit_nano - debit_nano - pending_debit_nano - leased_nano < 0
        order by id""",
    ),
    Check(
        "pendings_resolved_once",
        "a post, void or expire is of a pending transfer, the only one, of its accounts and within its amount",
        """
        select r.id, r.phase, r.amount_nano, r.pending_id, p.amount_nano as pending_nano
        from transfers r left join transfers p on p.id = r.pending_id
        where r.phase in ('post', 'void', 'expire') and (
            p.phase is distinct from 'pending' or r.amount_nano > p.amount_nano
            or (r.debit_id, r.credit_id) <> (p.debit_id, p.credit_id)
            or exists (select from transfers o where o.pending_id = r.pending_id and o.id <> r.id)
        )
        order by r.at""",
    ),
    Check(
        "pendings_are_listed",
        "open_transfers lists the pending transfers that nothing has resolved, and no other",
        """
        select id, p.id is not null as is_pending, o.id is not null as is_listed
        from (
            select p.id, p.expires_at from transfers p
            where p.phase = 'pending' and not exists (select from transfers r where r.pending_id = p.id)
        ) as p
        full join open_transfers o using (id)
        where p.id is null or o.id is null or p.expires_at is distinct from o.expires_at""",
    ),
    Check(
        "pendings_expire",
        "no pending transfer is open a minute past its time",
        """
        select id, expires_at from open_transfers where expires_at < clock_timestamp() - interval '1 minute'
        order by expires_at""",
    ),
    Check(
        "turns_have_postings",
        "each turn that cost something names its posting",
        "select turn_id, started_at, account_id, amount_nano from usage where amount_nano > 0 and posting_id is null",
    ),
    Check(
        "postings_match_turns",
        "what each posting moved is what its turns cost, to the nano",
        f"""
        with turns as (
            select posting_id, sum(amount_nano) as amount from usage
            where posting_id is not null and posting_id <> {NIL} group by 1
        ), moved as (
            select posting_id, sum(amount_nano) as amount, min(at) as at from transfers
            where posting_id is not null group by 1
        )
        select posting_id, moved.at, coalesce(moved.amount, 0) as moved_nano, coalesce(turns.amount, 0) as of_turns_nano
        from turns full join moved using (posting_id)
        where coalesce(moved.amount, 0) <> coalesce(turns.amount, 0)
            and (moved.at is null or moved.at > (select since from horizon))
        order by 2""",
    ),
    Check(
        "postings_are_whole",
        "a posting is at most one share and one fee, from one payer, of one incarnation",
        """
        select t.posting_id, count(*) as transfers, count(distinct t.debit_id) as payers,
            count(*) filter (where c.kind = 'earnings') as shares, count(*) filter (where c.kind = 'fee') as fees
        from transfers t join ledger_accounts c on c.id = t.credit_id join ledger_accounts d on d.id = t.debit_id
        where t.posting_id is not null
        group by 1
        having count(distinct t.debit_id) > 1 or count(distinct t.incarnation_id) <> 1
            or count(*) filter (where c.kind = 'earnings') > 1 or count(*) filter (where c.kind = 'fee') > 1
            or bool_or(c.kind not in ('earnings', 'fee') or d.kind <> 'wallet' or t.phase <> 'posted'
                or t.amount_nano <= 0)""",
    ),
    Check(
        "postings_pay_whom_they_should",
        "the wallet of the turns' account pays, and their provider earns",
        f"""
        select t.posting_id, d.kind as payer, d.owner_id as payer_id, c.kind, c.owner_id, u.account_id, u.provider_id
        from transfers t join ledger_accounts c on c.id = t.credit_id join ledger_accounts d on d.id = t.debit_id
        join (
            select posting_id, min(account_id) as account_id, max(account_id) as other_account_id,
                min(provider_id) as provider_id, max(provider_id) as other_provider_id
            from usage where posting_id <> {NIL} group by 1
        ) as u using (posting_id)
        where u.account_id <> u.other_account_id or u.provider_id <> u.other_provider_id
            or (d.kind = 'wallet' and d.owner_id <> u.account_id)
            or (c.kind = 'earnings' and c.owner_id is distinct from u.provider_id)""",
    ),
    Check(
        "turn_transfers_are_postings",
        "a transfer of turns names its posting and its incarnation",
        "select id, at, amount_nano, posting_id, incarnation_id from transfers"
        " where kind = 'turn' and (posting_id is null or incarnation_id is null)",
    ),
    Check(
        "wallets_lease_what_is_leased",
        "a ledger account's leased part is what the leases of its wallet have left",
        """
        select coalesce(l.owner_id, r.account_id) as account_id, l.kind, coalesce(l.leased_nano, 0) as leased_nano,
            coalesce(r.remainder, 0) as of_leases_nano
        from ledger_accounts l
        full join (
            select account_id, sum(granted_nano - settled_nano - returned_nano) as remainder
            from spend_leases group by 1
        ) as r on l.kind = 'wallet' and l.owner_id = r.account_id
        where coalesce(l.leased_nano, 0) <> coalesce(r.remainder, 0)
        order by 1""",
    ),
    Check(
        "leases_settle_what_was_posted",
        "what a lease settled is what its incarnation's turns moved out of that wallet",
        f"""
        select incarnation_id, account_id, coalesce(s.settled_nano, 0) as settled_nano, coalesce(t.amount, 0) as posted_nano
        from spend_leases s
        full join (
            select t.incarnation_id, d.owner_id as account_id, sum(t.amount_nano) as amount
            from transfers t join ledger_accounts d on d.id = t.debit_id and d.kind = 'wallet'
            where t.incarnation_id is not null group by 1, 2
        ) as t using (incarnation_id, account_id)
        where coalesce(s.settled_nano, 0) <> coalesce(t.amount, 0)
            and (s.account_id is not null
                or not exists (select from incarnations i where i.id = incarnation_id and {TRIMMED}))
        order by 1, 2""",
    ),
    Check(
        "leases_stay_within_their_grant",
        "what a lease settled and returned is at most what it was granted",
        """
        select incarnation_id, account_id, granted_nano, settled_nano, returned_nano
        from spend_leases where settled_nano + returned_nano > granted_nano""",
    ),
    Check(
        "ended_processes_lease_nothing",
        "the leases of a closed or abandoned incarnation, and of budgets, have nothing left",
        """
        select l.incarnation_id, i.state, l.account_id, l.budget_id, l.left_nano
        from (
            select incarnation_id, account_id, null as budget_id, granted_nano - settled_nano - returned_nano as left_nano
                from spend_leases
            union all
            select incarnation_id, null, budget_id, granted_nano - settled_nano - returned_nano from budget_leases
        ) as l join incarnations i on i.id = l.incarnation_id
        where i.state <> 'live' and l.left_nano <> 0""",
    ),
    Check(
        "reports_fit_their_leases",
        "what a process said is free and held is at most what its lease has left",
        """
        select incarnation_id, account_id, free_nano, held_nano, granted_nano - settled_nano - returned_nano as left_nano
        from spend_leases where free_nano + held_nano > granted_nano - settled_nano - returned_nano""",
    ),
    Check(
        "budgets_lease_what_is_leased",
        "a budget window's leased part is what its leases have left",
        """
        select budget_id, starts_at, coalesce(w.leased_nano, 0) as leased_nano, coalesce(l.remainder, 0) as of_leases_nano
        from budget_windows w
        full join (
            select budget_id, starts_at, sum(granted_nano - settled_nano - returned_nano) as remainder
            from budget_leases where budget_id in (select id from budgets) group by 1, 2
        ) as l using (budget_id, starts_at)
        where coalesce(w.leased_nano, 0) <> coalesce(l.remainder, 0)
        order by 1, 2""",
    ),
    Check(
        "budgets_spend_what_was_settled",
        "what was spent of a budget window is what its leases settled",
        f"""
        select budget_id, starts_at, coalesce(w.spent_nano, 0) as spent_nano, coalesce(l.settled, 0) as of_leases_nano
        from budget_windows w
        full join (
            select budget_id, starts_at, sum(settled_nano) as settled
            from budget_leases where budget_id in (select id from budgets) group by 1, 2
        ) as l using (budget_id, starts_at)
        where coalesce(w.spent_nano, 0) < coalesce(l.settled, 0)
            or (coalesce(w.spent_nano, 0) > coalesce(l.settled, 0)
                and not exists (select from incarnations i where {TRIMMED} and i.ended_at >= w.starts_at))
        order by 1, 2""",
    ),
    Check(
        "usage_days_add_up",
        "usage by day is the sum of its turns",
        _rollup("usage_days", "day", "(started_at at time zone 'UTC')::date", "day"),
    ),
    Check(
        "usage_hours_add_up",
        "usage by hour is the sum of its turns",
        _rollup("usage_hours", "hour", "date_trunc('hour', started_at, 'UTC')", "hour"),
    ),
    Check(
        "nothing_in_quarantine",
        "no finished turn was refused by the book; those here are not charged yet",
        "select id, at, turn_id, reason from usage_quarantine order by id",
        is_warning=True,
    ),
)
