"""Turns that find every engine full wait in fair order, are told their place, and are refused when it takes too long."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import aiohttp
import asyncpg
import pytest
from redis.asyncio import Redis

from billing.money import NANO
from config.defaults import Settings
from config.metrics import Metrics
from gateway.errors import NoNodeAvailable
from gateway.identity.accounts import AccountStore
from gateway.identity.keys import KeyStore
from gateway.identity.secrets import load_pepper
from gateway.waiting.queue import TurnQueue
from gateway.waiting.sharing import QUEUES, QueueShare
from nodes.networks import AllowedNetworks
from nodes.registry import Registry
from nodes.routing.router import Need, NoEngine
from nodes.routing.snapshot import Engine
from tests.fakes.engine import FakeEngine
from tests.gateways import MODEL, TestGateway, running_gateway
from tests.waiting import eventually

pytest_plugins = ["tests.fakes.engine_fixtures"]

CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
STREAM = CHAT | {"stream": True}
PATH = "/v1/chat/completions"


@asynccontextmanager
async def full_gateway(
    settings: Settings, pool: asyncpg.Pool, engine: FakeEngine, **changes: Any
) -> AsyncIterator[tuple[TestGateway, "asyncio.Task[aiohttp.ClientResponse]"]]:
    """One engine that takes one turn, and that turn in flight until `/_fake/go`."""
    settings = dataclasses.replace(settings, **({"engine_turns_max": 1, "queue_retry_s": 0.02} | changes))
    async with running_gateway(settings, pool) as gateway:
        await gateway.register(engine.url)
        first = asyncio.create_task(gateway.post(PATH, STREAM))
        await engine.until(lambda record: record["running"] == 1)
        yield gateway, first
        if not first.done():
            await first


@pytest.fixture
async def slow(engines: Any) -> FakeEngine:
    """It goes on when told to."""
    return await engines(lockstep=1)


async def go(engine: FakeEngine) -> None:
    """Let everything that is in it, and what comes, run to its end."""
    await engine.knobs(lockstep=None)
    for _ in range(10):
        await engine.ask("POST", "/_fake/go", {"events": 100})


def queue_of(gateway: TestGateway) -> Any:
    return gateway.gateway.placement.queue


async def another_key(gateway: TestGateway, settings: Settings, name: str) -> dict[str, str]:
    account = await AccountStore(gateway.pool).create(name, balance_nano=100 * NANO)
    _, key = await KeyStore(gateway.pool, load_pepper(settings)).create(account.id, prefix="sk-pg-")
    return {"authorization": f"Bearer {key}"}


@pytest.mark.parametrize("body", [CHAT, STREAM])
async def test_a_turn_waits_for_a_full_engine_and_is_served_when_it_is_free(settings, pool, slow, body):
    async with full_gateway(settings, pool, slow) as (gateway, first):
        second = asyncio.create_task(gateway.post(PATH, body))
        await eventually(lambda: queue_of(gateway).waiting == 1)
        assert len(await slow.requests()) == 1, "it waits here, not there"
        await go(slow)
        reply = await second
        assert reply.status == 200
        assert b"content" in await reply.read()
        assert (await first).status == 200
        records = await gateway.settled(2)
        assert [record.outcome for record in records] == ["finished", "finished"]
        assert queue_of(gateway).waiting == 0
        metrics = (await (await gateway.http.get(gateway.url + "/metrics")).read()).decode()
        assert 'poolgate_queue_turns_total{result="served"} 1.0' in metrics
        assert "poolgate_queue_wait_seconds_count 1.0" in metrics


async def test_a_waiting_stream_is_told_its_position(settings, pool, slow):
    async with full_gateway(settings, pool, slow, keepalive_comment_s=0.05) as (gateway, _):
        replies = [asyncio.create_task(gateway.post(PATH, STREAM)) for _ in range(2)]
        lines = [await (await reply).content.readline() for reply in replies]
        assert sorted(lines) == [b": queued, position 1\n", b": queued, position 2\n"]
        await go(slow)
        for reply in replies:
            assert b"data: [DONE]" in await (await reply).read()
        await gateway.settled(3)


async def test_a_client_that_leaves_frees_its_place(settings, pool, slow):
    async with full_gateway(settings, pool, slow) as (gateway, _):
        leaving = asyncio.create_task(gateway.post(PATH, CHAT))
        await eventually(lambda: queue_of(gateway).waiting == 1)
        leaving.cancel()
        await eventually(lambda: queue_of(gateway).waiting == 0)
        records = await gateway.settled(1)
        assert (records[0].outcome, records[0].amount_nano) == ("client_gone", 0)
        await go(slow)
        await gateway.settled(2)


async def test_past_its_time_a_turn_gets_503_with_retry_after_and_pays_nothing(settings, pool, slow):
    async with full_gateway(settings, pool, slow, queue_wait_s=0.1) as (gateway, _):
        reply = await gateway.post(PATH, CHAT)
        assert reply.status == 503
        assert int(reply.headers["retry-after"]) >= 1
        assert (await reply.json())["error"]["code"] == "no_node_available"
        (record,) = await gateway.settled(1)
        assert (record.outcome, record.status, record.amount_nano) == ("refused", 503, 0)
        await go(slow)
        await gateway.settled(2)


async def test_a_stream_that_was_told_its_position_gets_an_error_event_when_its_time_is_over(
    settings, pool, slow
):
    bounds = {"queue_wait_s": 0.3, "keepalive_comment_s": 0.05}
    async with full_gateway(settings, pool, slow, **bounds) as (gateway, _):
        reply = await gateway.post(PATH, STREAM)
        said = await reply.read()
        assert reply.status == 200
        assert said.startswith(b": queued, position 1\n\n")
        assert b'"code":"no_node_available"' in said
        assert b"[DONE]" not in said
        await go(slow)
        await gateway.settled(2)


async def test_past_the_bound_whoever_has_most_turns_waiting_gives_one_up(settings, pool, slow):
    async with full_gateway(settings, pool, slow, queue_turns_max=2) as (gateway, _):
        modest = await another_key(gateway, settings, "modest")
        greedy = [asyncio.create_task(gateway.post(PATH, CHAT)) for _ in range(2)]
        await eventually(lambda: queue_of(gateway).waiting == 2)
        refused = await gateway.post(PATH, CHAT)
        assert refused.status == 503
        mine = asyncio.create_task(gateway.http.post(gateway.url + PATH, json=CHAT, headers=modest))
        done, waiting = await asyncio.wait(greedy, return_when=asyncio.FIRST_COMPLETED)
        assert [task.result().status for task in done] == [503]
        assert queue_of(gateway).waiting == 2
        await go(slow)
        assert (await mine).status == 200
        assert [(await task).status for task in waiting] == [200]
        await gateway.settled(5)


async def test_a_queue_of_none_refuses_at_once(settings, pool, slow):
    async with full_gateway(settings, pool, slow, queue_turns_max=0) as (gateway, _):
        assert (await gateway.post(PATH, CHAT)).status == 503
        await go(slow)
        await gateway.settled(2)


async def test_an_engine_that_says_it_is_full_is_waited_for(settings, pool, engines):
    """vLLM's own bound (--max-num-queued-reqs): as 503, and in a burst as the first event of a 200."""
    engine = await engines("--max-num-queued-reqs", "2", lockstep=1, burst=True)
    settings = dataclasses.replace(settings, queue_retry_s=0.02)
    async with running_gateway(settings, pool) as gateway:
        (key,) = await gateway.register(engine.url)
        busy = [asyncio.create_task(gateway.post(PATH, STREAM)) for _ in range(2)]
        await engine.until(lambda record: record["running"] == 2)
        more = [asyncio.create_task(gateway.post(PATH, body)) for body in (CHAT, STREAM, CHAT)]
        await eventually(lambda: queue_of(gateway).waiting == 3)
        assert gateway.gateway.registry.engine(key).load.cap < 10
        assert not gateway.gateway.registry.engine(key).breaker.failures, "full is not broken"
        await go(engine)
        for reply in [*busy, *more]:
            assert (await reply).status == 200
            await (await reply).read()
        records = await gateway.settled(5)
        assert {record.outcome for record in records} == {"finished"}
        await eventually(lambda: not gateway.gateway.registry.capped)
        assert gateway.gateway.registry.engine(key).load.cap > 10**6


async def test_those_who_wait_are_told_when_the_worker_ends(settings, pool, slow):
    async with full_gateway(settings, pool, slow, shutdown_grace_s=0.0) as (gateway, first):
        waiting = asyncio.create_task(gateway.post(PATH, CHAT))
        await eventually(lambda: queue_of(gateway).waiting == 1)
        await gateway.gateway.stop()
        reply = await waiting
        assert reply.status == 503
        assert (await reply.json())["error"]["code"] == "service_unavailable"
        await (await first).read()
        assert {record.outcome for record in gateway.records} == {"cut"}


class Worker:
    """One worker's queue with its share in Valkey; nobody is handed an engine but `engines`."""

    def __init__(self, name: str, settings: Settings, clock: Any, valkey: Redis) -> None:
        self.registry = Registry(settings, AllowedNetworks("127.0.0.0/8"), clock)
        self.queue = TurnQueue(settings, registry=self.registry, route=self._route, metrics=Metrics())
        self.share = QueueShare(valkey, self.queue, settings, name)
        self.engines: list[Any] = []
        self.task = asyncio.create_task(self.share.run())

    def _route(self, need: Need) -> Engine:
        if self.engines:
            return self.engines.pop()
        raise NoEngine(need.model, is_known=True, is_full=True)

    def turn(self, account: int) -> Any:
        return SimpleNamespace(
            principal=SimpleNamespace(account_id=account), duration_ms=0, request_id="req_1", told={}, was_next=False,
            ask=SimpleNamespace(time_limit_s=None, price_percent=100, tap=None, gathers=False),
        )  # fmt: skip

    def wait(self, account: int, turn: Any = None) -> "asyncio.Task[Engine]":
        turn = turn or self.turn(account)
        return asyncio.create_task(self.queue.place(turn, Need("m", "generate", 100), SimpleNamespace()))


@asynccontextmanager
async def workers(settings: Settings, clock: Any, valkey: Redis) -> AsyncIterator[list[Worker]]:
    both = [Worker(name, settings, clock, valkey) for name in ("one", "two")]
    waiting: list[asyncio.Task[Engine]] = []
    for each in both:
        wait = each.wait
        each.wait = lambda account, wait=wait: (waiting.append(wait(account)), waiting[-1])[1]  # type: ignore
    try:
        yield both
    finally:
        for task in [*waiting, *(each.task for each in both)]:
            task.cancel()
        await asyncio.gather(*waiting, *(each.task for each in both), return_exceptions=True)


async def test_the_bound_is_one_for_all_workers(settings, clock, valkey):
    settings = dataclasses.replace(settings, queue_turns_max=3)
    async with workers(settings, clock, valkey) as (one, two):
        one.wait(1)
        one.wait(1)
        two.wait(2)
        await eventually(lambda: (one.queue.others, two.queue.others) == (1, 2))
        with pytest.raises(NoNodeAvailable) as refused:
            await two.wait(2)
        assert refused.value.retry_after_s


async def test_what_an_account_gets_from_one_worker_is_owed_in_the_other(settings, clock, valkey):
    async with workers(settings, clock, valkey) as (one, two):
        for each in (one, two):
            each.wait(1)
            each.wait(2)
        await eventually(lambda: (one.queue.others, two.queue.others) == (2, 2))
        one.queue.served[1] = 5_000
        (((waiting, _)),) = two.queue._lines.values()
        owed = waiting.charge
        charged: list[tuple[object, int]] = []
        waiting.charge = lambda *what: (charged.append(what), owed(*what))
        await eventually(lambda: charged == [(1, 5_000)])


async def test_a_turn_whose_engine_had_no_room_after_all_is_counted_once(settings, clock, valkey):
    worker = Worker("one", settings, clock, valkey)
    turn, engine = worker.turn(1), SimpleNamespace(began=lambda tokens: None, ended=lambda tokens: None)
    for _ in range(3):
        worker.engines.append(engine)
        assert await worker.wait(1, turn) is engine
        assert turn.was_next
    assert worker.queue.take_served() == {1: 100}
    worker.task.cancel()


@pytest.mark.parametrize(("tap", "comments_max"), [(None, 0), (object(), 3)], ids=["plain", "stream"])
async def test_a_timer_that_rings_early_has_nobody_told_anything(settings, clock, valkey, tap, comments_max):
    """A plain answer has a status of its own, which a comment would take away."""
    settings = dataclasses.replace(settings, queue_wait_s=0.2, keepalive_comment_s=0.06)
    worker = Worker("one", settings, clock, valkey)
    time_s, begun_s = worker.queue._time, worker.queue._time()
    worker.queue._time = lambda: begun_s + (time_s() - begun_s) * 0.9
    said: list[bytes] = []
    down: Any = SimpleNamespace(is_gone=False, is_started=True, write=said.append)
    turn = worker.turn(1)
    turn.ask.tap = tap
    with pytest.raises(NoNodeAvailable):
        await worker.queue.place(turn, Need("m", "generate", 100), down)
    assert len(said) <= comments_max
    assert bool(said) == bool(tap)
    worker.task.cancel()


async def test_a_worker_that_is_gone_or_a_valkey_that_is_away_leaves_each_queue_to_itself(
    settings, clock, valkey
):
    async with workers(settings, clock, valkey) as (one, two):
        one.wait(1)
        two.wait(1)
        await eventually(lambda: two.queue.others == 1)
        one.task.cancel()  # as if killed: its entry stays as it was
        await eventually(lambda: two.queue.others == 0)
        assert await valkey.hlen(QUEUES) == 2
        one.task = asyncio.create_task(one.share.run())
        await eventually(lambda: two.queue.others == 1)
        await valkey.delete(QUEUES)
        await valkey.set(QUEUES, "nonsense")  # every command on it fails now
        await eventually(lambda: two.queue.others == 0)
        assert two.queue.waiting == 1
