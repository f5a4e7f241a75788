-- Accounts (a person or organisation with a wallet) and the API keys that act for them.

create table accounts (
    id              bigint generated always as identity primary key,
    name            text not null unique check (name <> ''),
    email           text,
    balance_nano    bigint not null default 0,          -- 10^-9 of the currency's major unit
    status          text not null default 'active' check (status in ('active', 'suspended')),
    is_renter       boolean not null default true,      -- buys inference
    is_provider     boolean not null default false,     -- owns nodes
    is_admin        boolean not null default false,
    approval_status text not null default 'approved'    -- of a provider: may its nodes take work?
                    check (approval_status in ('pending', 'approved', 'rejected')),
    created_at      timestamptz not null default clock_timestamp()
) with (fillfactor = 70);                               -- balances move often: room for updates in place

create table api_keys (
    id           bigint generated always as identity primary key,
    account_id   bigint not null references accounts (id) on delete cascade,
    name         text not null default '',
    digest       bytea not null unique check (octet_length(digest) = 32), -- HMAC-SHA256; every look-up goes by it
    prefix       text not null,                         -- what people see of the key in lists
    scopes       text[] not null default '{inference}',
    models       text[],                                -- null: every model
    created_at   timestamptz not null default clock_timestamp(),
    revoked_at   timestamptz,
    last_used_at timestamptz                            -- to the minute
) with (fillfactor = 70);

create index api_keys_account on api_keys (account_id); -- an account's keys are listed
