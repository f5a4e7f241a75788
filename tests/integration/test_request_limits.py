"""Limits of the provider API: the contract's table, by address, key and node, over Valkey and without it."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from gateway.errors import RateLimited
from gateway.request_limits import RequestLimits, Rule
from tests.fakes.provider_client import REGISTRATION, ProviderClient, call, registered
from tests.fakes.stores import kill, using
from tests.gateways import TestGateway, running_gateway
from tests.waiting import eventually


@pytest.fixture
async def gw(settings, pool) -> AsyncIterator[TestGateway]:
    """One with the contract's limits, behind a proxy that tells whom it speaks for."""
    own = replace(
        settings, developer_mode=True, trusted_proxies="127.0.0.0/8", heartbeat_requests_minute=4,
        heartbeat_interval_s=30.0, heartbeat_grace_s=90.0, api_requests_minute=300, marketplace_requests_minute=30,
    )  # fmt: skip
    async with running_gateway(own, pool) as running:
        yield running


async def statuses(gw: TestGateway, times: int, method: str, path: str, **of: Any) -> list[int]:
    return [(await call(gw, method, path, of.get("body"), **of.get("headers", {})))[0] for _ in range(times)]


def from_(address: str) -> dict[str, str]:
    return {"x_forwarded_for": address}


async def test_five_registrations_an_hour_from_one_address(gw):
    for number in range(6):
        body = REGISTRATION | {"email": f"p{number}@example.sa"}
        status, answer = await call(gw, "POST", "/api/providers/register", body, **from_("192.0.2.1"))
        assert status == (200 if number < 5 else 429), answer
    other = REGISTRATION | {"email": "other@example.sa"}
    assert (await call(gw, "POST", "/api/providers/register", other, **from_("192.0.2.2")))[0] == 200


async def test_a_refusal_has_the_surfaces_shape_and_says_when_to_come_again(gw):
    path = "/api/providers/marketplace"
    assert await statuses(gw, 30, "GET", path) == [200] * 30
    async with gw.http.get(gw.url + path) as reply:
        body = await reply.json()
        assert (reply.status, body.keys()) == (429, {"error", "request_id"})
        assert 1 <= int(reply.headers["retry-after"]) <= 60
    assert (await call(gw, "GET", "/api/providers/public"))[0] == 200, (
        "each row of the table counts for itself"
    )


async def test_a_neighbour_in_the_same_ipv6_network_is_the_same_address(gw):
    path = "/api/providers/marketplace"
    assert await statuses(gw, 30, "GET", path, headers=from_("2001:db8:1:2::1")) == [200] * 30
    assert (await call(gw, "GET", path, **from_("2001:db8:1:2:ffff::9")))[0] == 429
    assert (await call(gw, "GET", path, **from_("2001:db8:1:3::1")))[0] == 200


async def test_an_admin_s_address_has_a_hundred_requests_a_minute(gw):
    path = "/api/admin/providers/1/approve"
    assert set(await statuses(gw, 100, "POST", path)) == {401}
    assert await statuses(gw, 1, "POST", path) == [429]


async def test_a_key_has_no_more_from_many_addresses_than_from_one(settings, pool):
    own = replace(settings, developer_mode=True, trusted_proxies="127.0.0.0/8", api_requests_minute=10)
    async with running_gateway(own, pool) as gw:
        node = await registered(gw)
        found = [
            (await call(gw, "GET", "/api/providers/me", x_provider_key=node.key, **from_(f"192.0.2.{n}")))[0]
            for n in range(12)
        ]
        assert found == [200] * 10 + [429] * 2
        assert await statuses(gw, 12, "GET", "/api/providers/public", headers=from_("198.51.100.1")) == (
            [200] * 10 + [429] * 2
        )


async def test_heartbeats_count_by_node_and_not_by_address(gw):
    one, two = await registered(gw), await registered(gw, email="two@example.sa")
    assert [(await one.beat())[0] for _ in range(5)] == [200] * 4 + [429]
    assert (await two.beat())[0] == 200
    again = ProviderClient(gw, one.id, one.key)  # another node of the same provider, from the same address
    assert (await again.beat())[0] == 200


async def test_our_own_agent_may_tell_news_beside_the_contracts_beats(gw):
    node = await registered(gw)
    found = [(await node.beat("http://127.0.0.1:9001", agent_version="0.1.0"))[0] for _ in range(21)]
    assert found == [200] * 20 + [429]


async def test_heartbeats_with_bad_keys_count_by_address(gw):
    bad = {"api_key": "dc1-provider-wrong"}
    assert await statuses(gw, 5, "POST", "/api/providers/heartbeat", body=bad) == [401] * 4 + [429]
    assert await statuses(
        gw, 1, "POST", "/api/providers/heartbeat", body=bad, headers=from_("192.0.2.9")
    ) == [401]
    node = await registered(gw)
    assert (await node.beat())[0] == 200, "good ones from there are another matter"


async def test_health_and_documents_are_not_counted(settings, pool):
    async with running_gateway(replace(settings, api_requests_minute=1), pool) as gw:
        assert await statuses(gw, 5, "GET", "/api/health") == [200] * 5


async def test_a_window_slides(valkey, settings):
    limits = RequestLimits(valkey, settings)
    rule = Rule("test", 2, 0.3)
    await limits.admit(rule, "s")
    await limits.admit(rule, "s")
    with pytest.raises(RateLimited) as raised:
        await limits.admit(rule, "s")
    assert raised.value.retry_after_s == 1

    async def has_room() -> bool:
        try:
            await limits.admit(rule, "s")
        except RateLimited:
            return False
        return True

    await eventually(has_room)
    await limits.admit(rule, "other")


async def test_requests_at_once_are_never_over(valkey, settings):
    limits = RequestLimits(valkey, settings)
    found = await asyncio.gather(
        *(limits.admit(Rule("test", 7, 600), "s") for _ in range(30)), return_exceptions=True
    )
    assert [each is None for each in found].count(True) == 7


async def test_without_valkey_a_process_counts_alone(settings, private_stores):
    async with (
        using(private_stores, settings, marketplace_requests_minute=3) as (own, pool),
        running_gateway(own, pool) as gw,
    ):
        kill(private_stores, "valkey")
        found = await statuses(gw, 5, "GET", "/api/providers/marketplace")
        assert found == [200] * 3 + [429] * 2
