-- Budgets: how much a key, or all keys of an account, may spend in a window of time; taken by leases, as wallets are.

-- A zone that PostgreSQL does not know would fail every turn of its account: the cast raises.
alter table accounts add constraint known_time_zone check (timezone(time_zone, timestamptz 'epoch') is not null);

create table budgets (
    id           bigint generated always as identity primary key,
    account_id   bigint not null references accounts (id) on delete cascade,
    key_id       bigint references api_keys (id) on delete cascade, -- null: all keys together
    period       text not null check (period in ('hour', 'day', 'week', 'month', 'total')),
    limit_nano   bigint not null check (limit_nano >= 0),
    soft_percent smallint not null default 80 check (soft_percent between 1 and 100),
    created_at   timestamptz not null default clock_timestamp(),
    unique nulls not distinct (account_id, key_id, period)
);

create index budgets_key on budgets (key_id);

create table budget_windows (
    budget_id     bigint not null references budgets (id) on delete cascade,
    starts_at     timestamptz not null,             -- of a total: 1970 to 'infinity'
    ends_at       timestamptz not null,             -- fixed when it begins: a new time zone counts from the next one on
    spent_nano    bigint not null default 0 check (spent_nano >= 0),
    forgiven_nano bigint not null default 0 check (forgiven_nano >= 0), -- spent before the last reset
    leased_nano   bigint not null default 0 check (leased_nano >= 0),
    warned_at     timestamptz,                      -- its soft threshold was passed and told
    exhausted_at  timestamptz,                      -- its limit was reached and told
    primary key (budget_id, starts_at),
    check (starts_at < ends_at),
    check (forgiven_nano <= spent_nano)
) with (fillfactor = 50);

create index budget_windows_ended on budget_windows (ends_at); -- those that are long over are deleted

create table budget_leases (
    incarnation_id uuid not null references incarnations (id),
    budget_id      bigint not null,
    starts_at      timestamptz not null,
    granted_nano   bigint not null default 0 check (granted_nano >= 0),
    settled_nano   bigint not null default 0 check (settled_nano >= 0),
    returned_nano  bigint not null default 0 check (returned_nano >= 0),
    used_nano      bigint not null default 0 check (used_nano >= 0), -- as in spend_leases
    primary key (incarnation_id, budget_id, starts_at),
    check (settled_nano + returned_nano <= granted_nano)
) with (fillfactor = 50);

create index budget_leases_budget on budget_leases (budget_id, starts_at);

-- What somebody should hear of: budgets at their soft threshold, and exhausted. Delivery is its readers' business.
create table billing_events (
    id         bigint generated always as identity primary key,
    kind       text not null,                       -- budget_threshold, budget_exhausted
    account_id bigint not null,
    key_id     bigint,
    payload    jsonb not null,
    at         timestamptz not null default clock_timestamp()
);

create index billing_events_account on billing_events (account_id, at);

-- Principals hold their budgets' ids, and processes hold leases: both hear of a change.
create trigger budget_of_account_changed after insert or update or delete on budgets
    for each row execute function log_change('account', 'account_id');
create trigger budget_changed after insert or update or delete on budgets
    for each row execute function log_change('budget', 'id');
