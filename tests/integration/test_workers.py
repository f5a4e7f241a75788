"""Two workers under a real supervisor: what one hears both heed, and a dead one costs only the turns it had."""

import asyncio
import os
import signal
import time
import uuid
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import asyncpg
import pytest

from billing.money import NANO
from config import cores
from config.embedded import EmbeddedStores
from config.postgres import migrate
from gateway.identity.accounts import AccountStore
from gateway.identity.keys import ApiKey, KeyStore
from nodes.heartbeats import NodeStore
from nodes.protocol import EngineReport, Heartbeat, ModelInfo
from tests.fakes.engine import FakeEngine
from tests.fakes.serving import PEPPER, Connection, Serving
from tests.fakes.stores import frozen, kill
from tests.waiting import is_gone, wait_until

T = TypeVar("T")
CHAT = "/v1/chat/completions"
MODEL = "smollm2-135m"
ASK = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8}
# 25 events a second for two seconds, unless a test says otherwise.
LONG = ASK | {"stream": True, "max_tokens": 50, "ignore_eos": True}

pytestmark = pytest.mark.timeout(180)


class Database:
    """What an operator does to the database, each in a loop of its own: these tests are not asynchronous."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.account_id = 0

    def do(self, work: Callable[[asyncpg.Pool], Coroutine[Any, Any, T]]) -> T:
        async def run() -> T:
            async with asyncpg.create_pool(self.url, min_size=1, max_size=1) as pool:
                return await work(pool)

        return asyncio.run(run())

    def account(self) -> None:
        made = self.do(
            lambda pool: AccountStore(pool).create("tester", balance_nano=100 * NANO, is_provider=True)
        )
        self.account_id = made.id

    def key(self) -> tuple[ApiKey, str]:
        return self.do(lambda pool: KeyStore(pool, PEPPER.encode()).create(self.account_id, prefix="sk-pg-"))

    def revoke(self, row: ApiKey) -> None:
        self.do(lambda pool: KeyStore(pool, PEPPER.encode()).revoke(row.id))

    def register(self, engine: FakeEngine) -> None:
        models = (ModelInfo(id=MODEL, context_length=2048),)
        report = EngineReport(engine_id="e0", url=engine.url, state="ready", models=models)
        beat = Heartbeat(api_key="-", node_id=str(uuid.uuid4()), engines=(report,))
        self.do(lambda pool: NodeStore(pool).record(self.account_id, beat, beat.engines))

    def value(self, statement: str) -> Any:
        return self.do(lambda pool: pool.fetchval(statement))


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    stand_in = FakeEngine(pace_ms=40)
    asyncio.run(stand_in.start())
    yield stand_in
    asyncio.run(stand_in.kill())


@pytest.fixture
def database(database_url: str, engine: FakeEngine) -> Database:
    made = Database(database_url)
    made.account()
    made.register(engine)
    return made


@pytest.fixture
def serving(database: Database, redis_url: str, tmp_path: Path) -> Iterator[Serving]:
    with Serving(tmp_path, database.url, redis_url, key=database.key()[1]) as started:
        yield started


def begun(connection: Connection, body: dict[str, Any] = LONG) -> Any:
    """A stream of which the first event has come."""
    connection.send("POST", CHAT, body)
    reply = connection.reply()
    assert reply.status == 200
    assert reply.readline().startswith(b"data: ")
    return reply


# --- keys ------------------------------------------------------------------------------------------------------------


def longest_s(serving: Serving, database: Database) -> float:
    """Revoke a key that both workers know: how long until the slower of them refuses it."""
    row, key = database.key()
    workers = serving.each_worker().values()
    for connection in workers:
        assert connection.ask("POST", CHAT, ASK, key)[0] == 200
    database.revoke(row)
    began_s, took_s = time.monotonic(), 0.0
    for connection in workers:
        while connection.ask("GET", "/v1/models", key=key)[0] == 200:
            assert time.monotonic() - began_s < 30
        took_s = time.monotonic() - began_s
        assert connection.ask("POST", CHAT, ASK, key)[0] == 401
    return took_s


@pytest.mark.parametrize("valkey", ["up", "frozen", "killed"])
def test_a_revoked_key_is_refused_by_both_workers_within_a_second(
    private_stores: EmbeddedStores, engine: FakeEngine, tmp_path: Path, valkey: str
):
    asyncio.run(engine.knobs(pace_ms=0))
    asyncio.run(migrate(private_stores.database_url))
    database = Database(private_stores.database_url)
    database.account()
    database.register(engine)
    with ExitStack() as stack:
        serving = stack.enter_context(
            Serving(tmp_path, database.url, private_stores.redis_url, key=database.key()[1])
        )
        if valkey == "frozen":
            stack.enter_context(frozen(private_stores, "valkey"))
        elif valkey == "killed":
            kill(private_stores, "valkey")
        took_s = sorted(longest_s(serving, database) for _ in range(3))
        # The promise itself; the middle one of three, since this machine may be busy with something else.
        assert took_s[1] < 1.0, took_s


def test_a_key_made_while_they_run_is_known_to_both_at_once(serving: Serving, database: Database):
    workers = serving.each_worker().values()
    _, key = database.key()
    assert [connection.ask("POST", CHAT, ASK, key)[0] for connection in workers] == [200, 200]


# --- usage and metrics -----------------------------------------------------------------------------------------------


def test_usage_of_both_is_written_once_and_metrics_add_up(serving: Serving, database: Database):
    workers = list(serving.each_worker().values())
    for connection, turns in zip(workers, (3, 5), strict=True):
        assert [connection.ask("POST", CHAT, ASK)[0] for _ in range(turns)] == [200] * turns
    wait_until(lambda: database.value("select count(*) from usage") == 8)
    assert database.value("select count(distinct turn_id) from usage") == 8
    charged = database.value("select sum(amount_nano)::bigint from usage")
    spent = "select credit_nano - debit_nano from ledger_accounts where kind = 'wallet'"
    assert database.value(spent) == 100 * NANO - charged
    for connection in workers:  # whichever answers, it answers for both
        wait_until(lambda connection=connection: serving.metric("poolgate_turns_total", connection) == 8)
        assert serving.metric("poolgate_charged_nano_total", connection) == charged
        assert serving.metric("poolgate_nodes_online", connection) == 1


def test_gauges_are_of_the_living_and_counters_outlive_their_worker(serving: Serving):
    found = serving.each_worker()
    for connection in found.values():
        assert connection.ask("POST", CHAT, ASK)[0] == 200
    for connection in found.values():
        begun(connection, LONG | {"max_tokens": 1000})
    wait_until(lambda: serving.metric("poolgate_turns_in_flight") == 2)
    victim = next(worker for worker in serving.workers() if worker.pid in found)
    victim.kill()
    wait_until(lambda: serving.metric("poolgate_turns_in_flight") <= 1)
    wait_until(lambda: serving.metric("poolgate_turns_total") >= 2)


# --- deaths ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(len(cores.ALL) < 2, reason="a core for each is needed")
def test_each_worker_keeps_to_a_core_of_its_own_and_the_threads_beside_it_do_not(serving: Serving):
    workers = serving.workers()
    wait_until(lambda: all(len(worker.cpu_affinity()) == 1 for worker in workers))
    assert len({worker.cpu_affinity()[0] for worker in workers}) == len(workers)
    for worker in workers:
        beside = [thread.id for thread in worker.threads() if thread.id != worker.pid]
        assert beside, "the journal has some"
        assert {tuple(sorted(os.sched_getaffinity(each))) for each in beside} == {tuple(cores.ALL)}


def test_connections_that_queue_on_a_dead_workers_socket_are_served_by_its_successor(serving: Serving):
    victim, other = serving.workers()
    victim.send_signal(signal.SIGSTOP)
    connections = [serving.connect() for _ in range(24)]
    with ThreadPoolExecutor(len(connections)) as threads:
        answers = [threads.submit(connection.ask, "POST", CHAT, ASK) for connection in connections]
        wait_until(lambda: any(answer.done() for answer in answers))
        assert not all(answer.done() for answer in answers), "some wait in the victim's queue"
        victim.kill()
        assert [answer.result()[0] for answer in answers] == [200] * len(answers)
    assert is_gone(victim.pid)
    assert other.is_running()
    wait_until(lambda: len(serving.workers()) == 2)


def test_the_other_workers_stream_goes_on_when_one_is_killed(serving: Serving):
    found = serving.each_worker()
    victim, other = found
    replies = {pid: begun(connection) for pid, connection in found.items()}
    next(worker for worker in serving.workers() if worker.pid == victim).kill()
    assert replies[other].read().endswith(b"data: [DONE]\n\n")
    wait_until(lambda: len(serving.workers()) == 2 and victim not in {w.pid for w in serving.workers()})
    assert len(serving.each_worker()) == 2, "the successor serves"


def test_sigterm_lets_begun_streams_end_and_then_ends_itself(serving: Serving, database: Database):
    replies = [begun(connection) for connection in serving.each_worker().values()]
    serving.stop()
    wait_until(lambda: _refuses(serving))
    assert [reply.read().endswith(b"data: [DONE]\n\n") for reply in replies] == [True, True]
    assert serving.process.wait(60) == 0
    wait_until(serving.leaves_nothing)
    assert database.value("select count(*) from usage where outcome = 'finished'") == 2
    assert "Traceback" not in serving.log.read_text()


def test_a_stream_that_outlives_the_grace_is_cut_told_and_charged(
    database: Database, redis_url: str, tmp_path: Path
):
    with Serving(tmp_path, database.url, redis_url, key=database.key()[1], shutdown_grace_s=0.2) as serving:
        reply = begun(serving.connect(), LONG | {"max_tokens": 1500})
        serving.stop()
        rest = reply.read()
        assert b'data: {"error"' in rest
        assert b"[DONE]" not in rest
        assert serving.process.wait(60) == 0
        assert database.value("select completion_tokens from usage") > 0


def _refuses(serving: Serving) -> bool:
    connection = serving.connect()
    try:
        connection.ask("GET", "/api/health")
    except OSError:
        return True
    finally:
        connection.close()
    return False


def test_nothing_is_left_of_a_supervisor_that_was_killed(serving: Serving):
    serving.workers()
    serving.process.kill()
    serving.process.wait()
    wait_until(serving.leaves_nothing)
    assert _refuses(serving)


def test_a_port_in_use_is_one_clear_line(serving: Serving):
    second = serving.run_another()
    told = second.stdout + second.stderr
    assert second.returncode == 1
    assert f"can't listen on 127.0.0.1:{serving.port}" in told
    assert "choose another --port" in told
    assert "Traceback" not in told
    assert serving.connect().ask("GET", "/api/health")[0] == 200


def test_no_secret_is_in_the_workers_arguments_or_log(serving: Serving):
    serving.connect().ask("POST", f"{CHAT}?key={serving.key}", ASK)
    serving.connect().ask("GET", f"/nope?key={serving.key}")
    for worker in serving.workers():
        assert PEPPER not in " ".join(worker.cmdline())
    assert serving.key not in serving.log.read_text()
    assert PEPPER not in serving.log.read_text()
