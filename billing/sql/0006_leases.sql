-- Spend leases: what of a wallet one gateway process may spend without asking.

create table incarnations (                         -- one life of one gateway process
    id              uuid primary key,
    host            text not null,
    pid             integer not null,
    journal         text not null,                  -- its folder, on that host
    state           text not null default 'live' check (state in ('live', 'closed', 'abandoned')),
    started_at      timestamptz not null default clock_timestamp(),
    seen_at         timestamptz not null default clock_timestamp(),
    ended_at        timestamptz,
    shipped_segment bigint not null default 0,      -- its journal is in the book up to here
    shipped_offset  bigint not null default 0
) with (fillfactor = 50);

create index incarnations_live on incarnations (seen_at) where state = 'live';

create table spend_leases (
    incarnation_id uuid not null references incarnations (id),
    account_id     bigint not null,
    granted_nano   bigint not null default 0 check (granted_nano >= 0),
    settled_nano   bigint not null default 0 check (settled_nano >= 0),  -- posted: its turns are in the book
    returned_nano  bigint not null default 0 check (returned_nano >= 0),
    used_nano      bigint not null default 0 check (used_nano >= 0),     -- settled in the process's memory when it last
                                                    -- took or returned: where one goes on that dropped the lease
    free_nano      bigint not null default 0 check (free_nano >= 0),     -- as the process last said
    held_nano      bigint not null default 0 check (held_nano >= 0),     -- likewise
    reported_at    timestamptz not null default clock_timestamp(),
    primary key (incarnation_id, account_id),
    constraint never_over_granted check (settled_nano + returned_nano <= granted_nano)
) with (fillfactor = 50);

create index spend_leases_account on spend_leases (account_id); -- who else has a part of this wallet?

-- A process's book of these accounts, locked in the global order and read in one round trip: wallets as (account, available,
-- leased), its own leases as (account, granted, settled, returned, used). Each query sees what was committed while the one
-- before it waited for a lock: a lease whose answer was lost is not overlooked. A key share lock bears a shipper that advances
-- its offset, and not somebody who ends the incarnation. Where that is ended or unknown nothing is locked.
create function lock_leases(
    incarnation uuid, live_s double precision, accounts bigint[],
    out is_live boolean, out at timestamptz, out live bigint, out wallets bigint[], out leases bigint[]
) language plpgsql as $$
begin
    select i.state = 'live' into is_live from incarnations i where i.id = incarnation for key share;
    at := clock_timestamp();
    if is_live is not true then
        return;
    end if;
    select count(*) into live from incarnations i
        where i.state = 'live' and i.seen_at > clock_timestamp() - make_interval(secs => live_s);
    select array_agg(array[w.owner_id, w.available_nano, w.leased_nano]) into wallets from (
        select l.owner_id, l.credit_nano - l.debit_nano - l.pending_debit_nano - l.leased_nano as available_nano, l.leased_nano
        from ledger_accounts l where l.kind = 'wallet' and l.owner_id = any (accounts) order by l.id for no key update
    ) as w;
    select array_agg(array[s.account_id, s.granted_nano, s.settled_nano, s.returned_nano, s.used_nano]) into leases from (
        select * from spend_leases l where l.incarnation_id = incarnation and l.account_id = any (accounts)
        order by l.account_id for no key update
    ) as s;
end
$$;
