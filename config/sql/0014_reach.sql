-- How gateways get to a node's engines: straight to the address that it reports (direct), or through its agent.

alter table nodes
    add column reach                text not null default 'direct' check (reach in ('direct', 'agent')),
    add column advertised           text not null default '', -- HOST:PORT of its agent's listener, as it says
    add column fingerprint          text not null default '', -- SHA-256 of that listener's certificate, as it says
    -- What a gateway checked: connections go to just this address, if it shows this certificate. Null: not, or not good.
    add column listener_host        text,
    add column listener_port        integer,
    add column listener_fingerprint text,
    add column listener_checked_at  timestamptz,
    add column listener_problem     text not null default '',
    add constraint listener_is_whole check (
        (listener_host is null) = (listener_port is null) and (listener_host is null) = (listener_fingerprint is null)
    );

create trigger node_reach_changed after update on nodes
    for each row when (
        (old.reach, old.listener_host, old.listener_port, old.listener_fingerprint)
        is distinct from (new.reach, new.listener_host, new.listener_port, new.listener_fingerprint)
    ) execute function log_change('node', 'id');

-- The tunnel that a node's agent opened last, and the worker in which it ends.
create table tunnels (
    node_id   uuid primary key references nodes (id) on delete cascade,
    tunnel_id uuid not null,                             -- so that the end of an older one takes no newer one away
    worker    text not null,                             -- host:port at which that worker takes hops
    opened_at timestamptz not null default clock_timestamp()
);

create trigger tunnel_changed after insert or update or delete on tunnels
    for each row execute function log_change('node', 'node_id');

create index engines_url on engines (url);               -- is this address another provider's already?
