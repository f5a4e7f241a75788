-- Nodes (GPU hosts that run the agent) and the engines that they last reported.

create table nodes (
    id                uuid primary key,
    account_id        bigint not null references accounts (id) on delete cascade, -- its provider
    hostname          text not null default '',
    state             text not null default 'registered' check (state in
                      ('registered', 'connected', 'online', 'paused', 'draining', 'offline', 'suspended')),
    epoch             bigint not null default 1,        -- raised whenever its lease was lost and is given anew
    last_heartbeat_at timestamptz,
    cached_models     text[] not null default '{}',
    gpu_status        jsonb not null default '{}',
    agent_version     text not null default '',
    created_at        timestamptz not null default clock_timestamp()
) with (fillfactor = 50);                               -- rewritten by each heartbeat: room for updates in place

create index nodes_account on nodes (account_id);       -- a provider's nodes are listed

create table engines (
    node_id    uuid not null references nodes (id) on delete cascade,
    engine_id  text not null check (engine_id <> ''),   -- unique in its node
    url        text not null,
    state      text not null check (state in ('starting', 'ready', 'draining', 'failed', 'stopped')),
    reason     text not null default '',
    restarts   bigint not null default 0 check (restarts >= 0),
    models     jsonb not null default '[]',             -- [{id, context_length, kind, parent}]
    block_size bigint not null default 0,               -- tokens in a KV cache block; 0: not known
    kv_tokens  bigint not null default 0,               -- tokens that fit the KV cache; 0: not known
    updated_at timestamptz not null default clock_timestamp(),
    primary key (node_id, engine_id)
) with (fillfactor = 50);
