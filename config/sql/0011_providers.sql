-- Providers: what an account that owns nodes says of itself, what it wants of its nodes, what their agents told, and
-- what came of it. One row for each account that is a provider, from the moment it is one.

create table providers (
    account_id        bigint primary key references accounts (id) on delete cascade,
    name              text not null default '',
    email             text unique,                      -- in small letters; whoever reads its mail may have a key
    phone             text,
    os                text not null default '',
    location          text not null default '',
    resource_spec     jsonb not null default '{}',
    -- The hardware as its owner tells it; what its nodes report is believed before this.
    gpu_model         text not null default '',
    vram_mib          bigint not null default 0 check (vram_mib >= 0),
    gpu_count         integer not null default 0 check (gpu_count >= 0),
    compute_capability text not null default '',
    cuda_version      text not null default '',
    driver_version    text not null default '',
    -- What the agents are to keep to.
    is_paused         boolean not null default false,
    run_mode          text not null default 'always-on' check (run_mode in ('always-on', 'manual', 'scheduled')),
    scheduled_start   text not null default '23:00',    -- HH:MM by accounts.time_zone
    scheduled_end     text not null default '07:00',
    gpu_usage_cap_pct integer not null default 100 check (gpu_usage_cap_pct between 0 and 100),
    vram_reserve_gb   double precision not null default 0 check (vram_reserve_gb between 0 and 16),
    temp_limit_c      integer not null default 85 check (temp_limit_c between 50 and 100),
    -- What the caretaker makes of provider_days (nodes/reputation.py).
    uptime_percent    double precision,                            -- null: nothing is known yet
    reliability_score double precision,
    jobs_completed    bigint not null default 0,
    created_at        timestamptz not null default clock_timestamp()
);

update accounts set is_provider = true where not is_provider and id in (select account_id from nodes);
insert into providers (account_id, name, created_at) select id, name, created_at from accounts where is_provider;

create function add_provider() returns trigger language plpgsql as $$
begin
    insert into providers (account_id, name) values (new.id, new.name) on conflict do nothing;
    return null;
end
$$;

create trigger account_provider after insert or update of is_provider on accounts
    for each row when (new.is_provider) execute function add_provider();

-- Whatever comes amid a provider's deletion leaves nothing behind: it all hangs on the provider's row.
alter table nodes
    add foreign key (account_id) references providers (account_id) on delete cascade,
    add column readiness jsonb;                         -- {status, checks, at, daemon_version}; null: never told

-- What heartbeats tell of a node beside its lease.
create table node_facts (
    node_id       uuid primary key references nodes (id) on delete cascade,
    gpu_name      text not null,
    gpu_count     integer not null,
    vram_mib      bigint not null,                      -- of one GPU; 0: not known
    compute_capability text not null,
    cuda_version  text not null,
    driver_version text not null,
    heard_at      timestamptz not null default clock_timestamp(),
    up_s          double precision not null default 0,  -- heard of since rolled_at; the caretaker adds it to provider_days
    rolled_at     timestamptz not null default clock_timestamp()
) with (fillfactor = 50);                               -- rewritten by each heartbeat: room for updates in place

-- One sample a node and minute, the last heartbeat's; kept for a day.
create table gpu_samples (
    node_id      uuid not null references nodes (id) on delete cascade,
    minute       timestamptz not null,
    util_pct     real,                                  -- null: the GPU did not tell, or there is none
    vram_used_mib bigint,
    vram_free_mib bigint,
    temp_c       real,
    power_w      real,
    primary key (node_id, minute)
);

create index gpu_samples_minute on gpu_samples (minute);   -- old ones are deleted by age

create table daemon_events (
    id             bigint generated always as identity primary key,
    account_id     bigint not null references providers (account_id) on delete cascade,
    node_id        uuid references nodes (id) on delete cascade,
    event_type     text not null,
    severity       text not null check (severity in ('info', 'warning', 'error', 'critical')),
    daemon_version text not null default '',
    hostname       text not null default '',
    os_info        text not null default '',
    python_version text not null default '',
    details        text not null default '',
    job_id         text not null default '',
    happened_at    timestamptz,                         -- as the agent says
    at             timestamptz not null default clock_timestamp()
);

create index daemon_events_account on daemon_events (account_id, id); -- a provider reads its newest
create index daemon_events_at on daemon_events (at);        -- old ones are deleted by age

create table provider_days (
    account_id bigint not null references providers (account_id) on delete cascade,
    day        date not null,                           -- UTC's
    up_s       double precision not null default 0,     -- node-seconds in which its nodes were heard of
    watched_s  double precision not null default 0,     -- node-seconds in which anybody listened
    turns      bigint not null default 0,
    faults     bigint not null default 0,               -- turns that an engine of its failed, retried or not
    primary key (account_id, day)
) with (fillfactor = 70);

-- What engines say that they did, beside what was relayed from them. Counts are tokens and only grow.
create table engine_usage (
    node_id              uuid not null,
    engine_id            text not null,
    relayed_prompt       bigint not null default 0,
    relayed_completion   bigint not null default 0,
    reported_prompt      bigint not null default 0,
    reported_completion  bigint not null default 0,
    counter_prompt       bigint,                        -- the engine's own counter, as last heard; it begins anew with
    counter_completion   bigint,                        -- each of its starts. Null: it never told
    checked_relayed_prompt      bigint not null default 0, -- as of the last comparison
    checked_relayed_completion  bigint not null default 0,
    checked_reported_prompt     bigint not null default 0,
    checked_reported_completion bigint not null default 0,
    checked_at           timestamptz not null default clock_timestamp(),
    primary key (node_id, engine_id),
    foreign key (node_id, engine_id) references engines (node_id, engine_id) on delete cascade
) with (fillfactor = 50);

-- Codes mailed to who wants a key; the newest of an account counts.
create table login_codes (
    account_id bigint primary key references providers (account_id) on delete cascade,
    digest     bytea not null check (octet_length(digest) = 32),
    expires_at timestamptz not null,
    tries_left integer not null,
    sent       integer not null default 1,              -- codes since window_at: nobody's mailbox is flooded
    window_at  timestamptz not null default clock_timestamp()
);
