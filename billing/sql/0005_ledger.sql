-- The ledger: accounts with what was ever debited and credited to them, and the transfers between them, which are
-- never changed. A wallet's balance is credit - debit; what is promised (pending) or handed to processes (leased) can't
-- be promised twice, and a constraint says so, whoever writes.

create table ledger_accounts (
    id                  bigint generated always as identity primary key,
    kind                text not null check (kind in
                        ('wallet', 'earnings', 'fee', 'clearing', 'promotions', 'withdrawals', 'receivables', 'loss')),
    owner_id            bigint,                     -- accounts.id of a wallet or earnings; null: the platform's. It references
                                                    -- nothing: the book outlives whom it is about
    shard               smallint not null default 0, -- the platform's accounts are several rows, so that none is hot
    debit_nano          bigint not null default 0 check (debit_nano >= 0),   -- 10^-9 of the currency's major unit
    credit_nano         bigint not null default 0 check (credit_nano >= 0),
    pending_debit_nano  bigint not null default 0 check (pending_debit_nano >= 0),
    pending_credit_nano bigint not null default 0 check (pending_credit_nano >= 0),
    leased_nano         bigint not null default 0 check (leased_nano >= 0),  -- of a wallet: handed to gateway processes
    created_at          timestamptz not null default clock_timestamp(),
    unique nulls not distinct (kind, owner_id, shard),
    check ((owner_id is not null) = (kind in ('wallet', 'earnings'))),
    constraint never_below_zero check (
        kind not in ('wallet', 'earnings', 'withdrawals')
        or credit_nano - debit_nano - pending_debit_nano - leased_nano >= 0
    )
) with (fillfactor = 50);                           -- balances move often: room for updates in place

create index ledger_accounts_owner on ledger_accounts (owner_id); -- what an account has is asked by its id

create table transfers (
    id              uuid primary key,
    debit_id        bigint not null references ledger_accounts (id),
    credit_id       bigint not null references ledger_accounts (id),
    amount_nano     bigint not null check (amount_nano > 0),
    phase           text not null default 'posted' check (phase in ('posted', 'pending', 'post', 'void', 'expire')),
    kind            text not null check (kind <> ''), -- turn, topup, grant, job, refund, withdrawal, opening, ...
    pending_id      uuid references transfers (id), -- what a post, void or expire resolves
    idempotency_key text unique,
    posting_id      uuid,                           -- of turns: what their usage rows name
    incarnation_id  uuid,                           -- of turns: whose lease pays
    cause           text not null default '',
    expires_at      timestamptz,                    -- of a pending one
    at              timestamptz not null default clock_timestamp(),
    check (debit_id <> credit_id),
    check ((phase in ('post', 'void', 'expire')) = (pending_id is not null)),
    check ((phase = 'pending') or expires_at is null)
);

create unique index transfers_resolution on transfers (pending_id) where pending_id is not null; -- once
create index transfers_posting on transfers (posting_id) where posting_id is not null;
create index transfers_debit on transfers (debit_id, at);    -- statements go by account and period
create index transfers_credit on transfers (credit_id, at);
create index transfers_expiring on transfers (expires_at) where phase = 'pending';

create function refuse_change() returns trigger language plpgsql as $$
begin
    raise exception '% is never changed: write another row', tg_table_name;
end
$$;

create trigger transfers_immutable before update or delete on transfers
    for each row execute function refuse_change();

-- Every account has a wallet from its first moment.
create function open_wallet() returns trigger language plpgsql as $$
begin
    insert into ledger_accounts (kind, owner_id) values ('wallet', new.id);
    return null;
end
$$;

create trigger account_wallet after insert on accounts for each row execute function open_wallet();

-- Balances from before the ledger come in as opening transfers; what was overspent then is not asked for.
insert into ledger_accounts (kind, owner_id) select 'wallet', id from accounts order by id;
insert into ledger_accounts (kind) values ('clearing');
insert into transfers (id, debit_id, credit_id, amount_nano, kind, idempotency_key, cause)
    select gen_random_uuid(), clearing.id, wallet.id, a.balance_nano, 'opening', 'opening:' || a.id,
        'balance from before the ledger'
    from accounts a
    join ledger_accounts wallet on wallet.kind = 'wallet' and wallet.owner_id = a.id
    cross join (select id from ledger_accounts where kind = 'clearing') as clearing
    where a.balance_nano > 0;
update ledger_accounts l set credit_nano = t.amount_nano from transfers t where t.credit_id = l.id;
update ledger_accounts l set debit_nano = (select coalesce(sum(amount_nano), 0) from transfers)
    where l.kind = 'clearing';

drop trigger account_changed on accounts;
alter table accounts drop column balance_nano;
alter table accounts add column time_zone text not null default 'UTC'; -- whose days and months its budgets go by

-- A wallet that is credited is news to those who refused its turns.
create trigger wallet_credited after update on ledger_accounts
    for each row when (new.kind = 'wallet' and new.credit_nano > old.credit_nano)
    execute function log_change('wallet', 'owner_id');
