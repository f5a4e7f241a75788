"""Heartbeats by the batch, in a real PostgreSQL: each is refused for itself, each answered as if it had come alone."""

import asyncio
import uuid
from collections.abc import Sequence
from typing import Any

import asyncpg
import pytest

from gateway.identity.accounts import AccountStore
from nodes import beats
from nodes.control_messages import Progress
from nodes.heartbeats import NodeStore
from nodes.protocol import EngineReport, Heartbeat, ModelInfo
from nodes.providers import UnknownProvider
from nodes.reports import (
    AddressOfAnother,
    NodeFenced,
    NodeLease,
    NodeOfAnother,
    NotApproved,
    Report,
    TooManyNodes,
)
from tests.fakes.stores import kill, using
from tests.gateways import running_gateway
from tests.integration.test_nodes import provider
from tests.waiting import eventually

OWNER, OTHER, PENDING, NOBODY = 1, 2, 3, 99


@pytest.fixture
async def pool(pool) -> asyncpg.Pool:
    """With the providers OWNER and OTHER, and one that is not approved."""
    accounts = AccountStore(pool)
    made = [
        await accounts.create(name, is_provider=True, approval_status=status)
        for name, status in (("owner", "approved"), ("other", "approved"), ("pending", "pending"))
    ]
    assert [account.id for account in made] == [OWNER, OTHER, PENDING]
    return pool


def node(number: int) -> str:
    return str(uuid.UUID(int=number))


def engine(url: str, **of: Any) -> EngineReport:
    model = ModelInfo(id="m", context_length=2048)
    return EngineReport(**{"engine_id": "e0", "url": url, "state": "ready", "models": (model,)} | of)


def report(
    number: int, *engines: EngineReport, owner: int = OWNER, progress: Sequence[Progress] = (), **of: Any
) -> Report:
    beat = Heartbeat(api_key="-", node_id=node(number), engines=engines, **of)
    return Report.of(owner, beat, engines, progress)


async def record(pool: asyncpg.Pool, *reports: Report, nodes_max: int = 100) -> list[Any]:
    """What came of each, in their order: an epoch, or the kind of refusal."""
    found = await beats.record(pool, reports, credit_s=90.0, nodes_max=nodes_max)
    return [each.epoch if isinstance(each, NodeLease) else type(each) for each in (found[r] for r in reports)]


async def hostnames(pool: asyncpg.Pool) -> list[str]:
    return [row["hostname"] for row in await pool.fetch("select hostname from nodes order by id")]


async def test_each_of_a_batch_is_refused_for_itself_and_leaves_nothing(pool):
    before = [report(1, engine("http://127.0.0.1:1"), owner=OTHER), report(2, instance=str(uuid.uuid4()))]
    assert await record(pool, *before) == [1, 1]
    found = await record(
        pool,
        report(9, provider_hostname="nine"),
        report(1, provider_hostname="stolen"),
        report(2, provider_hostname="fenced", instance=str(uuid.uuid4()), epoch=1),
        report(3, engine("http://127.0.0.1:1"), provider_hostname="doubled"),
        report(4, owner=PENDING),
        report(5, owner=NOBODY),
        report(6, engine("http://127.0.0.1:6"), provider_hostname="six"),
    )
    assert found == [1, NodeOfAnother, NodeFenced, AddressOfAnother, NotApproved, UnknownProvider, 1]
    assert await hostnames(pool) == ["", "", "six", "nine"]
    assert [row["url"] for row in await pool.fetch("select url from engines order by node_id")] == [
        "http://127.0.0.1:1", "http://127.0.0.1:6",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "bad",
    [
        report(5, provider_hostname="a\x00b"),
        report(5, gpu_status={"x": "a\x00b"}),
        report(5, engine("http://127.0.0.1:5", reason="a\x00b")),
    ],
)
async def test_what_can_not_be_kept_spoils_no_other(pool, bad):
    found = await record(pool, report(1), report(2), bad, report(8), report(9))
    assert found[:2] + found[3:] == [1, 1, 1, 1]
    assert issubclass(found[2], asyncpg.DataError)
    assert len(await hostnames(pool)) == 4


async def test_two_that_name_one_address_in_one_batch_do_not_both_get_it(pool):
    url = "http://127.0.0.1:1"
    found = await record(
        pool, report(1, engine(url)), report(2, engine(url), owner=OTHER), report(3, engine(url))
    )
    assert found == [1, AddressOfAnother, 1], "a provider's own nodes may"


async def test_one_that_is_refused_takes_no_address_from_its_neighbour(pool):
    assert await record(pool, report(9, engine("http://127.0.0.1:9"))) == [1]
    bad = report(1, engine("http://127.0.0.1:2"), engine("http://127.0.0.1:9", engine_id="e1"), owner=OTHER)
    assert await record(pool, bad, report(2, engine("http://127.0.0.1:2"))) == [AddressOfAnother, 1]


async def test_new_nodes_of_one_batch_count_together(pool):
    assert await record(pool, report(5), nodes_max=3) == [1]
    found = await record(
        pool, report(1), report(2), report(3), report(4, owner=OTHER), report(5), nodes_max=3
    )
    assert found == [1, 1, TooManyNodes, 1, 1]
    assert len(await hostnames(pool)) == 4


async def test_what_one_node_says_twice_in_a_moment_is_written_in_order(pool):
    said = [
        report(1, provider_hostname=name, instance=str(uuid.uuid4())) for name in ("first", "second", "third")
    ]
    assert await record(pool, said[0], report(2), said[1], said[2]) == [1, 1, 2, 3], (
        "the last one has the node"
    )
    assert await hostnames(pool) == ["third", ""]


async def test_a_report_that_says_nothing_new_does_not_write_its_engines(pool):
    told = engine("http://127.0.0.1:1", prompt_tokens=5, completion_tokens=6)
    rows = "select (select xmin from engines)::text || ' ' || (select xmin from engine_usage)::text"
    heard = "select last_heartbeat_at from nodes"
    assert await record(pool, report(1, told)) == [1]
    written, heard_at = await pool.fetchval(rows), await pool.fetchval(heard)
    assert await record(pool, report(1, told)) == [1]
    assert await pool.fetchval(rows) == written
    assert await pool.fetchval(heard) > heard_at
    assert await record(pool, report(1, engine("http://127.0.0.1:1", reason="new"))) == [1]
    assert await pool.fetchval("select reason from engines") == "new"
    assert await record(pool, report(1, engine("http://127.0.0.1:1", engine_id="other"))) == [1]
    assert await pool.fetchval("select string_agg(engine_id, ',') from engines") == "other"


async def test_an_engines_new_counters_are_written_though_all_else_is_as_it_was(pool):
    for tokens in (100, 160):
        told = engine("http://127.0.0.1:1", prompt_tokens=tokens, completion_tokens=0)
        assert await record(pool, report(1, told)) == [1]
    assert await pool.fetchval("select reported_prompt from engine_usage") == 60


async def test_batches_of_the_same_nodes_in_any_order_wait_for_each_other(pool):
    numbers = list(range(1, 30))
    await record(pool, *map(report, numbers))
    found = await asyncio.gather(
        *(record(pool, *map(report, order)) for _ in range(10) for order in (numbers, numbers[::-1]))
    )
    assert all(each == [1] * len(numbers) for each in found)
    assert (
        await pool.fetchval("select deadlocks from pg_stat_database where datname = current_database()") == 0
    )


async def test_a_batch_that_meets_somebody_in_another_order_is_written_one_by_one(pool):
    assert await record(pool, report(1), report(2)) == [1, 1]
    async with pool.acquire() as connection:
        work = connection.transaction()
        await work.start()
        await connection.execute("select from nodes where id = $1 for update", uuid.UUID(node(2)))
        writing = asyncio.create_task(record(pool, report(1), report(2), report(3)))
        await eventually(lambda: _waits(pool))
        await connection.execute("select from nodes where id = $1 for update", uuid.UUID(node(1)))
        await work.commit()
    assert await writing == [1, 1, 1]


async def _waits(pool: asyncpg.Pool) -> bool:
    return bool(await pool.fetchval("select count(*) from pg_locks where not granted"))


async def test_progress_of_a_node_is_written_before_its_commands_are_told(pool):
    assert await record(pool, report(1)) == [1]
    give = "insert into node_commands (node_id, name, expires_at) values ($1, 'update', now() + interval '1 h') returning id"
    one, two = [
        await pool.fetchval(give.replace("'update'", f"'{name}'"), uuid.UUID(node(1))) for name in "ab"
    ]
    done = report(1, progress=[Progress(id=one, status="done")])
    found = await beats.record(pool, [done, report(2)], credit_s=90.0, nodes_max=100)
    assert [command.id for command in found[done].commands] == [two]


async def test_heartbeats_of_a_moment_are_one_transaction(pool, monkeypatch):
    batches = []
    record_all = beats.record

    async def noted(pool: asyncpg.Pool, reports: Sequence[Report], **of: Any) -> Any:
        batches.append(len(reports))
        return await record_all(pool, reports, **of)

    monkeypatch.setattr("nodes.heartbeats.record", noted)
    store = NodeStore(pool)
    leases = await asyncio.gather(
        *(store.record(OWNER, Heartbeat(api_key="-", node_id=node(number)), ()) for number in range(1, 41))
    )
    assert [lease.epoch for lease in leases] == [1] * 40
    assert batches == [40]


async def test_without_postgres_each_of_a_batch_gets_a_503(settings, private_stores):
    async with using(private_stores, settings) as (own, own_pool), running_gateway(own, own_pool) as gw:
        nodes = [await provider(gw, f"provider {number}") for number in range(5)]
        for each in nodes:
            await each.says()
        kill(private_stores, "postgres")
        answers = await asyncio.gather(*(each.send(each.beat()) for each in nodes))
    assert [status for status, _ in answers] == [503] * 5
    assert all(body.keys() == {"error", "request_id"} for _, body in answers)
