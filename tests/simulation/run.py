"""Lets a schedule happen: clients ask, things fail and come back, and at the end everything is reckoned up."""

import asyncio
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from config.defaults import Settings
from config.embedded import EmbeddedStores
from config.postgres import migrate, open_pool
from config.settings import load_settings
from tests.fakes.clients import Clients, Sighting
from tests.fakes.gateway_process import GatewayProcess
from tests.fakes.stores import frozen, kill
from tests.simulation.oracle import Findings
from tests.simulation.plan import PRICES, SHORT, WALLETS, Asked, Fails, Plan, Size, draw
from tests.simulation.world import Customer, World
from tests.waiting import eventually

CRASH_SAFE = {"fsync": "off", "full_page_writes": "off"}
"""A killed PostgreSQL keeps what it said it had: synchronous_commit stays on. A power cut is not simulated."""

ATTEMPTS_MAX = 6
"""How often the client of a keyed request asks again for an answer that did not come."""

PAUSE_S = 0.6
ENGINE_KNOBS = {"ttft_ms": 15.0, "pace_ms": 12.0, "jitter": 0.3}
WORDS = "the quick brown fox jumps over the lazy dog and goes home "

ALLOWED = {0, 200, 402, 409, 429, 502, 503, 504}
"""What clients may see while everything fails: no 500, no 401 for a key that is good, no 404."""


async def simulate(
    seed: int, size: Size, folder: Path, tell: Callable[[str], None] = print
) -> dict[str, float]:
    """One seed; raises AssertionError with the schedule, what is wrong, and how to have it again. Main thread only."""
    plan = draw(seed, size)
    tell(plan.told())
    with EmbeddedStores.start(folder / "stores", postgres_options=CRASH_SAFE) as stores:
        try:
            findings = await _happen(plan, stores, folder, tell)
        except Exception as error:
            name = "" if size is SHORT else " --long"
            again = f"again: python -m tests.simulation --seed {seed}{name}"
            raise AssertionError(f"{plan.told()}\n{error!r}\n{again}") from error
    tell(f"{dict(sorted(findings.numbers.items()))}")
    return dict(findings.numbers)


async def _happen(plan: Plan, stores: EmbeddedStores, folder: Path, tell: Callable[[str], None]) -> Findings:
    await migrate(stores.database_url)
    settings = _settings(stores, folder)
    pool = await open_pool(stores.database_url, max_size=4, timeout_s=10.0)
    try:
        async with World(settings, pool, folder, PRICES) as world:
            for _ in range(plan.size.engines):
                await world.engine("--block-size", "16", **ENGINE_KNOBS)
            customers = [
                await world.customer(wallet.name, wallet.balance_nano, wallet.limits, wallet.budget_nano)
                for wallet in WALLETS
            ]
            gateway = await world.gateway(workers=plan.size.workers)
            clients = world.clients(gateway)
            async with asyncio.TaskGroup() as tasks:
                for asked in plan.asked:
                    tasks.create_task(_ask(world, clients, customers, asked))
                for lane in plan.lanes.values():
                    tasks.create_task(_fail(world, stores, gateway, lane, tell))
            clients.close()
            await _everything_is_back(world, stores, gateway)
            findings = await world.reckon()
            _are_allowed(world, customers)
            return findings
    finally:
        pool.terminate()


def _settings(stores: EmbeddedStores, folder: Path) -> Settings:
    """Short times, so that all that is periodic happens many times."""
    return load_settings(
        environ={}, database_url=stores.database_url, redis_url=stores.redis_url, data_dir=str(folder / "data"),
        key_pepper="pepper-of-the-simulation", change_poll_s=0.1, usage_flush_s=0.05, lease_report_s=0.2,
        lease_idle_s=1.0, hold_wait_s=1.0, database_timeout_s=1.0, valkey_retry_s=0.3, journal_segment_bytes=2**16,
        breaker_open_s=0.1, breaker_open_max_s=0.5, first_byte_timeout_s=2.0, chunk_timeout_s=1.0, answer_timeout_s=3.0,
        load_share_s=0.1, shutdown_grace_s=10.0, node_networks="127.0.0.0/8",
    )  # fmt: skip


# --- clients ---------------------------------------------------------------------------------------------------------


async def _ask(world: World, clients: Clients, customers: list[Customer], asked: Asked) -> None:
    await asyncio.sleep(asked.at_s)
    words = WORDS * (1 + asked.words // len(WORDS.split()))
    ask = world.ask(
        customers[asked.wallet], words[: 6 * asked.words], model=asked.model, leaves_after=asked.leaves_after,
        leaves_s=asked.leaves_s, **asked.body,
    )  # fmt: skip
    if not asked.is_keyed:
        await clients.ask(ask)
        return
    ask = replace(ask, idempotency_key=f"key-{ask.number}")
    seen = await clients.ask(ask)
    again = replace(ask, leaves_after=None, leaves_s=None)
    for _ in range(ATTEMPTS_MAX):
        if not _is_worth_another_try(seen):
            break
        await asyncio.sleep(PAUSE_S)
        seen = await clients.ask(again)
    for _ in range(asked.repeats):
        await clients.ask(again)


def _is_worth_another_try(seen: Sighting) -> bool:
    is_running = seen.status == 409 and b"idempotency_key_in_use" in seen.tail
    return seen.ending in ("left", "reset", "cut") or seen.status in (502, 503, 504) or is_running


def _are_allowed(world: World, customers: list[Customer]) -> None:
    """No answer that nobody should get: a rich account is never refused as poor, an unlimited one never as too fast."""
    wallets = {customer.id: wallet for customer, wallet in zip(customers, WALLETS, strict=True)}
    for seen in world.sightings:
        wallet = wallets[seen.ask.account_id]
        is_allowed = (
            seen.status in ALLOWED
            and seen.ending != "silent"
            and (seen.status != 402 or wallet.may_run_dry)
            and (seen.status != 429 or wallet.limits is not None)
            and (seen.status != 409 or seen.ask.idempotency_key is not None)
        )
        assert is_allowed, f"{wallet.name}: {seen.told()}"


# --- failures --------------------------------------------------------------------------------------------------------


async def _fail(
    world: World, stores: EmbeddedStores, gateway: GatewayProcess, lane: tuple[Fails, ...], tell: Callable[[str], None]
) -> None:  # fmt: skip
    began_s = time.monotonic()
    for fails in lane:
        await asyncio.sleep(max(0.0, fails.at_s - (time.monotonic() - began_s)))
        tell(f"{time.monotonic() - began_s:7.2f} s  {fails.kind} {fails.target} for {fails.for_s:.2f} s")
        await _one(world, stores, gateway, fails)


async def _one(world: World, stores: EmbeddedStores, gateway: GatewayProcess, fails: Fails) -> None:
    name, _, how = fails.kind.partition("_")
    if name == "engine":
        await _engine(world, how, fails)
    elif name == "worker":
        world.kill_worker(gateway, fails.target)
    elif name == "gateway":
        world.kill(gateway)
        await asyncio.sleep(fails.for_s)
        await gateway.start()
    elif how == "frozen":
        with frozen(stores, name):
            await asyncio.sleep(fails.for_s)
    else:
        kill(stores, name)
        await asyncio.sleep(fails.for_s)
        stores.restart(name)


async def _engine(world: World, how: str, fails: Fails) -> None:
    engine = world.engines[fails.target % len(world.engines)]
    if how == "killed":
        await engine.kill()
        await asyncio.sleep(fails.for_s)
        await engine.start()
    else:
        os.kill(engine.pid, signal.SIGSTOP)
        await asyncio.sleep(fails.for_s)
        os.kill(engine.pid, signal.SIGCONT)


async def _everything_is_back(world: World, stores: EmbeddedStores, gateway: GatewayProcess) -> None:
    assert not stores.poll()
    await gateway.until_ready()
    await gateway.until_engines(len(world.engines))
    await eventually(lambda: all(engine.is_alive for engine in world.engines))
