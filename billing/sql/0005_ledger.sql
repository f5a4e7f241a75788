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
    idempotency_key text,
    posting_id      uuid,                           -- of turns: what their usage rows name
    incarnation_id  uuid,                           -- of turns: whose lease pays
    cause           text not null default '',
    expires_at      timestamptz,                    -- of a pending one
    at              timestamptz not null default clock_timestamp(),
    check (debit_id <> credit_id),
    check ((phase in ('post', 'void', 'expire')) = (pending_id is not null)),
    check ((phase = 'pending') or expires_at is null)
);

create unique index transfers_idempotency on transfers (idempotency_key) where idempotency_key is not null;
create unique index transfers_resolution on transfers (pending_id) where pending_id is not null; -- once
create index transfers_posting on transfers (posting_id) where posting_id is not null;
create index transfers_debit on transfers (debit_id, at);    -- statements go by account and period
create index transfers_credit on transfers (credit_id, at);

-- The pending transfers that nothing has resolved yet, so that those to expire are found without reading the book.
create table open_transfers (
    id         uuid primary key references transfers (id),
    expires_at timestamptz
);

create index open_transfers_expiring on open_transfers (expires_at) where expires_at is not null;

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

-- The ids of these ledger accounts, in their order; null where there is none.
create function find_ledger_accounts(kinds text[], owners bigint[], shards smallint[]) returns bigint[]
language sql volatile as $$
    select array_agg(
        case when w.owner_id is null then
            (select l.id from ledger_accounts l where l.kind = w.kind and l.owner_id is null and l.shard = w.shard)
        else
            (select l.id from ledger_accounts l
             where l.kind = w.kind and l.owner_id = w.owner_id and l.shard = w.shard)
        end order by w.n
    )
    from unnest(kinds, owners, shards) with ordinality as w (kind, owner_id, shard, n)
$$;

-- The same; what is not there is opened. Sorted, so that two that open the same
-- wait for each other in one direction only.
create function open_ledger_accounts(kinds text[], owners bigint[], shards smallint[]) returns bigint[]
language plpgsql as $$
declare
    ids bigint[] := find_ledger_accounts(kinds, owners, shards);
begin
    if array_position(ids, null) is null then
        return ids;
    end if;
    insert into ledger_accounts (kind, owner_id, shard)
        select distinct w.kind, w.owner_id, w.shard
        from unnest(kinds, owners, shards, ids) as w (kind, owner_id, shard, id)
        where w.id is null
        order by 1, 2, 3
        on conflict do nothing;
    return find_ledger_accounts(kinds, owners, shards);
end
$$;

-- Aggregated turns of one incarnation: everything locked in order, then set by set. billing/ledger.py says what
-- a posting is. The transfers' ids follow from the posting's, so a posting that comes again is refused.
create function post_turns(
    incarnation uuid, posting_ids uuid[], fee_ids uuid[], share_ids uuid[], loss_ids uuid[], accounts bigint[],
    providers bigint[], amounts bigint[], shares bigint[], loss_shares bigint[], from_loss boolean,
    platform_shard smallint
) returns void language plpgsql as $$
declare
    platform   bigint[] := open_ledger_accounts(
        array['fee', 'loss'], array[null, null]::bigint[], array[platform_shard, platform_shard]
    );
    fee        bigint := platform[1];
    loss       bigint := platform[2];
    n          integer := cardinality(posting_ids);
    payers     bigint[] := array_fill(loss, array[n]);
    earnings   bigint[] := array_fill(null::bigint, array[n]);
    opened     bigint[];
    leases     bigint;
begin
    if not from_loss then
        payers := open_ledger_accounts(array_fill('wallet'::text, array[n]), accounts, array_fill(0::smallint, array[n]));
    end if;
    -- Few providers, many postings: each is looked up once.
    select array_agg(p) into opened from (select distinct unnest(providers)) as d (p) where p is not null;
    if opened is not null then
        select array_agg(e.id order by w.i) into earnings
        from unnest(providers) with ordinality as w (owner_id, i)
        left join unnest(
            opened,
            open_ledger_accounts(
                array_fill('earnings'::text, array[cardinality(opened)]), opened,
                array_fill(0::smallint, array[cardinality(opened)])
            )
        ) as e (owner_id, id) on e.owner_id = w.owner_id;
    end if;

    perform id from ledger_accounts where id = any (payers || earnings || platform) order by id for no key update;
    if not from_loss then
        perform account_id from spend_leases
            where incarnation_id = incarnation and account_id = any (accounts)
            order by account_id for no key update;
    end if;

    update ledger_accounts l set
        debit_nano = l.debit_nano + d.debit, credit_nano = l.credit_nano + d.credit,
        leased_nano = l.leased_nano - d.leased
    from (
        select id, sum(debit)::bigint as debit, sum(credit)::bigint as credit, sum(leased)::bigint as leased
        from (
            select id, amount, 0, case when from_loss then 0 else amount end
                from unnest(payers, amounts) as w (id, amount)
            union all
            select id, 0, share + loss_share, 0 from unnest(earnings, shares, loss_shares) as w (id, share, loss_share)
            union all
            select fee, 0, amount - share, 0 from unnest(amounts, shares) as w (amount, share)
            union all
            select loss, loss_share, 0, 0 from unnest(loss_shares) as w (loss_share)
        ) as entries (id, debit, credit, leased)
        group by id
    ) as d
    where l.id = d.id and (d.debit, d.credit) <> (0, 0);

    if not from_loss then
        with due as (
            select account_id, sum(amount)::bigint as amount
            from unnest(accounts, amounts) as w (account_id, amount) where amount > 0 group by account_id
        ), settled as (
            update spend_leases s set settled_nano = s.settled_nano + due.amount
            from due where s.incarnation_id = incarnation and s.account_id = due.account_id
            returning 1
        )
        select (select count(*) from due) - (select count(*) from settled) into leases;
        if leases > 0 then
            raise exception 'incarnation % has no lease of % of these accounts', incarnation, leases
                using errcode = 'foreign_key_violation';
        end if;
    end if;

    insert into transfers (id, debit_id, credit_id, amount_nano, kind, posting_id, incarnation_id, cause)
        select share_id, payer, earned, share, case when from_loss then 'loss' else 'turn' end, posting, incarnation,
            case when from_loss then 'turns of an abandoned process' else 'turns' end
        from unnest(share_ids, payers, earnings, shares, posting_ids) as w (share_id, payer, earned, share, posting)
        where share > 0
        union all
        select fee_id, payer, fee, amount - share, case when from_loss then 'loss' else 'turn' end, posting, incarnation,
            case when from_loss then 'turns of an abandoned process' else 'turns' end
        from unnest(fee_ids, payers, amounts, shares, posting_ids) as w (fee_id, payer, amount, share, posting)
        where amount > share
        union all
        select loss_id, loss, earned, loss_share, 'loss', null, incarnation, 'turns beyond their holds'
        from unnest(loss_ids, earnings, loss_shares) as w (loss_id, earned, loss_share)
        where loss_share > 0;
end
$$;
