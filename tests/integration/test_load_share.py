"""Workers that tell each other their turns in flight through a real Valkey, and go on without it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import orjson
import pytest
from redis.asyncio import Redis

from config.defaults import Settings
from config.valkey import open_valkey
from nodes import load
from nodes.heartbeats import EngineRow
from nodes.load import IN_FLIGHT, LoadShare
from nodes.networks import AllowedNetworks
from nodes.registry import Registry
from nodes.routing.snapshot import Engine
from tests.fakes.stores import frozen, kill
from tests.waiting import eventually

KEY, OTHER = "n1/e0", "n1/e1"
MODELS = ({"id": "m", "context_length": 1, "kind": "generate", "parent": None},)


class Worker:
    """One worker's share of the load, and its own picture of the engines."""

    def __init__(self, name: str, valkey: Redis, settings: Settings, clock: Any) -> None:
        self.registry = Registry(settings, AllowedNetworks("127.0.0.0/8"), clock)
        rows = [EngineRow("n1", engine_id, 1, "http://127.0.0.1:1", 0, MODELS) for engine_id in ("e0", "e1")]
        self.registry.apply(rows, 1)
        self.share = LoadShare(valkey, self.registry, settings, name)
        self._task: asyncio.Task[None] | None = None

    def engine(self, key: str = KEY) -> Engine:
        engine = self.registry.engine(key)
        assert engine is not None
        return engine

    def has(self, turns: int, tokens: int, key: str = KEY) -> bool:
        """What it knows of the others' work."""
        others = self.engine(key).load
        return (others.others_turns, others.others_tokens) == (turns, tokens)

    def puts(self, turns: int, tokens: int, key: str = KEY) -> None:
        self.engine(key).load.turns, self.engine(key).load.tokens = turns, tokens

    def start(self) -> None:
        self._task = asyncio.create_task(self.share.run())

    async def end(self) -> None:
        """As if killed: nothing is taken back."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)


@asynccontextmanager
async def workers(count: int, valkey: Redis, settings: Settings, clock: Any) -> AsyncIterator[list[Worker]]:
    made = [Worker(f"w{number}", valkey, settings, clock) for number in range(count)]
    for worker in made:
        worker.start()
    try:
        yield made
    finally:
        for worker in made:
            await worker.end()


@pytest.fixture
async def pair(valkey, settings, clock) -> AsyncIterator[list[Worker]]:
    async with workers(2, valkey, settings, clock) as made:
        yield made


async def test_each_sees_the_others_turns_and_not_its_own(pair):
    one, two = pair
    one.puts(3, 300)
    two.puts(1, 50)
    await eventually(lambda: one.has(1, 50) and two.has(3, 300))
    assert one.has(0, 0, OTHER)
    one.puts(0, 0)
    await eventually(lambda: two.has(0, 0))
    assert one.has(1, 50)


async def test_one_that_was_alone_finds_who_comes(valkey, settings, clock):
    async with workers(1, valkey, settings, clock) as (first,):
        first.puts(3, 300)
        await asyncio.sleep(5 * settings.load_share_s)
        second = Worker("w1", valkey, settings, clock)
        second.puts(1, 50)
        second.start()
        await eventually(lambda: first.has(1, 50) and second.has(3, 300))
        await second.end()


async def test_turns_of_several_workers_add_up(valkey, settings, clock):
    async with workers(4, valkey, settings, clock) as made:
        for number, worker in enumerate(made):
            worker.puts(number, number * 10)
        await eventually(lambda: made[0].has(6, 60))


async def test_a_worker_that_fell_silent_is_forgotten(pair):
    one, two = pair
    two.puts(5, 500)
    await eventually(lambda: one.has(5, 500))
    await two.end()
    await eventually(lambda: one.has(0, 0))


async def test_one_that_leaves_is_forgotten_at_once(pair, valkey):
    one, two = pair
    two.puts(5, 500)
    await eventually(lambda: one.has(5, 500))
    await two.end()
    await two.share.leave()
    assert set(await valkey.hgetall(IN_FLIGHT)) == {b"w0"}
    await eventually(lambda: one.has(0, 0))


async def test_a_silent_one_that_comes_back_counts_again(pair):
    one, two = pair
    two.puts(5, 500)
    await eventually(lambda: one.has(5, 500))
    await two.end()
    await eventually(lambda: one.has(0, 0))
    two.start()
    await eventually(lambda: one.has(5, 500))


async def test_a_new_worker_forgets_an_old_entry_that_nobody_renews(valkey, settings, clock):
    told = {"sequence": 9, "load": {KEY: [7, 700]}}
    await valkey.hset(IN_FLIGHT, "dead-one", orjson.dumps(told))
    async with workers(1, valkey, settings, clock) as (one,):
        await eventually(lambda: one.has(7, 700))
        await eventually(lambda: one.has(0, 0))


@pytest.mark.parametrize(
    "value",
    [b"", b"no json", b"[]", b"null", b"{}", b'{"sequence":1,"load":[]}', b'{"sequence":1,"load":{"n1/e0":1}}',
     b'{"sequence":1,"reports":[]}', b'{"sequence":1,"reports":{"n1/e0":5}}', b'{"reports":{"n1/e0":{"running":"x"}}}',
     b'{"sequence":1,"load":{"n1/e0":["a","b"]}}', b'{"sequence":{},"load":{"unknown":[1,1]}}'],
)  # fmt: skip
async def test_nonsense_in_valkey_counts_as_nothing(pair, valkey, value):
    one, two = pair
    await valkey.hset(IN_FLIGHT, "stranger", value)
    two.puts(2, 20)
    await eventually(lambda: one.has(2, 20))
    assert one.engine().load.running == 0


# --- what engines say of themselves ----------------------------------------------------------------------------------


async def test_a_report_to_one_worker_reaches_all(pair):
    one, two = pair
    one.share.report({KEY: {"running": 4, "waiting": 2, "kv_usage": 0.5}})
    assert (one.engine().load.running, one.engine().load.waiting) == (4, 2), (
        "the one that got it knows at once"
    )
    await eventually(lambda: two.engine().load.running == 4)
    assert two.engine().load.kv_usage == 0.5


async def test_a_report_that_is_not_renewed_fades(pair, monkeypatch):
    monkeypatch.setattr(load, "REPORT_FRESH_S", 0.2)
    one, two = pair
    one.share.report({KEY: {"running": 4, "waiting": 2, "kv_usage": 0.5}})
    await eventually(lambda: two.engine().load.running == 4)
    await eventually(lambda: two.engine().load.running == one.engine().load.running == 0)
    assert two.engine().load.kv_usage == 0
    one.share.report({KEY: {"running": 5, "waiting": 0, "kv_usage": 0.1}})
    await eventually(lambda: two.engine().load.running == 5)


async def test_a_report_that_says_the_same_again_counts_on(pair, monkeypatch):
    monkeypatch.setattr(load, "REPORT_FRESH_S", 1.0)
    one, two = pair
    one.share.report({KEY: {"running": 4}})
    await eventually(lambda: two.engine().load.running == 4)
    since_s = two.share._reports[KEY]

    def is_renewed() -> bool:
        one.share.report({KEY: {"running": 4}})
        assert one.engine().load.running == 4
        return two.share._reports[KEY] > since_s + 1.5

    await eventually(is_renewed)
    assert two.engine().load.running == 4


async def test_a_report_of_an_engine_that_nobody_knows_is_dropped(pair):
    one, two = pair
    one.share.report({"n9/e9": {"running": 4}})
    one.share.report({KEY: {"running": 4}})
    await eventually(lambda: two.engine().load.running == 4)
    assert set(one.share._reports) == set(two.share._reports) == {KEY}


async def test_what_an_engine_tells_another_worker_later_stands(pair, monkeypatch):
    monkeypatch.setattr(load, "TOLD_PERIODS", 10_000)  # the older one stays in its entry
    one, two = pair
    one.share.report({KEY: {"running": 4}})
    await eventually(lambda: two.engine().load.running == 4)
    two.share.report({KEY: {"running": 9}})
    await eventually(lambda: one.engine().load.running == 9)
    sequence = one.share._sequence
    await eventually(lambda: one.share._sequence > sequence + 3 and two.share._sequence > sequence + 3)
    assert one.engine().load.running == two.engine().load.running == 9


async def test_an_entry_has_only_what_was_told_of_late(pair, valkey):
    one, two = pair
    one.puts(1, 10)
    one.share.report({KEY: {"running": 4}})
    await eventually(lambda: two.engine().load.running == 4)

    async def is_told() -> bool:
        return bool(orjson.loads(await valkey.hget(IN_FLIGHT, "w0"))["reports"])

    async def is_told_no_more() -> bool:
        return not await is_told()

    await eventually(is_told_no_more)
    assert two.engine().load.running == 4, "it counts for longer"


# --- without Valkey --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["frozen", "killed"])
async def test_without_valkey_each_knows_its_own_and_afterwards_all_again(
    private_stores, settings, clock, how
):
    async with (
        open_valkey(private_stores.redis_url, timeout_s=0.2) as valkey,
        workers(2, valkey, settings, clock) as (one, two),
    ):
        two.puts(5, 500)
        one.puts(1, 10)
        await eventually(lambda: one.has(5, 500))
        if how == "frozen":
            with frozen(private_stores, "valkey"):
                await eventually(lambda: one.has(0, 0))
                one.share.report({KEY: {"running": 3}})
        else:
            kill(private_stores, "valkey")
            await eventually(lambda: one.has(0, 0))
            one.share.report({KEY: {"running": 3}})
            private_stores.restart("valkey")
        assert one.engine().load.turns == 1, "its own are its own"
        await eventually(lambda: one.has(5, 500) and two.has(1, 10))


async def test_leaving_without_valkey_is_no_error(private_stores, settings, clock):
    async with open_valkey(private_stores.redis_url, timeout_s=0.2) as valkey:
        kill(private_stores, "valkey")
        await Worker("w0", valkey, settings, clock).share.leave()


async def test_it_ends_when_cancelled_whatever_it_was_doing(valkey, settings, clock):
    for number in range(150):
        worker = Worker("w0", valkey, settings, clock)
        worker.start()
        for _ in range(number % 15):
            await asyncio.sleep(0)
        await asyncio.sleep(0.0001 * (number % 7))
        async with asyncio.timeout(20):
            await worker.end()


async def test_an_idle_worker_writes_once_and_is_heard_again_when_it_has_turns(pair, valkey):
    one, two = pair
    await eventually(lambda: one.share._is_idle and two.share._is_idle)
    written = await valkey.hget(IN_FLIGHT, "w1")
    await asyncio.sleep(0.2)  # ten periods
    assert await valkey.hget(IN_FLIGHT, "w1") == written
    two.puts(5, 500)
    await eventually(lambda: one.has(5, 500))
    two.puts(0, 0)
    await eventually(lambda: one.has(0, 0))


async def test_a_report_that_comes_back_to_what_it_was_is_news(pair):
    one, two = pair
    for running in (4, 5, 4):
        one.share.report({KEY: {"running": running}})
        assert one.engine().load.running == running
    await eventually(lambda: two.engine().load.running == 4)


async def test_an_engine_that_reports_too_many_turns_waiting_inside_it_is_full_until_it_is_asked_again(
    valkey, settings, clock
):
    async with workers(1, valkey, settings, clock) as (one,):
        one.puts(3, 30)
        one.share.report({KEY: {"running": 9, "waiting": settings.engine_waiting_max}})
        assert one.engine().load.cap > 1000
        one.share.report({KEY: {"running": 9, "waiting": settings.engine_waiting_max + 1}})
        assert not one.engine().is_fit(1000)
        one.registry.relax_caps(1)
        assert one.engine().is_fit(1000), "one turn more may try"
        for _ in range(30):
            one.registry.relax_caps(0)
        assert not one.registry.capped
