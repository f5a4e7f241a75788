-- What routing goes by beside load and caches, and the models that turns wait for.

alter table nodes add column region text not null default '';            -- as the operator names it: `ruh-1`
alter table nodes add column tier smallint not null default 0 check (tier >= 0);    -- the higher the better
alter table nodes add column price_percent integer not null default 100  -- what its owner asks, of the price book
    check (price_percent between 0 and 10000);
alter table nodes add column reputation real not null default 1 check (reputation between 0 and 1);
-- Whoever sets one of these is heard by every worker (0004_changes.sql).
create trigger node_routing_changed after update on nodes
    for each row when (
        (old.region, old.tier, old.price_percent, old.reputation)
        is distinct from (new.region, new.tier, new.price_percent, new.reputation)
    ) execute function log_change('node', 'id');

-- A model that turns wait for on a node that has it on disk; its agent hears of it with its next heartbeat's reply.
create table model_wishes (
    node_id    uuid not null references nodes (id) on delete cascade,
    model      text not null check (model <> ''),
    wished_at  timestamptz not null default clock_timestamp(),           -- renewed while anybody waits
    primary key (node_id, model)
);

create index model_wishes_model on model_wishes (model);                 -- one node is asked for each model
