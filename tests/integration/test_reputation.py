"""Reputation and the comparison of counts, over a real PostgreSQL and a real gateway."""

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from config.metrics import Metrics
from gateway.caretaker import LOCK
from gateway.reputation import ReputationChore
from gateway.tally import Tally
from nodes.reputation import ReputationStore
from tests.fakes.provider_client import ProviderClient, registered
from tests.gateways import MODEL, TestGateway, running_gateway
from tests.waiting import eventually

ASK = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}


@pytest.fixture
async def gw(settings, pool, monkeypatch) -> AsyncIterator[TestGateway]:
    """One whose turns are told at once; reputation is brought up to date by the tests alone. A caretaker does it at its
    start too, so another holds that office.
    """
    monkeypatch.setattr("gateway.app.TALLY_S", 0.02)
    own = replace(settings, developer_mode=True, heartbeat_grace_s=2.0)
    async with pool.acquire() as elsewhere:
        assert await elsewhere.fetchval("select pg_try_advisory_lock($1)", LOCK)
        async with running_gateway(own, pool) as running:
            yield running


@pytest.fixture
async def node(gw) -> ProviderClient:
    return await registered(gw)


def chore(gw: TestGateway, metrics: Metrics, **changes: Any) -> ReputationChore:
    own = replace(gw.gateway.settings, **{"reputation_s": 600.0, "usage_check_s": 0.05} | changes)
    return ReputationChore(gw.pool, own, metrics)


async def ago(gw: TestGateway, seconds: float) -> None:
    """Every node was last heard of that much longer ago."""
    await gw.pool.execute("update node_facts set heard_at = heard_at - make_interval(secs => $1)", seconds)


async def test_uptime_is_the_share_of_time_in_which_a_node_was_heard_of(gw, node):
    await node.beat()
    await ago(gw, 1.0)
    await node.beat()
    await ago(gw, 1000.0)
    await node.beat()  # only its grace (2 s) counts as heard of
    assert await gw.pool.fetchval("select up_s from node_facts") == pytest.approx(3.0, abs=0.3)
    await gw.pool.execute("update node_facts set rolled_at = clock_timestamp() - interval '10 s'")
    await chore(gw, Metrics()).run()
    me = await node.me()
    assert me["uptime_percent"] == pytest.approx(30, abs=4)
    assert me["reliability_score"] == me["uptime_percent"]
    assert await gw.pool.fetchval("select up_s from node_facts") == 0


async def test_time_in_which_nobody_listened_is_no_nodes_fault(gw, node):
    await node.beat()
    await gw.pool.execute(
        "update node_facts set up_s = 600, rolled_at = clock_timestamp() - interval '5 days'"
    )
    await chore(gw, Metrics()).run()
    assert await gw.pool.fetchval("select watched_s from provider_days") == pytest.approx(1800)


async def test_a_node_that_was_taken_away_is_forgiven(gw, node):
    await node.beat()
    await ago(gw, 8 * 86400)
    await chore(gw, Metrics()).run()
    assert await gw.pool.fetchval("select count(*) from provider_days") == 0


async def test_turns_and_faults_make_the_score(gw, node, engine):
    await node.beat(engine.url)
    await eventually(node.is_routed)
    for _ in range(3):
        async with await gw.post("/v1/chat/completions", ASK) as reply:
            assert reply.status == 200
            await reply.read()
    await gw.settled(3)
    failing = gw.gateway.registry.engine(node.engine_key)
    assert failing is not None
    gw.gateway.registry.engine_failed(failing)

    async def is_told() -> bool:
        row = await gw.pool.fetchrow("select turns, faults from provider_days")
        return row is not None and (row["turns"], row["faults"]) == (3, 1)

    await eventually(is_told)
    # More than the whole time counts as all of it, also when some passes meanwhile.
    await gw.pool.execute("update node_facts set up_s = 90, rolled_at = clock_timestamp() - interval '60 s'")
    await chore(gw, Metrics()).run()
    me = await node.me()
    assert (me["total_jobs"], me["uptime_percent"]) == (3, 100.0)
    assert me["reliability_score"] == round(100 * 23 / 24, 2)


async def test_the_caretaker_keeps_reputation_up_to_date(settings, pool):
    async with running_gateway(replace(settings, developer_mode=True, reputation_s=0.1), pool) as gw:
        node = await registered(gw)

        async def is_judged() -> bool:
            await node.beat()
            return bool((await node.me())["uptime_percent"])

        await eventually(is_judged)


async def test_what_was_counted_is_kept_while_postgres_is_away(gw, node, engine, monkeypatch):
    await node.beat(engine.url)
    await eventually(node.is_routed)
    store = ReputationStore(gw.pool)
    tally = Tally(store, 1.0)
    failing = gw.gateway.registry.engine(node.engine_key)
    assert failing is not None
    tally.count_fault(failing)

    async def away(*_: object) -> None:
        raise OSError("away")

    with monkeypatch.context() as patch:
        patch.setattr(store, "add", away)
        await tally.flush()
    tally.count_fault(failing)
    await tally.flush()
    assert await gw.pool.fetchval("select faults from provider_days") == 2


# --- what engines report ---------------------------------------------------------------------------------------------


async def reports(node: ProviderClient, url: str, prompt: int, completion: int) -> None:
    engine = {
        "engine_id": "e0", "url": url, "state": "ready", "prompt_tokens": prompt, "completion_tokens": completion,
        "models": [{"id": MODEL, "context_length": 2048, "kind": "generate", "parent": None}],
    }  # fmt: skip
    assert (await node.beat(engines=[engine]))[0] == 200


async def compared(gw: TestGateway, metrics: Metrics) -> tuple[float, float, list[str]]:
    """Compare now: tokens that engines hide, those that they claim, and what was told about it."""
    await gw.pool.execute("update engine_usage set checked_at = checked_at - interval '1 hour'")
    await gw.pool.execute("delete from daemon_events")
    await chore(gw, metrics).run()
    rows = await gw.pool.fetch(
        "select details from daemon_events where event_type = 'usage_differs' order by id"
    )
    counted = [
        metrics.usage_differences.labels("completion", direction)._value.get()
        for direction in ("unreported", "unrelayed")
    ]
    return counted[0], counted[1], [row["details"] for row in rows]


async def relayed(gw: TestGateway, prompt: int, completion: int) -> None:
    await gw.pool.execute(
        "update engine_usage set relayed_prompt = relayed_prompt + $1, relayed_completion = relayed_completion + $2",
        prompt, completion,
    )  # fmt: skip


async def test_counts_that_fit_what_was_relayed_say_nothing(gw, node, engine):
    metrics = Metrics()
    await reports(node, engine.url, 5_000_000, 7_000_000)  # before it was known: counts for nothing
    await relayed(gw, 100_000, 50_000)
    await reports(node, engine.url, 5_110_000, 7_052_000)
    assert await compared(gw, metrics) == (0, 0, [])


async def test_an_engine_that_hides_or_invents_tokens_is_told_and_counted(gw, node, engine):
    metrics = Metrics()
    await reports(node, engine.url, 0, 0)
    await relayed(gw, 0, 100_000)
    await reports(node, engine.url, 0, 40_000)
    hidden, claimed, told = await compared(gw, metrics)
    assert (hidden, claimed) == (60_000, 0)
    assert told == ["engine e0: it reports 40,000 completion tokens, relayed were 100,000"]
    _, logs = await node.get("daemon-logs?severity=warning")
    assert logs["events"][0]["node_id"] == node.node_id
    await reports(node, engine.url, 0, 140_000)
    hidden, claimed, told = await compared(gw, metrics)
    assert (hidden, claimed, len(told)) == (60_000, 100_000, 1)
    assert await compared(gw, metrics) == (60_000, 100_000, []), "each difference is told once"


async def test_an_engine_that_starts_anew_counts_from_zero(gw, node, engine):
    await reports(node, engine.url, 0, 1_000)
    await reports(node, engine.url, 0, 31_000)
    await reports(node, engine.url, 0, 5_000)
    row = await gw.pool.fetchrow("select reported_completion, counter_completion from engine_usage")
    assert tuple(row) == (35_000, 5_000)


async def test_turns_count_for_the_engine_that_served_them(gw, node, engine):
    await node.beat(engine.url)
    await eventually(node.is_routed)
    async with await gw.post("/v1/chat/completions", ASK) as reply:
        usage = (await reply.json())["usage"]

    async def is_told() -> bool:
        row = await gw.pool.fetchrow("select relayed_prompt, relayed_completion from engine_usage")
        return row is not None and tuple(row) == (usage["prompt_tokens"], usage["completion_tokens"])

    await eventually(is_told)
    assert await gw.pool.fetchval("select counter_prompt from engine_usage") is None


async def test_an_engine_that_never_tells_is_never_odd(gw, node, engine):
    await node.beat(engine.url)
    await eventually(node.is_routed)
    async with await gw.post("/v1/chat/completions", ASK) as reply:
        await reply.read()

    async def is_told() -> bool:
        return bool(await gw.pool.fetchval("select count(*) from engine_usage"))

    await eventually(is_told)
    await relayed(gw, 10**9, 10**9)
    assert await compared(gw, Metrics()) == (0, 0, [])
