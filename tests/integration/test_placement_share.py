"""Workers that tell each other, through a real Valkey, where they sent prompts; and what nonsense there does: nothing."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import orjson
import pytest
from redis.asyncio import Redis

from config.defaults import Settings
from config.valkey import open_valkey
from nodes.heartbeats import EngineRow
from nodes.networks import AllowedNetworks
from nodes.placements import CHANNEL, PlacementShare
from nodes.registry import Registry
from nodes.routing.prefixes import ENDS, beginnings, holders_of
from nodes.routing.router import Need, Router
from nodes.routing.scorers import Policy
from nodes.routing.snapshot import Engine
from tests.fakes.stores import kill
from tests.waiting import eventually

ENGINES = 16
MODELS = ({"id": "m", "context_length": 1, "kind": "generate", "parent": None},)


class Worker:
    """One worker's router and its share."""

    def __init__(self, name: str, valkey: Redis, settings: Settings, clock: Any) -> None:
        self.registry = Registry(settings, AllowedNetworks("127.0.0.0/8"), clock)
        rows = [
            EngineRow("n1", f"e{number}", 1, "http://127.0.0.1:1", 0, MODELS) for number in range(ENGINES)
        ]
        self.registry.apply(rows, 1)
        self.router = Router(Policy.of(settings), self.registry.prefixes, sessions_max=10)
        self.share = PlacementShare(valkey, self.registry, settings, name)

    def route(self, text: str) -> Engine:
        body = b'{"messages":[' + orjson.dumps({"role": "user", "content": text}) + b"]}"
        return self.router.route(self.registry.snapshot, Need("m", "generate", 10, body=body))

    def holders(self, hashes: list[int]) -> list[str]:
        return [engine.key for engine in holders_of(self.registry.prefixes.trail(hashes).held)]


@asynccontextmanager
async def workers(valkey: Redis, settings: Settings, clock: Any) -> AsyncIterator[tuple[Worker, Worker]]:
    one, two = (Worker(name, valkey, settings, clock) for name in ("one", "two"))
    tasks = [asyncio.create_task(worker.share.run()) for worker in (one, two)]
    try:
        await eventually(lambda: _subscribed(valkey))
        yield one, two
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _subscribed(valkey: Redis) -> bool:
    ((_, count),) = await valkey.pubsub_numsub(CHANNEL)
    return bool(count >= 2)


@pytest.fixture
async def pair(valkey, settings, clock) -> AsyncIterator[tuple[Worker, Worker]]:
    async with workers(valkey, settings, clock) as made:
        yield made


async def test_a_prompt_goes_where_another_worker_sent_it_and_not_to_its_home(pair):
    one, two = pair
    text = "x" * 5000
    home = one.route(text)
    home.load.turns = home.load.tokens = 10**6  # so the next one begins elsewhere
    elsewhere = one.route(text)
    assert elsewhere is not home
    await eventually(lambda: len(two.registry.prefixes) and not one.registry.prefixes.news)
    busy = two.registry.engine(home.key)
    assert busy is not None
    busy.load.turns = busy.load.tokens = 10**6
    for _ in range(20):  # by chance alone it would be one in sixteen each time
        assert two.route(text).key == elsewhere.key
    assert not two.registry.prefixes.news, "what was learnt is not told on"


@pytest.mark.parametrize(
    "message",
    [
        b"", b"{", b"7", b"[]", b"[1,2]", b'["three",{"a":1}]', b'["three",[7,"x",[]]]', b'["three",[["n1/e1",1,[]]]]',
        b'["three",[["n1/e1",-1,[5]],["n1/e1",1.5,[5]],["n1/e1",1,["5"]],["n1/e1",true,[5]],["n1/gone",1,[5]]]]',
        orjson.dumps(["three", [["n1/e1", 1, [5] * (len(ENDS) + 1)]]]), orjson.dumps(["one", [["n1/e1", 1, [5]]]]),
        b"\xff\xfe", b'[["three"],null]',
    ],
)  # fmt: skip
async def test_nonsense_counts_as_nothing(pair, message):
    one, _ = pair
    one.share.learn(message)
    assert len(one.registry.prefixes) == 0
    one.share.learn(orjson.dumps(["three", [["n1/e1", 1, [5]]]]))
    assert one.holders([5]) == ["n1/e1"]


async def test_after_valkey_was_away_workers_tell_each_other_again(private_stores, settings, clock):
    async with (
        open_valkey(private_stores.redis_url, timeout_s=0.2) as valkey,
        workers(valkey, settings, clock) as (one, two),
    ):
        engine = one.registry.snapshot.engines[0]
        kill(private_stores, "valkey")
        one.registry.prefixes.note(engine, beginnings(b"y" * 3000, 0, 1), 750)
        await eventually(lambda: not one.registry.prefixes.news)
        private_stores.restart("valkey")

        def is_known() -> bool:
            one.registry.prefixes.forget(engine)
            one.registry.prefixes.note(engine, [7], 256)
            return bool(two.holders([7]))

        await eventually(is_known)


async def test_a_worker_alone_keeps_no_news_until_another_comes(valkey, settings, clock, monkeypatch):
    monkeypatch.setattr("nodes.placements.CHANNEL", "where nobody else listens")
    one, two = (Worker(name, valkey, settings, clock) for name in ("one", "two"))
    tasks = [asyncio.create_task(one.share.run())]
    try:
        one.route("x" * 5000)
        await eventually(lambda: not one.registry.prefixes.has_others)
        one.route("y" * 5000)
        assert not one.registry.prefixes.news
        tasks.append(asyncio.create_task(two.share.run()))
        await eventually(lambda: one.registry.prefixes.has_others)
        one.route("z" * 5000)
        await eventually(lambda: len(two.registry.prefixes))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
