-- The change log: what every gateway process must hear about, written by triggers so that no writer can forget it,
-- whichever program or person wrote the row. config/changes.py reads it.

create table changes (
    id     bigint generated always as identity primary key,
    kind   text not null,                               -- key, account, node
    entity text not null,                               -- key: digest in hex; account, node: id
    at     timestamptz not null default clock_timestamp(),
    xid    xid8 not null default pg_current_xact_id()   -- the writing transaction: readers' cursor
);

create index changes_xid on changes (xid);              -- each poll reads from its cursor on
create index changes_at on changes (at);                -- old rows are deleted by age

-- Arguments: the kind, and the column that names the entity.
create function log_change() returns trigger language plpgsql as $$
declare
    entity text;
begin
    if tg_op = 'DELETE' then
        entity := to_jsonb(old) ->> tg_argv[1];
    else
        entity := to_jsonb(new) ->> tg_argv[1];
    end if;
    if tg_argv[0] = 'key' then
        entity := substr(entity, 3);                    -- bytea in JSON is \x and the hex digits
    end if;
    insert into changes (kind, entity) values (tg_argv[0], entity);
    return null;
end
$$;

create trigger key_added_or_removed after insert or delete on api_keys
    for each row execute function log_change('key', 'digest');
create trigger key_changed after update on api_keys
    for each row when (
        (old.account_id, old.scopes, old.models, old.revoked_at)
        is distinct from (new.account_id, new.scopes, new.models, new.revoked_at)
    ) execute function log_change('key', 'digest');

create trigger account_removed after delete on accounts
    for each row execute function log_change('account', 'id');
-- A balance that moves is news only where it crosses zero.
create trigger account_changed after update on accounts
    for each row when (
        (old.name, old.status, old.is_renter, old.is_provider, old.is_admin, old.approval_status, old.balance_nano > 0)
        is distinct from
        (new.name, new.status, new.is_renter, new.is_provider, new.is_admin, new.approval_status, new.balance_nano > 0)
    ) execute function log_change('account', 'id');

create trigger node_added_or_removed after insert or delete on nodes
    for each row execute function log_change('node', 'id');
-- A heartbeat as such (its time, the GPU's readings) is no news.
create trigger node_changed after update on nodes
    for each row when (
        (old.account_id, old.state, old.epoch, old.cached_models)
        is distinct from (new.account_id, new.state, new.epoch, new.cached_models)
    ) execute function log_change('node', 'id');

create trigger engine_added_or_removed after insert or delete on engines
    for each row execute function log_change('node', 'node_id');
create trigger engine_changed after update on engines
    for each row when (
        (old.url, old.state, old.models, old.block_size, old.kv_tokens)
        is distinct from (new.url, new.state, new.models, new.block_size, new.kv_tokens)
    ) execute function log_change('node', 'node_id');
