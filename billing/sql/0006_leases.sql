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
