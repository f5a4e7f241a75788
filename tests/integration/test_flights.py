"""Turns that take no task: sent off on a warm connection, they come back through callbacks; on a new one once it is made.

Whatever way such a turn ends, it is what a turn in a task would have come to, and nothing of it is left.
"""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import aiohttp
import pytest

from tests.gateways import MODEL, TestGateway, running_gateway
from tests.waiting import eventually

PATH = "/v1/chat/completions"
ASK = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}


@pytest.fixture
async def gw(settings, pool) -> AsyncIterator[TestGateway]:
    async with running_gateway(settings, pool) as running:
        yield running


async def warmed(gw: TestGateway, *engines) -> None:
    """Every engine has answered once, so each has an idle connection."""
    await gw.register(*(engine.url for engine in engines))
    pools = gw.gateway.lifecycle.upstreams._pools

    async def is_warm() -> bool:
        async with await gw.post(PATH, ASK) as reply:
            assert reply.status == 200
            await reply.read()
        return len(pools) == len(engines) and all(pool._idle for pool in pools.values())

    await eventually(is_warm)
    gw.records.clear()


def flights(gw: TestGateway) -> int:
    return len(gw.gateway.lifecycle._dispatcher.flights)


def nothing_is_left(gw: TestGateway) -> bool:
    engines = gw.gateway.registry.snapshot.engines
    return gw.gateway.lifecycle.in_flight == 0 and all(
        (engine.load.turns, engine.load.tokens) == (0, 0) for engine in engines
    )


async def test_a_warm_whole_answer_takes_no_task(gw, engines):
    engine = await engines()
    await warmed(gw, engine)
    await engine.knobs(ttft_ms=60_000)
    asking = asyncio.create_task(gw.post(PATH, ASK))
    await eventually(lambda: flights(gw) == 1)
    assert gw.gateway.lifecycle._running == set()
    assert gw.gateway.lifecycle.in_flight == 1
    asking.cancel()
    await eventually(lambda: nothing_is_left(gw))


async def test_a_stream_takes_a_task_only_until_it_is_under_way(gw, engine):
    await engine.knobs(pace_ms=60_000)
    await gw.register(engine.url)
    for _ in range(2):  # on a new connection, then on an idle one beside it
        reply = await gw.post(PATH, ASK | {"stream": True})
        assert reply.status == 200
        assert gw.gateway.lifecycle._running == set()
        assert not [task for task in asyncio.all_tasks() if task.get_name() == "turn"]
    assert flights(gw) == gw.gateway.lifecycle.in_flight == 2


async def test_a_client_that_leaves_a_stream_pays_for_what_it_got(gw, engine):
    await warmed(gw, engine)
    await engine.knobs(pace_ms=20)
    reply = await gw.post(PATH, ASK | {"stream": True, "max_tokens": 1500, "ignore_eos": True})
    for _ in range(6):
        await reply.content.readuntil(b"\n\n")
    reply.close()
    (record,) = await gw.settled(1)
    assert (record.outcome, record.status, record.completion_tokens >= 5) == ("client_gone", 499, True)
    assert record.amount_nano > 0
    await engine.until(lambda told: told["requests"][-1]["aborted"])
    assert nothing_is_left(gw)


async def test_a_stream_that_outlives_the_grace_ends_with_an_error_event(settings, pool, engine):
    async with running_gateway(replace(settings, shutdown_grace_s=0.0), pool) as gw:
        await warmed(gw, engine)
        await engine.knobs(pace_ms=60_000)
        reply = await gw.post(PATH, ASK | {"stream": True})
        await reply.content.readuntil(b"\n\n")
        await gw.gateway.stop()
        assert b"service_unavailable" in await reply.content.read()
        assert [record.outcome for record in gw.records] == ["cut"]


async def test_a_flights_answer_is_metered_as_any(gw, engine):
    await warmed(gw, engine)
    async with await gw.post(PATH, ASK) as reply:
        body = await reply.json()
    (record,) = await gw.settled(1)
    assert record.completion_tokens == body["usage"]["completion_tokens"]
    assert (record.outcome, record.status, record.amount_nano > 0) == ("finished", 200, True)
    assert nothing_is_left(gw)


async def test_a_client_that_leaves_ends_the_flight_and_pays_nothing(gw, engine):
    await warmed(gw, engine)
    await engine.knobs(ttft_ms=60_000)
    asking = asyncio.create_task(gw.post(PATH, ASK))
    await eventually(lambda: flights(gw) == 1)
    asking.cancel()
    (record,) = await gw.settled(1)
    assert (record.outcome, record.status, record.amount_nano) == ("client_gone", 499, 0)
    await engine.until(lambda told: told["requests"][-1]["aborted"])
    assert nothing_is_left(gw)


@pytest.mark.parametrize("kind", ["http_error", "error_first", "garbage", "close", "reset", "die"])
async def test_a_flight_that_fails_goes_on_at_another_engine(gw, engines, kind):
    bad, good = await engines(), await engines()
    await warmed(gw, bad, good)
    await bad.fault(kind, after=-1 if kind != "die" else 0, times=None, status=503)
    for _ in range(6):  # which engine is asked first is chance
        async with await gw.post(PATH, ASK) as reply:
            assert reply.status == 200
            await reply.read()
    assert {record.outcome for record in await gw.settled(6)} == {"finished"}
    assert nothing_is_left(gw)


async def test_a_flight_whose_connection_was_closed_meanwhile_costs_nobody_a_turn(settings, pool, engines):
    engine = await engines(keep_alive_ms=100.0)
    async with running_gateway(replace(settings, engine_idle_s=60.0), pool) as gw:
        await warmed(gw, engine)
        (upstream,) = gw.gateway.lifecycle.upstreams._pools.values()
        await eventually(lambda: all(connection.closed for connection, _ in upstream._idle))
        async with await gw.post(PATH, ASK) as reply:
            assert reply.status == 200
        assert not gw.gateway.registry.snapshot.engines[0].breaker.failures


async def test_a_refusal_of_the_engine_reaches_the_client_of_a_flight_and_moves_no_breaker(gw, engine):
    await warmed(gw, engine)
    await engine.fault("http_error", status=400, after=-1)
    async with await gw.post(PATH, ASK) as reply:
        assert (reply.status, (await reply.json())["error"]["type"]) == (400, "invalid_request_error")
    (record,) = await gw.settled(1)
    assert (record.outcome, record.status, record.amount_nano) == ("refused", 400, 0)
    assert gw.gateway.registry.snapshot.engines[0].breaker.failures == 0
    assert nothing_is_left(gw)


async def test_a_flight_that_takes_too_long_is_a_504(settings, pool, engine):
    async with running_gateway(replace(settings, answer_timeout_s=1.0), pool) as gw:
        await warmed(gw, engine)
        await engine.knobs(ttft_ms=60_000)
        async with await gw.post(PATH, ASK) as reply:
            assert (reply.status, (await reply.json())["error"]["code"]) == (504, "engine_timeout")
        (record,) = await gw.settled(1)
        assert record.amount_nano == 0
        assert nothing_is_left(gw)


async def test_a_flight_that_outlives_the_grace_is_a_503(settings, pool, engine):
    async with running_gateway(replace(settings, shutdown_grace_s=0.0), pool) as gw:
        await warmed(gw, engine)
        await engine.knobs(ttft_ms=60_000)
        asking = asyncio.create_task(gw.post(PATH, ASK))
        await eventually(lambda: flights(gw) == 1)
        await gw.gateway.stop()
        reply = await asking
        assert (reply.status, (await reply.json())["error"]["code"]) == (503, "service_unavailable")
        assert [record.outcome for record in gw.records] == ["cut"]


async def test_an_answer_larger_than_its_bound_ends_a_flight(settings, pool, engine):
    async with running_gateway(replace(settings, answer_bytes_max=65536), pool) as gw:
        await warmed(gw, engine)
        await engine.fault("huge", size_bytes=4_000_000)
        async with await gw.post(PATH, ASK) as reply:
            assert (reply.status, (await reply.json())["error"]["code"]) == (502, "engine_failed")
        assert nothing_is_left(gw)


async def test_a_fault_of_ours_in_a_flight_is_a_500_and_ends_the_turn(gw, engine):
    await warmed(gw, engine)
    await engine.knobs(ttft_ms=500)
    asking = asyncio.create_task(gw.post(PATH, ASK))
    await eventually(lambda: flights(gw) == 1)
    (flight,) = gw.gateway.lifecycle._dispatcher.flights
    flight._desk = BrokenDesk(flight._desk)
    async with await asking as reply:
        assert (reply.status, (await reply.json())["error"]["code"]) == (500, "internal_error")
    (record,) = await gw.settled(1)
    assert (record.outcome, record.status, record.amount_nano) == ("crashed", 500, 0)
    assert nothing_is_left(gw)


class BrokenDesk:
    """Another one, until there is an answer."""

    def __init__(self, desk: Any) -> None:
        self._desk = desk

    def __getattr__(self, name: str) -> Any:
        return getattr(self._desk, name)

    def answer(self, *_: object) -> None:
        raise RuntimeError("a fault of ours")


async def test_many_flights_at_once_leave_nothing(gw, engine):
    await warmed(gw, engine)

    async def ask(http: aiohttp.ClientSession) -> int:
        async with http.post(gw.url + PATH, json=ASK, headers=gw.headers) as reply:
            await reply.read()
            return reply.status

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=32)) as http:
        statuses = await asyncio.gather(*(ask(http) for _ in range(400)))
    assert set(statuses) == {200}
    assert len(await gw.settled(400)) == 400
    assert nothing_is_left(gw)
