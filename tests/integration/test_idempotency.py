"""Idempotency-Keys: one turn for each, whatever repeats, dies or is away; and its answer again, byte for byte."""

import asyncio
import dataclasses
import uuid
from collections.abc import Callable, Mapping
from typing import Any

import asyncpg
import pytest

from billing.idempotency import (
    STATEMENTS_AT_ONCE_MAX,
    Claimed,
    Conflict,
    IdempotencyStore,
    Lost,
    Repeat,
    Running,
    StoreUnavailable,
    Verdict,
    trim_claims,
)
from billing.limits.headers import NOTHING_TOLD, Told
from billing.shipment import FINISH_CLAIMS
from config.defaults import Settings
from config.embedded import EmbeddedStores
from config.ids import uuid7
from config.postgres import AWAY, migrate, open_pool
from gateway.errors import ApiError, BadRequest, NoNodeAvailable
from gateway.idempotent import Answer, Collected, KeyedTurns, key_of
from gateway.relay.downstream import ClientGone
from tests.fakes.stores import frozen, kill
from tests.waiting import eventually

PEPPER = b"pepper-of-the-tests"
ACCOUNT = 7
ASK: Any = None  # the lifecycle's concern, which is played here


@pytest.fixture
def store(pool: asyncpg.Pool, settings: Settings) -> IdempotencyStore:
    return IdempotencyStore(pool, settings, PEPPER)


@pytest.fixture
async def process(pool: asyncpg.Pool) -> uuid.UUID:
    return await live_process(pool)


async def live_process(pool: asyncpg.Pool) -> uuid.UUID:
    made = uuid7()
    await pool.execute("insert into incarnations (id, host, pid, journal) values ($1, 'h', 1, 'j')", made)
    return made


async def dies(pool: asyncpg.Pool, process: uuid.UUID, state: str = "closed") -> None:
    await pool.execute("update incarnations set state = $2 where id = $1", process, state)


async def claim(
    store: IdempotencyStore, process: uuid.UUID, turn: uuid.UUID | None = None, *, body: bytes = b"{}",
    key: str = "k", account: int = ACCOUNT,
) -> Verdict:  # fmt: skip
    return await store.claim(
        account, key, store.request_hash("POST", "/v1/x", body), process, turn or uuid7()
    )


# --- the store --------------------------------------------------------------------------------------------------


async def test_a_key_is_claimed_once_and_its_answer_is_repeated(
    store: IdempotencyStore, process: uuid.UUID, pool: asyncpg.Pool
) -> None:
    turn = uuid7()
    assert await claim(store, process, turn) == Claimed(is_rerun=False)
    assert await claim(store, process) == Running()
    await store.finish(ACCOUNT, "k", turn, b"the answer")
    assert await claim(store, process) == Repeat(b"the answer")
    assert await claim(store, await live_process(pool)) == Repeat(b"the answer")
    kept = await pool.fetchval("select answer from idempotency_claims")
    assert b"answer" not in kept


async def test_keys_belong_to_accounts(store: IdempotencyStore, process: uuid.UUID) -> None:
    assert await claim(store, process) == Claimed(False)
    assert await claim(store, process, account=ACCOUNT + 1) == Claimed(False)
    assert await claim(store, process, key="K") == Claimed(False)


async def test_another_request_with_a_key_is_a_conflict_before_and_after_its_answer(
    store: IdempotencyStore, process: uuid.UUID, pool: asyncpg.Pool
) -> None:
    turn = uuid7()
    await claim(store, process, turn)
    assert await claim(store, process, body=b"[]") == Conflict()
    await store.finish(ACCOUNT, "k", turn, b"the answer")
    assert await claim(store, process, body=b"[]") == Conflict()
    await dies(pool, process)
    assert await claim(store, process, body=b"[]") == Conflict()


async def test_of_many_claims_at_once_one_wins(store: IdempotencyStore, process: uuid.UUID) -> None:
    verdicts = await asyncio.gather(*(claim(store, process) for _ in range(20)))
    assert verdicts.count(Claimed(False)) == 1
    assert verdicts.count(Running()) == 19


async def test_a_refused_turn_gives_its_key_back(store: IdempotencyStore, process: uuid.UUID) -> None:
    turn = uuid7()
    await claim(store, process, turn)
    await store.release(ACCOUNT, "k", turn)
    assert await claim(store, process, body=b"[]") == Claimed(False)


async def test_another_turn_can_neither_finish_nor_release_a_claim(
    store: IdempotencyStore, process: uuid.UUID
) -> None:
    await claim(store, process)
    await store.finish(ACCOUNT, "k", uuid7(), b"not mine")
    await store.release(ACCOUNT, "k", uuid7())
    assert await claim(store, process) == Running()


async def test_an_answer_that_was_not_kept_is_lost(store: IdempotencyStore, process: uuid.UUID) -> None:
    turn = uuid7()
    await claim(store, process, turn)
    await store.finish(ACCOUNT, "k", turn, None)
    assert await claim(store, process) == Lost()


@pytest.mark.parametrize("state", ["closed", "abandoned"])
async def test_a_claim_whose_owner_died_unfinished_runs_again_once(
    store: IdempotencyStore, pool: asyncpg.Pool, state: str
) -> None:
    first, second, third = [await live_process(pool) for _ in range(3)]
    dead, rerun = uuid7(), uuid7()
    await claim(store, first, dead)
    assert await claim(store, second) == Running()  # its journal may say that it was settled
    await dies(pool, first, state)
    verdicts = await asyncio.gather(*(claim(store, second, rerun if n == 0 else None) for n in range(10)))
    assert verdicts.count(Claimed(is_rerun=True)) == 1
    assert verdicts.count(Running()) == 9
    await store.finish(ACCOUNT, "k", dead, b"from the grave")
    assert await claim(store, third) == Running()
    await dies(pool, second)
    assert await claim(store, third) == Lost()


async def test_a_turn_that_was_settled_by_a_process_that_died_is_not_run_again(
    store: IdempotencyStore, process: uuid.UUID, pool: asyncpg.Pool
) -> None:
    turn = uuid7()
    await claim(store, process, turn)
    await pool.execute(
        FINISH_CLAIMS, [ACCOUNT], ["k"], [turn]
    )  # the shipper, before it closes the incarnation
    assert await claim(store, process) == Running()  # its owner will say what the answer is
    await dies(pool, process)
    assert await claim(store, process) == Lost()


async def test_an_answer_counts_although_its_turn_was_in_the_book_first(
    store: IdempotencyStore, process: uuid.UUID, pool: asyncpg.Pool
) -> None:
    turn = uuid7()
    await claim(store, process, turn)
    await pool.execute(FINISH_CLAIMS, [ACCOUNT], ["k"], [turn])
    await store.finish(ACCOUNT, "k", turn, b"the answer")
    assert await claim(store, process) == Repeat(b"the answer")


async def test_an_expired_claim_counts_as_none_and_is_trimmed(
    store: IdempotencyStore, process: uuid.UUID, pool: asyncpg.Pool, settings: Settings
) -> None:
    turns = {key: uuid7() for key in ("finished", "running", "fresh")}
    for key, turn in turns.items():
        await claim(store, process, turn, key=key)
    await store.finish(ACCOUNT, "finished", turns["finished"], b"old")
    await pool.execute(
        "update idempotency_claims set created_at = created_at - make_interval(secs => $1) where key <> 'fresh'",
        settings.idempotency_kept_s + 1,
    )
    assert await claim(store, process, key="running") == Running()
    assert await trim_claims(pool, settings) == 1
    rows = await pool.fetch("select key from idempotency_claims order by key")
    assert [row["key"] for row in rows] == ["fresh", "running"]
    await dies(pool, process)
    later = await live_process(pool)
    assert await claim(store, later, key="running", body=b"[]") == Claimed(is_rerun=False)
    assert await trim_claims(pool, settings) == 0


async def test_an_answer_sealed_with_another_pepper_is_lost(
    store: IdempotencyStore, process: uuid.UUID, pool: asyncpg.Pool, settings: Settings
) -> None:
    turn = uuid7()
    await claim(store, process, turn)
    other = IdempotencyStore(pool, settings, b"another pepper, by mistake")
    await other.finish(ACCOUNT, "k", turn, b"the answer")
    assert await claim(store, process) == Lost()


async def test_while_postgres_is_away_no_key_is_claimed_and_no_answer_is_forgotten(
    private_stores: EmbeddedStores, settings: Settings
) -> None:
    url = private_stores.database_url
    await migrate(url)
    settings = dataclasses.replace(settings, database_url=url, idempotency_pending_max=1)
    async with await open_pool(url, max_size=4, timeout_s=10) as pool:
        store, process = IdempotencyStore(pool, settings, PEPPER), await live_process(pool)
        turns = {key: uuid7() for key in ("kept", "crowded out", "refused")}
        for key, turn in turns.items():
            await claim(store, process, turn, key=key)
        await pool.execute("checkpoint")  # the stores of tests write late what they have committed
        kill(private_stores, "postgres")
        await eventually(lambda: is_away(pool))
        with pytest.raises(StoreUnavailable):
            await claim(store, process, key="new")
        await store.finish(ACCOUNT, "kept", turns["kept"], b"the answer")
        await store.finish(ACCOUNT, "crowded out", turns["crowded out"], b"another")
        await store.release(ACCOUNT, "refused", turns["refused"])
        assert store.pending == 3  # the claim was never sent, so that there is nothing to withdraw
        private_stores.restart("postgres")
        await eventually(lambda: is_back(pool))
        telling = asyncio.create_task(store.run())
        await eventually(lambda: store.pending == 0)
        assert await claim(store, process, key="kept") == Repeat(b"the answer")
        assert await claim(store, process, key="crowded out") == Lost()
        assert await claim(store, process, key="refused") == Claimed(False)
        assert await claim(store, process, key="new") == Claimed(False)
        telling.cancel()
        assert await store.close(timeout_s=10) == 0


async def test_a_flood_of_claims_takes_two_connections_and_a_frozen_postgres_is_told_of_two(
    private_stores: EmbeddedStores, settings: Settings
) -> None:
    url = private_stores.database_url
    await migrate(url)
    settings = dataclasses.replace(settings, database_url=url, database_timeout_s=0.5)
    async with await open_pool(url, max_size=4, timeout_s=10) as pool:
        store, process = IdempotencyStore(pool, settings, PEPPER), await live_process(pool)
        await asyncio.gather(*(pool.fetchval("select 1") for _ in range(8)))  # they are connected
        with frozen(private_stores, "postgres"):
            claims = [asyncio.create_task(claim(store, process, key=f"k-{n}")) for n in range(50)]
            await asyncio.sleep(0)
            assert pool.get_size() - pool.get_idle_size() <= STATEMENTS_AT_ONCE_MAX
            results = await asyncio.gather(*claims, return_exceptions=True)
            assert {type(result) for result in results} == {StoreUnavailable}
            assert store.pending <= STATEMENTS_AT_ONCE_MAX
        await eventually(lambda: is_back(pool))
        telling = asyncio.create_task(store.run())
        await eventually(lambda: store.pending == 0)  # withdrawn, and said for longer: a claim may come late
        assert await claim(store, process, key="k-0") == Claimed(False)
        telling.cancel()


async def is_back(pool: asyncpg.Pool) -> bool:
    return not await is_away(pool)


async def is_away(pool: asyncpg.Pool) -> bool:
    try:
        await pool.execute("select 1")
    except AWAY:
        return True
    return False


# --- a keyed turn -----------------------------------------------------------------------------------------------


class Client:
    """Downstream that notes what it was given."""

    def __init__(self) -> None:
        self.is_started = self.is_gone = self.is_full = self.is_finished = False
        self.headers: dict[str, str] = {}
        self.data = b""
        self.drains = 0

    def start(self, headers: Mapping[str, str], told: Told = NOTHING_TOLD) -> None:
        self.is_started, self.headers = True, {**headers, **told}

    def write(self, data: bytes) -> None:
        self.data += data

    def finish(self, data: bytes = b"") -> None:
        self.write(data)
        self.is_finished = True

    def answer(self, status: int, headers: Mapping[str, str], body: bytes, told: Told = NOTHING_TOLD) -> None:
        self.start(headers, told)
        self.finish(body)

    async def drained(self) -> None:
        self.drains += 1
        if self.is_gone:
            raise ClientGone
        self.is_full = False


@dataclasses.dataclass
class Ended:
    """What of a turn tells how it ended."""

    outcome: str = "finished"
    amount_nano: int = 5


class Turns:
    """Plays the lifecycle: each turn does what `act` says, and they are counted."""

    def __init__(self, act: Callable[[Any], Any]) -> None:
        self.act = act
        self.keys: list[str] = []

    async def run(self, ask: Any, principal: Any, request_id: str, down: Any, *, idempotency_key: str) -> Any:
        self.keys.append(idempotency_key)
        found = self.act(down)
        return (await found if asyncio.iscoroutine(found) else found) or Ended()


class Caller:
    """Sends the same keyed request, again and again."""

    principal: Any = type("Principal", (), {"account_id": ACCOUNT, "models": None})

    def __init__(self, keyed: KeyedTurns) -> None:
        self.keyed = keyed

    async def ask(self, client: Client, key: str = "k", request_hash: bytes = b"h" * 32) -> Client:
        await self.keyed.run(
            ASK, self.principal, f"req_{uuid7().hex}", client, key=key, request_hash=request_hash
        )
        return client

    async def refused(self, **more: Any) -> ApiError:
        with pytest.raises(ApiError) as caught:
            await self.ask(Client(), **more)
        return caught.value


@pytest.fixture
def calling(
    store: IdempotencyStore, process: uuid.UUID, settings: Settings
) -> Callable[[Callable[[Any], Any]], tuple[Turns, Caller]]:
    def make(act: Callable[[Any], Any]) -> tuple[Turns, Caller]:
        turns = Turns(act)
        small = dataclasses.replace(settings, idempotency_bytes_max=100_000)
        return turns, Caller(KeyedTurns(store, turns.run, small, process))

    return make


HEAD = {
    "content-type": "text/event-stream",
    "x-request-id": "req_first",
    "x-ratelimit-remaining-requests": "9",
}


def streams(down: Any) -> None:
    down.start(HEAD)
    down.write(b"data: \xc3")
    down.write(b"\xa9\n\n" * 20_000)
    down.finish(b"data: [DONE]\n\n")


async def test_a_stream_is_repeated_byte_for_byte_with_the_first_ones_request_id(calling: Any) -> None:
    turns, caller = calling(streams)
    first, again = await caller.ask(Client()), await caller.ask(Client())
    assert turns.keys == ["k"]
    assert again.is_finished
    assert again.data == first.data
    assert again.headers == {
        "content-type": "text/event-stream", "x-request-id": "req_first", "idempotent-replayed": "true",
    }  # fmt: skip


async def test_a_whole_answer_is_repeated(calling: Any) -> None:
    _, caller = calling(lambda down: down.answer(200, {"x-request-id": "req_first"}, b'{"a":1}'))
    await caller.ask(Client())
    again = await caller.ask(Client())
    assert (again.data, again.headers["idempotent-replayed"]) == (b'{"a":1}', "true")


async def test_a_slow_client_is_waited_for_while_a_stream_is_repeated(calling: Any) -> None:
    _, caller = calling(streams)
    await caller.ask(Client())
    slow = Client()
    slow.is_full = True
    assert (await caller.ask(slow)).drains == 1


async def test_a_turn_runs_to_its_end_although_its_client_left(calling: Any) -> None:
    engine_goes_on = asyncio.Event()

    async def act(down: Any) -> None:
        down.start(HEAD)
        down.write(b"seen")
        await engine_goes_on.wait()
        assert not down.is_gone
        assert not down.is_full
        await down.drained()
        down.finish(b"unseen")

    _, caller = calling(act)
    client = Client()
    asking = asyncio.create_task(caller.ask(client))
    await eventually(lambda: client.data)
    assert (await caller.refused()).wire_code == "idempotency_key_in_use"
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert caller.keyed.in_flight == 1
    engine_goes_on.set()
    await caller.keyed.close(timeout_s=60)
    assert caller.keyed.in_flight == 0
    assert client.data == b"seen"
    assert (await caller.ask(Client())).data == b"seenunseen"


async def test_a_repeat_while_the_first_runs_is_told_when_to_come_back(calling: Any) -> None:
    end = asyncio.Event()

    async def act(down: Any) -> None:
        await end.wait()
        down.answer(200, {}, b"{}")

    turns, caller = calling(act)
    asking = asyncio.create_task(caller.ask(Client()))
    await eventually(lambda: turns.keys)
    error = await caller.refused()
    assert (error.status, error.wire_code, error.retry_after_s) == (409, "idempotency_key_in_use", 1)
    assert "x-should-retry" not in error.headers
    other = await caller.refused(request_hash=b"i" * 32)
    assert (other.status, other.wire_code) == (409, "idempotency_key_reused")
    assert other.headers["x-should-retry"] == "false"
    end.set()
    await asking


async def test_errors_are_no_answers_and_leave_the_key_free(calling: Any) -> None:
    def act(down: Any) -> None:
        if len(turns.keys) == 1:
            raise NoNodeAvailable
        down.answer(200, {}, b"{}")

    turns, caller = calling(act)
    assert (await caller.refused()).status == 503
    assert (await caller.ask(Client())).data == b"{}"
    assert len(turns.keys) == 2


@pytest.mark.parametrize(
    ("ended", "code"),
    [
        (Ended("engine_failed", 5), None),
        (Ended("engine_failed", 0), "runs again"),
        (Ended("refused", 0), "runs again"),
        (Ended("finished", 0), None),
        (Ended("timeout", 5), None),
        (Ended("cut", 5), "idempotency_answer_lost"),
        (Ended("cut", 0), "runs again"),
    ],
)
async def test_what_was_charged_is_never_run_again(calling: Any, ended: Ended, code: str | None) -> None:
    def act(down: Any) -> Ended:
        streams(down)
        return ended

    turns, caller = calling(act)
    await caller.ask(Client())
    if code == "idempotency_answer_lost":
        error = await caller.refused()
        assert (error.status, error.wire_code, error.headers["x-should-retry"]) == (409, code, "false")
    else:
        again = await caller.ask(Client())
        assert ("idempotent-replayed" in again.headers) is (code is None)
    assert len(turns.keys) == (2 if code == "runs again" else 1)


async def test_a_turn_that_broke_is_not_run_again(calling: Any) -> None:
    def act(down: Any) -> None:
        raise RuntimeError("a fault of ours")

    _, caller = calling(act)
    with pytest.raises(RuntimeError):
        await caller.ask(Client())
    assert (await caller.refused()).wire_code == "idempotency_answer_lost"


async def test_what_does_not_end_by_the_close_is_cancelled_and_its_key_is_used_up(
    calling: Any, pool: asyncpg.Pool
) -> None:
    async def act(down: Any) -> None:
        down.start(HEAD)
        await asyncio.Event().wait()

    _, caller = calling(act)
    client = Client()
    asking = asyncio.create_task(caller.ask(client))
    await eventually(lambda: client.is_started)
    await caller.keyed.close(timeout_s=0.01)
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert caller.keyed.in_flight == 0
    assert await pool.fetchval("select is_answered and answer is null from idempotency_claims")


async def test_an_answer_past_the_bound_goes_out_whole_and_is_not_kept(calling: Any) -> None:
    _, caller = calling(lambda down: down.answer(200, {}, b"x" * 100_001))
    assert len((await caller.ask(Client())).data) == 100_001
    assert (await caller.refused()).wire_code == "idempotency_answer_lost"


async def test_without_the_store_a_keyed_request_is_refused_and_not_run(
    store: IdempotencyStore, calling: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def away(*args: Any) -> Any:
        raise StoreUnavailable

    turns, caller = calling(streams)
    monkeypatch.setattr(store, "claim", away)
    error = await caller.refused()
    assert (error.status, error.retry_after_s, turns.keys) == (503, 1, [])


# --- its parts --------------------------------------------------------------------------------------------------


async def test_a_client_that_is_there_slows_its_turn_down_and_one_that_left_does_not() -> None:
    client = Client()
    collected = Collected(client, 100)
    client.is_full = True
    assert collected.is_full
    await collected.drained()
    assert client.drains == 1
    client.is_full = client.is_gone = True
    assert not collected.is_full
    await collected.drained()
    assert client.drains == 1


async def test_a_client_that_is_given_up_while_it_is_waited_for_counts_as_gone() -> None:
    class Stalled(Client):
        async def drained(self) -> None:
            raise ClientGone

    client = Stalled()
    client.is_full = True
    collected = Collected(client, 100)
    await collected.drained()
    assert not collected.is_full
    assert not collected.has_client


def test_an_answer_that_did_not_end_is_not_kept() -> None:
    collected = Collected(Client(), 100)
    collected.start({})
    collected.write(b"a")
    assert collected.kept is None
    collected.finish(b"\n")
    assert collected.kept == Answer(200, {}, b"a\n", is_stream=True)
    assert Answer.unpacked(collected.kept.packed()) == collected.kept


@pytest.mark.parametrize("key", ["", "x" * 256, "with space", "ümlaut", "tab\t", "line\n"])
def test_a_key_that_is_no_key_is_refused(key: str) -> None:
    with pytest.raises(BadRequest) as caught:
        key_of(key)
    assert caught.value.wire_code == "invalid_idempotency_key"


def test_keys_are_optional_and_up_to_255_visible_characters() -> None:
    assert key_of(None) is None
    assert key_of("~!" + "x" * 253) == "~!" + "x" * 253
