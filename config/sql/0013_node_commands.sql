-- What gateways want of nodes: a state that stays (pause, drain), and commands that are to be done once.

alter table nodes
    add column wanted text not null default 'serve' check (wanted in ('serve', 'pause', 'drain')),
    add column instance text not null default '';       -- the agent's process that has the lease

create table node_commands (
    id         bigint generated always as identity primary key,
    node_id    uuid not null references nodes (id) on delete cascade,
    name       text not null,
    arguments  jsonb not null default '{}',
    status     text not null default 'queued' check (status in ('queued', 'downloading', 'loading', 'done', 'failed')),
    percent    smallint not null default 0,
    detail     text not null default '',
    created_at timestamptz not null default clock_timestamp(),
    updated_at timestamptz not null default clock_timestamp(),
    expires_at timestamptz not null                     -- an agent that comes later than this does not get it
);

-- The same command is not given twice while it is being done.
create unique index node_commands_open on node_commands (node_id, name, arguments) where status not in ('done', 'failed');
create index node_commands_node on node_commands (node_id, id);
create index node_commands_age on node_commands (updated_at);

create function log_node_command() returns trigger language plpgsql as $$
begin
    insert into changes (kind, entity) values ('node_command', new.node_id::text);
    return null;
end
$$;
create trigger node_command_given after insert on node_commands
    for each row execute function log_node_command();

create function log_node_wanted() returns trigger language plpgsql as $$
begin
    insert into changes (kind, entity) values ('node_command', new.id::text);
    return null;
end
$$;
create trigger node_wanted after update on nodes
    for each row when (
        (old.wanted, old.instance, old.state, old.account_id)
        is distinct from (new.wanted, new.instance, new.state, new.account_id)
    ) execute function log_node_wanted();
