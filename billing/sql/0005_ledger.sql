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

-- The same; what is not there is opened. Sorted, so that two that open the same wait for each other in one direction only.
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
        where w.id is null and w.kind is not null
        order by 1, 2, 3
        on conflict do nothing;
    return find_ledger_accounts(kinds, owners, shards);
end
$$;

-- Aggregated turns of one incarnation: everything locked in order, then set by set. billing/ledger.py says what
-- a posting is. The transfers' ids follow from the posting's, so a posting that comes again is refused.
create function post_turns(
    incarnation uuid, posting_ids uuid[], fee_ids uuid[], share_ids uuid[], loss_ids uuid[], accounts bigint[],
    providers bigint[], amounts bigint[], shares bigint[], loss_shares bigint[], platform_shard smallint
) returns void language plpgsql as $$
declare
    platform   bigint[] := open_ledger_accounts(
        array['fee', 'loss'], array[null, null]::bigint[], array[platform_shard, platform_shard]
    );
    fee        bigint := platform[1];
    loss       bigint := platform[2];
    n          integer := cardinality(posting_ids);
    payers     bigint[] := open_ledger_accounts(
        array_fill('wallet'::text, array[n]), accounts, array_fill(0::smallint, array[n])
    );
    earnings   bigint[] := array_fill(null::bigint, array[n]);
    opened     bigint[];
    leases     bigint;
begin
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
    perform account_id from spend_leases
        where incarnation_id = incarnation and account_id = any (accounts)
        order by account_id for no key update;

    update ledger_accounts l set
        debit_nano = l.debit_nano + d.debit, credit_nano = l.credit_nano + d.credit,
        leased_nano = l.leased_nano - d.leased
    from (
        select id, sum(debit)::bigint as debit, sum(credit)::bigint as credit, sum(leased)::bigint as leased
        from (
            select id, amount, 0, amount from unnest(payers, amounts) as w (id, amount)
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

    with due as (
        select account_id, sum(amount)::bigint as amount
        from unnest(accounts, amounts) as w (account_id, amount) where amount > 0 group by account_id
    ), settled as (
        -- Settled turns were held when their process last reported: what it said is kept within what is left.
        update spend_leases s set
            settled_nano = s.settled_nano + due.amount,
            free_nano = greatest(0, least(s.free_nano, s.granted_nano - s.settled_nano - s.returned_nano - due.amount)),
            held_nano = greatest(0, least(
                s.held_nano, s.granted_nano - s.settled_nano - s.returned_nano - due.amount - s.free_nano
            ))
        from due where s.incarnation_id = incarnation and s.account_id = due.account_id
        returning 1
    )
    select (select count(*) from due) - (select count(*) from settled) into leases;
    if leases > 0 then
        raise exception 'incarnation % has no lease of % of these accounts', incarnation, leases
            using errcode = 'foreign_key_violation';
    end if;

    insert into transfers (id, debit_id, credit_id, amount_nano, kind, posting_id, incarnation_id, cause)
        select share_id, payer, earned, share, 'turn', posting, incarnation, 'turns'
        from unnest(share_ids, payers, earnings, shares, posting_ids) as w (share_id, payer, earned, share, posting)
        where share > 0
        union all
        select fee_id, payer, fee, amount - share, 'turn', posting, incarnation, 'turns'
        from unnest(fee_ids, payers, amounts, shares, posting_ids) as w (fee_id, payer, amount, share, posting)
        where amount > share
        union all
        select loss_id, loss, earned, loss_share, 'loss', null, incarnation, 'turns beyond their holds'
        from unnest(loss_ids, earnings, loss_shares) as w (loss_id, earned, loss_share)
        where loss_share > 0;
end
$$;

-- A transfer as it is asked for; billing/ledger.py says what each field means. Of a resolution, what is null is as
-- its pending transfer has it.
create type wanted_transfer as (
    id uuid, debit_kind text, debit_owner bigint, debit_id bigint, credit_kind text, credit_owner bigint,
    credit_id bigint, amount_nano bigint, kind text, phase text, pending_id uuid, idempotency_key text,
    posting_id uuid, incarnation_id uuid, cause text, expires_at timestamptz
);

-- A batch in its order, each by itself: [{status, id, reason, field}]. All that it touches is locked before anything is
-- done: first the idempotency keys (256 buckets of advisory locks, so that a large batch can't fill the lock table), then
-- the accounts; both in order.
create function apply_transfers(batch jsonb, platform_shard smallint) returns jsonb language plpgsql as $$
declare
    wanted  wanted_transfer[];
    one     wanted_transfer;
    locked  bigint[];
    bucket  integer;
    results jsonb := '[]';
begin
    select array_agg(w) into wanted from jsonb_populate_recordset(null::wanted_transfer, batch) as w;
    for bucket in
        select distinct hashtext(w.idempotency_key) & 255 from unnest(wanted) as w
        where w.idempotency_key is not null order by 1
    loop
        perform pg_advisory_xact_lock(1819632743, bucket); -- any number that is nobody else's
    end loop;
    wanted := name_accounts(wanted, platform_shard);
    select array_agg(id) into locked from (
        select unnest(array[w.debit_id, w.credit_id]) from unnest(wanted) as w
        union
        select unnest(array[p.debit_id, p.credit_id]) from unnest(wanted) as w join transfers p on p.id = w.pending_id
    ) as touched (id) where id is not null;
    perform id from ledger_accounts where id = any (locked) order by id for no key update;
    foreach one in array wanted loop
        results := results || coalesce(
            repeated_transfer(one),
            case when one.pending_id is null then move_amount(one) else resolve_pending(one, locked) end
        );
    end loop;
    return results;
end
$$;

create function name_accounts(wanted wanted_transfer[], platform_shard smallint) returns wanted_transfer[]
language plpgsql as $$
declare
    ids bigint[];
begin
    with sides as (
        select w.n, s.side, s.kind, s.owner, (case
            when s.kind in ('fee', 'clearing', 'promotions', 'receivables', 'loss') then platform_shard else 0
        end)::smallint as shard
        from unnest(wanted) with ordinality as w (
            id, debit_kind, debit_owner, debit_id, credit_kind, credit_owner, credit_id, amount_nano, kind, phase,
            pending_id, idempotency_key, posting_id, incarnation_id, cause, expires_at, n
        ),
        lateral (values (1, w.debit_kind, w.debit_owner), (2, w.credit_kind, w.credit_owner)) as s (side, kind, owner)
    )
    select open_ledger_accounts(
        array_agg(kind order by n, side), array_agg(owner order by n, side), array_agg(shard order by n, side)
    ) into ids from sides;
    for i in 1 .. cardinality(wanted) loop
        wanted[i].debit_id := ids[2 * i - 1];
        wanted[i].credit_id := ids[2 * i];
    end loop;
    return wanted;
end
$$;

-- Null if there was none of this id or key; else what the first one was, or in which field it differs.
create function repeated_transfer(wanted wanted_transfer) returns jsonb language plpgsql as $$
declare
    first transfers;
    field text;
begin
    select * into first from transfers where idempotency_key = wanted.idempotency_key;
    if not found then
        select * into first from transfers where id = wanted.id;
        if not found then
            return null;
        end if;
    end if;
    field := case
        when first.idempotency_key is distinct from wanted.idempotency_key then 'idempotency_key'
        when first.phase <> wanted.phase then 'phase'
        when first.pending_id is distinct from wanted.pending_id then 'pending'
        when first.kind <> wanted.kind then 'kind'
        when first.amount_nano <> wanted.amount_nano then 'amount'
        when not is_ledger_account(first.debit_id, wanted.debit_kind, wanted.debit_owner) then 'debit'
        when not is_ledger_account(first.credit_id, wanted.credit_kind, wanted.credit_owner) then 'credit'
    end;
    return jsonb_build_object(
        'status', case when field is null then 'repeated' else 'conflict' end, 'id', first.id, 'field', field
    );
end
$$;

-- Whichever shard it is: a repeat may come through another process. Nothing was said: it is.
create function is_ledger_account(account bigint, as_kind text, as_owner bigint) returns boolean
language sql stable as $$
    select as_kind is null
        or exists (select from ledger_accounts l
                   where l.id = account and l.kind = as_kind and l.owner_id is not distinct from as_owner)
$$;

create function refusal(reason text, first uuid default null) returns jsonb language sql immutable as $$
    select jsonb_build_object('status', 'refused', 'reason', reason, 'id', first)
$$;

-- Posted or pending; both accounts are locked.
create function move_amount(wanted wanted_transfer) returns jsonb language plpgsql as $$
declare
    amount bigint := wanted.amount_nano;
    moved  bigint := case when wanted.phase = 'posted' then amount else 0 end;
begin
    if exists (
        select from ledger_accounts where id = wanted.debit_id and kind in ('wallet', 'earnings', 'withdrawals')
        and credit_nano - debit_nano - pending_debit_nano - leased_nano < amount
    ) then
        return refusal('insufficient_funds');
    end if;
    perform write_transfer(wanted);
    if wanted.phase = 'pending' then
        insert into open_transfers (id, expires_at) values (wanted.id, wanted.expires_at);
    end if;
    update ledger_accounts set debit_nano = debit_nano + moved, pending_debit_nano = pending_debit_nano + amount - moved
        where id = wanted.debit_id;
    update ledger_accounts
        set credit_nano = credit_nano + moved, pending_credit_nano = pending_credit_nano + amount - moved
        where id = wanted.credit_id;
    return jsonb_build_object('status', 'done', 'id', wanted.id);
end
$$;

-- Post, void or expire. A pending transfer that was not there when the accounts were locked is not looked at.
create function resolve_pending(wanted wanted_transfer, locked bigint[]) returns jsonb language plpgsql as $$
declare
    pending transfers;
    before  transfers;
    moved   bigint;
    is_due  boolean;
begin
    select * into pending from transfers
        where id = wanted.pending_id and phase = 'pending' and debit_id = any (locked) and credit_id = any (locked);
    if not found then
        return refusal('pending_unknown');
    end if;
    select * into before from transfers where pending_id = pending.id;
    if found then
        return refusal(case before.phase
            when 'post' then 'already_posted' when 'void' then 'already_voided' else 'already_expired'
        end, before.id);
    end if;
    is_due := coalesce(pending.expires_at <= clock_timestamp(), false);
    if not is_ledger_account(pending.debit_id, wanted.debit_kind, wanted.debit_owner)
        or not is_ledger_account(pending.credit_id, wanted.credit_kind, wanted.credit_owner)
    then
        return refusal('other_accounts');
    elsif wanted.phase = 'post' and wanted.amount_nano > pending.amount_nano then
        return refusal('exceeds_pending');
    elsif wanted.phase = 'post' and is_due then
        return refusal('pending_expired');
    elsif wanted.phase = 'expire' and not is_due then
        return refusal('not_due');
    end if;
    wanted.debit_id := pending.debit_id;
    wanted.credit_id := pending.credit_id;
    wanted.kind := coalesce(wanted.kind, pending.kind);
    wanted.amount_nano := coalesce(wanted.amount_nano, pending.amount_nano);
    moved := case when wanted.phase = 'post' then wanted.amount_nano else 0 end;
    perform write_transfer(wanted);
    delete from open_transfers where id = pending.id;
    update ledger_accounts set
        debit_nano = debit_nano + moved, pending_debit_nano = pending_debit_nano - pending.amount_nano
        where id = pending.debit_id;
    update ledger_accounts set
        credit_nano = credit_nano + moved, pending_credit_nano = pending_credit_nano - pending.amount_nano
        where id = pending.credit_id;
    return jsonb_build_object('status', 'done', 'id', wanted.id);
end
$$;

create function write_transfer(wanted wanted_transfer) returns void language sql as $$
    insert into transfers (
        id, debit_id, credit_id, amount_nano, phase, kind, pending_id, idempotency_key, posting_id, incarnation_id,
        cause, expires_at
    ) values (
        wanted.id, wanted.debit_id, wanted.credit_id, wanted.amount_nano, wanted.phase, wanted.kind, wanted.pending_id,
        wanted.idempotency_key, wanted.posting_id, wanted.incarnation_id, wanted.cause, wanted.expires_at
    )
$$;
