"""Health, liveness and readiness: the contracts' shapes, from memory, also while the stores hang."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from gateway.health import Component, overall
from tests.fakes.stores import frozen, kill, using
from tests.gateways import MODEL, TestGateway, running_gateway
from tests.waiting import eventually

STATUSES = ("healthy", "unhealthy", "degraded")
PROBES = ("/health", "/api/health", "/ready", "/metrics")
ASK = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
# A probe's answer is awaited this long: kubelet's default is 1 s.
PROBE_S = 1.0


@pytest.fixture
async def gw(settings, pool) -> AsyncIterator[TestGateway]:
    async with running_gateway(settings, pool) as running:
        yield running


async def ask(gw: TestGateway, path: str) -> tuple[int, Any]:
    async with gw.http.get(gw.url + path, timeout=aiohttp.ClientTimeout(PROBE_S)) as reply:
        body = await reply.read()
        return reply.status, json.loads(body) if reply.content_type == "application/json" else body


async def components(gw: TestGateway) -> dict[str, Any]:
    """Of /health, by name; held against data-generation.json's ServiceHealthResponse."""
    status, body = await ask(gw, "/health")
    assert set(body) == {"overall_status", "components"}
    assert body["overall_status"] in STATUSES
    assert status == (503 if body["overall_status"] == "unhealthy" else 200)
    for component in body["components"]:
        assert isinstance(component["name"], str)
        assert component["status"] in STATUSES
        assert component["message"] is None or isinstance(component["message"], str)
        assert component["details"] is None or isinstance(component["details"], dict)
    named = {component["name"]: component for component in body["components"]}
    return named | {"overall": body["overall_status"]}


def reports(gw: TestGateway, name: str, status: str) -> Any:
    async def is_so() -> bool:
        found = await components(gw)
        return (found[name]["status"] if name != "overall" else found["overall"]) == status

    return is_so


async def test_without_an_engine_it_is_degraded_and_with_one_healthy(gw, engine):
    found = await components(gw)
    assert (found["overall"], found["nodes"]["status"]) == ("degraded", "degraded")
    assert found["nodes"]["message"] == "no engine can take a turn"
    await gw.register(engine.url)
    found = await components(gw)
    assert found["overall"] == "healthy"
    assert found["nodes"]["details"] == {"nodes_online": 1, "engines_ready": 1, "breakers_open": 0}
    assert {"application", "database", "cache", "nodes", "metering"} == found.keys() - {"overall"}


async def test_an_engine_with_an_open_breaker_does_not_count(gw, engine):
    await gw.register(engine.url)
    await engine.kill()
    for _ in range(3):
        (await gw.post("/v1/chat/completions", ASK)).close()
    found = await components(gw)
    assert found["nodes"]["status"] == "degraded"
    assert found["nodes"]["details"]["breakers_open"] == 1


async def test_usage_that_can_not_be_written_any_more_is_unhealthy(gw, engine, monkeypatch):
    await gw.register(engine.url)
    monkeypatch.setattr(gw.gateway.health, "_is_full", lambda: True)
    found = await components(gw)
    assert (found["overall"], found["metering"]["status"]) == ("unhealthy", "unhealthy")


async def test_liveness_has_the_fields_of_both_contracts(gw):
    status, body = await ask(gw, "/api/health")
    assert status == 200
    assert {name: type(value) for name, value in body.items()} == {
        "status": str, "service": str, "mode": str, "timestamp": str, "uptime_seconds": float,
    }  # fmt: skip
    assert (body["status"], body["mode"]) == ("ok", "headless")
    assert body["timestamp"].endswith("Z")


async def test_it_is_ready_once_the_change_log_was_read_and_not_while_it_drains(gw, monkeypatch):
    await eventually(lambda: gw.gateway.health.is_ready)
    assert await ask(gw, "/ready") == (200, {"ready": True})
    with monkeypatch.context() as patch:
        patch.setattr(gw.gateway.health, "is_draining", True)
        assert await ask(gw, "/ready") == (503, {"ready": False})
        assert (await ask(gw, "/api/health"))[0] == 200, "it lives"


async def test_a_frozen_postgres_degrades_and_every_probe_answers_at_once(settings, private_stores, engine):
    async with using(private_stores, settings) as (own, pool), running_gateway(own, pool) as gw:
        await gw.register(engine.url)
        (await gw.post("/v1/chat/completions", ASK)).close()  # the key is known now
        await eventually(reports(gw, "overall", "healthy"))
        with frozen(private_stores, "postgres"):
            await eventually(reports(gw, "database", "degraded"))
            for _ in range(5):
                answers = await asyncio.gather(*(ask(gw, path) for path in PROBES))
                assert [status for status, _ in answers] == [200] * 4
            async with await gw.post("/v1/chat/completions", ASK) as reply:
                assert reply.status == 200, "serving goes on"
        await eventually(reports(gw, "overall", "healthy"))
        await eventually(lambda: gw.gateway.money.journal.pending == 0)
        assert await pool.fetchval("select count(*) from usage") == 2


@pytest.mark.parametrize("how", ["frozen", "killed"])
async def test_without_valkey_it_is_degraded_and_serves(settings, private_stores, engine, how):
    async with using(private_stores, settings) as (own, pool), running_gateway(own, pool) as gw:
        await gw.register(engine.url)

        async def goes_on() -> None:
            await eventually(reports(gw, "cache", "degraded"))
            assert [(await ask(gw, path))[0] for path in PROBES] == [200] * 4
            async with await gw.post("/v1/chat/completions", ASK) as reply:
                assert reply.status == 200

        if how == "frozen":
            with frozen(private_stores, "valkey"):
                await goes_on()
        else:
            kill(private_stores, "valkey")
            await goes_on()
            private_stores.restart("valkey")
        await eventually(reports(gw, "overall", "healthy"))


async def test_a_killed_postgres_degrades_until_it_is_back(settings, private_stores):
    async with using(private_stores, settings) as (own, pool), running_gateway(own, pool) as gw:
        await eventually(lambda: gw.gateway.health.is_ready)
        kill(private_stores, "postgres")
        await eventually(reports(gw, "database", "degraded"))
        assert (await ask(gw, "/ready"))[0] == 200, "known keys are served"
        private_stores.restart("postgres")
        await eventually(reports(gw, "database", "healthy"))


@pytest.mark.parametrize(
    ("states", "worst"),
    [
        (["healthy"], "healthy"),
        (["healthy", "degraded"], "degraded"),
        (["degraded", "unhealthy", "healthy"], "unhealthy"),
        ([], "healthy"),
    ],
)
def test_the_whole_is_as_well_as_its_worst_part(states, worst):
    assert overall([Component("x", state) for state in states]) == worst
