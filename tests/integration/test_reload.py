"""SIGHUP and SIGTERM of a real supervisor under load, and when something is in the way; long forms are in `make soak`."""

import asyncio
import signal
import ssl
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from bench.load import Client, Job, request_bytes
from bench.processes import fetch
from config import compiled
from config.embedded import EmbeddedStores
from config.postgres import migrate, open_pool
from tests.certificates import write_pair
from tests.fakes.gateway_process import GatewayProcess
from tests.fakes.stores import frozen
from tests.soak import reload
from tests.soak.reload import WORKERS, Running, running
from tests.waiting import eventually

pytestmark = pytest.mark.timeout(240)


async def test_reloads_and_a_killed_worker_fail_only_what_was_on_the_killed_one(settings, pool, tmp_path):
    numbers = await reload.reloaded(settings, pool, tmp_path, reload.RELOADS_SHORT)
    assert numbers["broken elsewhere"] == 0


async def test_sigterm_answers_whatever_was_connected_before_it(settings, pool, tmp_path):
    numbers = await reload.stopped(settings, pool, tmp_path, reload.STOPS_SHORT)
    assert numbers["turns"] == numbers["usage records"]


# --- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.fixture
async def run(settings, pool, tmp_path) -> AsyncIterator[Running]:
    """Two workers, over a settings file."""
    async with running(settings, pool, tmp_path) as started:
        yield started


def request(run: Running) -> bytes:
    body = {"model": reload.MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
    return request_bytes(Job(run.gateway.url, key=run.key, body=body))


async def on_each_worker(gateway: GatewayProcess, count: int) -> list[Client]:
    """A connection to each of so many workers."""
    found: dict[int, Client] = {}
    while len(found) < count:
        client = Client("127.0.0.1", gateway.port)
        await client.ask(b"GET /api/health HTTP/1.1\r\nhost: poolgate\r\n\r\n")
        for worker in gateway.workers():
            if client.local_port in gateway.client_ports(worker):
                found.setdefault(worker.pid, client)
    return list(found.values())


def pids(run: Running) -> set[int]:
    return {worker.pid for worker in run.gateway.workers()}


async def test_each_worker_tells_whether_it_runs_compiled(run: Running):
    await run.gateway.until_logged(f"started, {compiled.how()}", WORKERS)


async def test_wrong_settings_are_logged_and_the_old_workers_go_on(run: Running):
    before = pids(run)
    run.write(WORKERS, chunk_timeout_s=-1)
    run.gateway.reload()
    await run.gateway.until_logged("no reload, the old settings stay: chunk_timeout_s = -1")
    assert pids(run) == before
    run.write(WORKERS, host="127.0.0.2")
    run.gateway.reload()
    await run.gateway.until_logged("these settings change only by a restart: host")
    await run.gateway.until_logged("reloaded, with 2 worker(s)")
    await run.until_serving(WORKERS)
    assert not pids(run) & before


async def test_a_successor_that_can_not_serve_is_given_up_and_nobody_notices(
    settings, private_stores: EmbeddedStores, tmp_path
):
    await migrate(private_stores.database_url)
    settings = replace(
        settings, database_url=private_stores.database_url, redis_url=private_stores.redis_url, database_timeout_s=1.0,
        reload_ready_s=5.0,
    )  # fmt: skip
    async with (
        await open_pool(private_stores.database_url, max_size=2, timeout_s=30.0) as pool,
        running(settings, pool, tmp_path) as run,
    ):
        before = pids(run)
        clients = await on_each_worker(run.gateway, WORKERS)
        assert [(await client.ask(request(run))).status for client in clients] == [200] * WORKERS
        with frozen(private_stores, "postgres"):
            run.gateway.reload()
            await run.gateway.until_logged("the reload ended after 0 of 2 worker(s)")
            assert [(await client.ask(request(run))).status for client in clients] == [200] * WORKERS
            assert pids(run) == before
        run.gateway.reload()
        await run.gateway.until_logged("reloaded, with 2 worker(s)")
        await run.until_serving(WORKERS)


async def test_a_second_sighup_meanwhile_is_heeded_after_the_first(run: Running):
    run.gateway.reload()
    await run.gateway.until_logged("reloading")
    run.gateway.reload()
    await run.gateway.until_logged("reloaded, with", 2)
    await run.until_serving(WORKERS)


async def test_sigterm_in_a_reload_ends_old_and_new_workers(run: Running):
    run.gateway.reload()
    await eventually(lambda: len(run.gateway.workers()) == WORKERS + 1)
    workers = run.gateway.workers()
    assert await run.gateway.stop() == 0
    assert not [worker for worker in workers if worker.is_running()]
    assert "Traceback" not in run.gateway.log.read_text()


async def test_what_queues_on_the_socket_of_a_worker_that_died_is_answered_by_a_last_one(run: Running):
    # Both are frozen, so that clients queue with both; then one dies and the end comes at the same moment.
    first, second = run.gateway.workers()
    for worker in (first, second):
        worker.suspend()
    clients = [Client("127.0.0.1", run.gateway.port) for _ in range(16)]
    asking = [asyncio.create_task(client.ask(request(run), 60)) for client in clients]
    await eventually(lambda: all(client.local_port for client in clients))
    run.gateway.send_signal(signal.SIGSTOP)
    first.kill()
    run.gateway.send_signal(signal.SIGTERM)
    run.gateway.send_signal(signal.SIGCONT)
    second.resume()
    assert [answer.status for answer in await asyncio.gather(*asking)] == [200] * 16
    assert await asyncio.to_thread(run.gateway.wait) == 0


async def test_workers_that_hang_are_killed_and_others_answer_what_is_queued(settings, pool, tmp_path):
    async with running(replace(settings, worker_hung_s=4.0), pool, tmp_path) as run:
        before = pids(run)
        for worker in run.gateway.workers():
            worker.suspend()
        clients = [Client("127.0.0.1", run.gateway.port) for _ in range(8)]
        asking = [asyncio.create_task(client.ask(request(run), 60)) for client in clients]
        await run.gateway.until_logged("hangs and is killed", WORKERS)
        assert [answer.status for answer in await asyncio.gather(*asking)] == [200] * 8
        assert not pids(run) & before


# --- probes and TLS --------------------------------------------------------------------------------------------------


async def test_probes_are_answered_while_no_worker_can_answer_anything(run: Running):
    for worker in run.gateway.workers():
        worker.suspend()
    assert (await asyncio.to_thread(fetch, run.probe_url + "/ready"))["ready"]
    await eventually(lambda: not reload.fetch_ready(run.probe_url))
    told = await asyncio.to_thread(fetch, run.probe_url + "/health")
    assert told["overall_status"] == "unhealthy"
    assert {worker["pid"] for worker in told["workers"]} == pids(run)
    for worker in run.gateway.workers():
        worker.resume()
    await run.until_serving(WORKERS)


async def test_https_with_a_certificate_that_is_renewed_by_sighup(settings, tmp_path: Path):
    chain, key = write_pair(tmp_path)
    config = tmp_path / "poolgate.toml"
    config.write_text(f'tls_certificate = "{chain}"\ntls_key = "{key}"\n')
    gateway = GatewayProcess(replace(settings, workers=1), tmp_path, config=config)

    async def certificate() -> str:
        try:
            return await asyncio.to_thread(ssl.get_server_certificate, ("127.0.0.1", gateway.port))
        except OSError:
            return ""

    gateway.spawn()
    try:
        await eventually(certificate)
        assert await certificate() == chain.read_text()
        write_pair(tmp_path)
        gateway.reload()
        await gateway.until_logged("reloaded, with 1 worker(s)")

        async def is_renewed() -> bool:
            return await certificate() == chain.read_text()

        await eventually(is_renewed)
        key.write_text("no key")
        gateway.reload()
        await gateway.until_logged("no reload, the old settings stay: tls_certificate, tls_key")
        assert await gateway.stop() == 0
    finally:
        if gateway.is_alive:
            gateway.kill()
