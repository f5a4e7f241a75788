-- Requests with an Idempotency-Key: who has it, and the first answer, encrypted, for a day.

create table idempotency_claims (
    account_id     bigint not null,
    key            text not null check (key <> ''),
    request_hash   bytea not null,                  -- of method, path and body, keyed: it tells nobody what was asked
    state          text not null default 'running' check (state in ('running', 'finished')),
    incarnation_id uuid not null,                   -- who runs it
    turn_id        uuid not null,
    attempts       smallint not null default 1,     -- 2: its first owner died before it was done
    is_answered    boolean not null default false,  -- its owner has said what the answer is; a claim is finished before
                                                    -- that when its turn is in the book
    answer         bytea,                           -- sealed; null: not kept (too large, or its owner died)
    created_at     timestamptz not null default clock_timestamp(),
    finished_at    timestamptz,
    primary key (account_id, key)
);

create index idempotency_claims_created on idempotency_claims (created_at); -- kept for a day
