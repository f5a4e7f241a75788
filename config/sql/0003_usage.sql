-- Usage: one row a settled turn, in day partitions that billing/retention.py makes and drops.
--
-- It references nothing: a bill must be written even if its account, key or node was deleted meanwhile.

create table usage (
    turn_id           uuid not null,
    account_id        bigint not null,
    key_id            bigint not null,
    started_at        timestamptz not null,
    surface           text not null,
    model             text not null,
    node_id           text,
    engine_id         text,
    stream            boolean not null,
    outcome           text not null,
    status            integer not null,
    prompt_tokens     bigint not null check (prompt_tokens >= 0),     -- the cached ones included
    cached_tokens     bigint not null check (cached_tokens >= 0),
    completion_tokens bigint not null check (completion_tokens >= 0),
    estimated         boolean not null,
    ttft_ms           bigint,
    duration_ms       bigint not null,
    amount_nano       bigint not null check (amount_nano >= 0),
    price_ref         text not null,
    primary key (started_at, turn_id)                   -- a batch that is written again finds its own rows
) partition by range (started_at);

create index usage_account on usage (account_id, started_at); -- an account asks for its own usage of a period

create table usage_default partition of usage default;  -- a turn whose day has no partition is kept all the same

-- Records that the table above refused, as their writer had them, so that a person can settle them.
create table usage_quarantine (
    id     bigint generated always as identity primary key,
    at     timestamptz not null default clock_timestamp(),
    turn_id text not null unique,                        -- a batch that comes again brings it again
    reason text not null,
    record text not null                                -- JSON as text: it may hold what jsonb refuses
);
