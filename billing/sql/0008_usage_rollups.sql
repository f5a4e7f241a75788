-- Usage by hour and by day, added to when turns are shipped; and what names a turn's posting.

alter table usage
    add column posting_id  uuid,                    -- transfers.posting_id; null: it cost nothing
    add column provider_id bigint,                  -- the account whose node did it
    add column loss_nano   bigint not null default 0 check (loss_nano >= 0); -- delivered beyond its hold: the platform's

-- Charged before there was a ledger: the nil UUID stands for "no posting, and none is missing".
update usage set posting_id = '00000000-0000-0000-0000-000000000000' where amount_nano > 0;

create index usage_posting on usage (posting_id) where posting_id is not null;

create table usage_hours (
    account_id        bigint not null,
    hour              timestamptz not null,
    key_id            bigint not null,
    model             text not null,
    turns             bigint not null,
    prompt_tokens     bigint not null,              -- the cached ones included
    cached_tokens     bigint not null,
    completion_tokens bigint not null,
    amount_nano       bigint not null,
    primary key (account_id, hour, key_id, model)
) with (fillfactor = 70);

create table usage_days (
    account_id        bigint not null,
    day               date not null,                -- UTC's
    key_id            bigint not null,
    model             text not null,
    turns             bigint not null,
    prompt_tokens     bigint not null,
    cached_tokens     bigint not null,
    completion_tokens bigint not null,
    amount_nano       bigint not null,
    primary key (account_id, day, key_id, model)
) with (fillfactor = 70);

create index usage_hours_hour on usage_hours (hour);   -- old hours are dropped by age
create index usage_days_day on usage_days (day);       -- all accounts of a period

insert into usage_hours
    select account_id, date_trunc('hour', started_at, 'UTC'), key_id, model, count(*), sum(prompt_tokens),
        sum(cached_tokens), sum(completion_tokens), sum(amount_nano)
    from usage group by 1, 2, 3, 4;
insert into usage_days
    select account_id, (started_at at time zone 'UTC')::date, key_id, model, count(*), sum(prompt_tokens),
        sum(cached_tokens), sum(completion_tokens), sum(amount_nano)
    from usage group by 1, 2, 3, 4;
