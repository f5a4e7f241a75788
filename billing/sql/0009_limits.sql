-- Rate limits: of a key, of an account (all its keys together), and of the tier that an account is in.
--
-- limits is an object with any of requests_minute, requests_day, tokens_minute, tokens_day, concurrency: whole numbers,
-- 1 or more; what is not named is not limited. An account's own entry wins over its tier's.

create table tiers (
    name       text primary key check (name <> ''),
    limits     jsonb not null default '{}',
    created_at timestamptz not null default clock_timestamp()
);

alter table accounts
    add column tier   text references tiers (name) on update cascade,
    add column limits jsonb not null default '{}';
alter table api_keys add column limits jsonb not null default '{}';

drop trigger key_changed on api_keys;
create trigger key_changed after update on api_keys
    for each row when (
        (old.account_id, old.scopes, old.models, old.revoked_at, old.limits)
        is distinct from (new.account_id, new.scopes, new.models, new.revoked_at, new.limits)
    ) execute function log_change('key', 'digest');

create trigger account_changed after update on accounts
    for each row when (
        (old.name, old.status, old.is_renter, old.is_provider, old.is_admin, old.approval_status, old.time_zone,
         old.tier, old.limits)
        is distinct from
        (new.name, new.status, new.is_renter, new.is_provider, new.is_admin, new.approval_status, new.time_zone,
         new.tier, new.limits)
    ) execute function log_change('account', 'id');

-- A tier has any number of accounts: processes forget them all.
create function log_tier_change() returns trigger language plpgsql as $$
begin
    insert into changes (kind, entity) values ('account', '*');
    return null;
end
$$;

create trigger tier_changed after update or delete on tiers for each row execute function log_tier_change();
