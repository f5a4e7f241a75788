"""What it costs to reach an engine through its agent: by its TLS listener, its tunnel, a tunnel that ends elsewhere."""

import asyncio
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import asyncpg

from bench.accounts import BUDGETS, HIGH, LARGE_NANO, make_accounts
from bench.arms import CONTEXT_LENGTH, Arm, Shipping, Worker, worker
from bench.bodies import chat_body
from bench.clocks import CpuClock
from bench.ground import Ground, on_ground
from bench.load import Job
from bench.processes import ROOT, Served, ended, environment, free_port
from bench.question import Asked, Question, run
from bench.rounds import rounds_of, tell
from bench.samples import Sample, paired_differences
from config.defaults import Settings
from config.procs import Child, spawn_python
from gateway.identity.accounts import AccountStore
from gateway.identity.keys import KeyStore
from gateway.identity.secrets import load_pepper

STRAIGHT, LISTENER, TUNNEL, HOP = "straight", "TLS listener", "tunnel", "tunnel and hop"
ARMS = (STRAIGHT, LISTENER, TUNNEL, HOP)
GATEWAY_CPU, AGENT_CPU = "CPU a chunk, gateway", "CPU a chunk, agent"
TTFT, ADDED = "first byte, {}", "added first byte, {}"

PACED, STREAMS, CHUNKS, PACE_MS, JITTER = "paced 20 ms x 128", 128, 250, 20.0, 0.3
KEPT, NEW = "100/s, connections kept", "100/s, each a new connection"
RATE, SECONDS = 100.0, 4.0
START_S = 60.0

METHOD = f"""\
The same engine, reached in four ways, each by gateway workers of their own: *straight*, as on one host; through the agent's
*TLS listener* (TLS 1.3, AES-GCM by OpenSSL); through the *tunnel* that the agent opened, a websocket; through a tunnel
that ends in another worker than the one that is asked (*tunnel and hop*; CPU is that of both workers). The agent is
`poolgate agent`, a process of its own. The tunnel's websocket is plain here; to a gateway that has TLS it is encrypted,
once for all that goes in one message. All of it is on loopback, so networks add nothing, and neither does their loss of
packets, which all streams of a tunnel share. What all streams say in one turn of the agent's loop goes in one message of
the tunnel, which the gateway reads at once: from engines or a listener it reads each stream by itself.

**Paced**: {STREAMS} streams of {CHUNKS} chunks, one every {PACE_MS:g} ms on average (±{JITTER:.0%} at random).
**First byte**: streams of 16 tokens at {RATE:g} a second, counted from when a request was due; *added* is the
difference to *straight* in the same round. With connections kept nobody shakes hands; with `engine_idle_s` = 0 each
turn has a connection of its own, as turns have that come seldom: then TCP and TLS need their handshakes, and a tunnel
a frame. On a real network each handshake's round trip costs its time: two for the listener, none for the tunnel, one
or two more on loopback for the hop."""


@dataclass(frozen=True, slots=True)
class Way:
    """One way, with the clock of the agent's processes; without an agent it stands still."""

    arm: Arm
    agent: CpuClock


def measure(asked: Asked) -> list[Sample]:
    return on_ground(lambda ground: _measure(ground, asked))


async def _measure(ground: Ground, asked: Asked) -> list[Sample]:
    samples: list[Sample] = []
    for idle_s, cases in ((None, (PACED, KEPT)), (0.0, (NEW,))):
        wanted = [case for case in cases if case in asked.cases]
        if not wanted:
            continue
        async with _all_ways(ground, asked.arms, idle_s) as ways:
            for number, order in rounds_of(ways, asked.rounds):
                for case in wanted:
                    for way in order:
                        samples += await (_paced if case == PACED else _first_bytes)(
                            ground, way, case, number
                        )
    samples = [sample for sample in samples if sample.round]
    for share in ("p50", "p99"):
        samples += paired_differences(samples, TTFT.format(share), ADDED.format(share), STRAIGHT)
    return samples


async def _paced(ground: Ground, way: Way, case: str, number: int) -> list[Sample]:
    await ground.engine.knobs(pace_ms=PACE_MS, phase_ms=PACE_MS, jitter=JITTER, stamped=False)
    body = chat_body(200, tokens=CHUNKS, stream=True)
    before_s = way.agent.read_s()
    job = Job(way.arm.url, key=way.arm.key, body=body, connections=STREAMS, requests=STREAMS)
    spent = await ground.spend(way.arm, job)
    agent_us = (way.agent.read_s() - before_s) / spent.outcome.events * 1e6
    gateway_us = spent.gateway_s / spent.outcome.events * 1e6
    tell(f"{case}, {way.arm.name}: gateway {gateway_us:.1f} µs, agent {agent_us:.1f} µs")
    rows = [(GATEWAY_CPU, gateway_us)] + ([(AGENT_CPU, agent_us)] if way.agent.roots else [])
    return [Sample(name, case, way.arm.name, "µs", number, value) for name, value in rows]


async def _first_bytes(ground: Ground, way: Way, case: str, number: int) -> list[Sample]:
    await ground.engine.knobs(pace_ms=0.0, phase_ms=0.0, jitter=0.0, stamped=False)
    job = Job(
        way.arm.url, key=way.arm.key, body=chat_body(200, tokens=16, stream=True), connections=4,
        requests=int(RATE * SECONDS), rate=RATE,
    )  # fmt: skip
    seen = (await ground.spend(way.arm, job)).outcome
    tell(f"{case}, {way.arm.name}: p50 {seen.ttft_p50_ms:.2f} ms, p99 {seen.ttft_p99_ms:.2f} ms")
    rows = [(TTFT.format("p50"), seen.ttft_p50_ms), (TTFT.format("p99"), seen.ttft_p99_ms)]
    return [Sample(name, case, way.arm.name, "ms", number, value) for name, value in rows]


@asynccontextmanager
async def _all_ways(ground: Ground, names: Sequence[str], idle_s: float | None) -> AsyncIterator[list[Way]]:
    """Those of these names, side by side, and `straight`, which the others are compared with."""
    async with AsyncExitStack() as stack:
        ways = []
        for name in dict.fromkeys((STRAIGHT, *names)):
            tell(f"starting {name}")
            folder = ground.folder / f"reach-{uuid.uuid4().hex[:8]}"
            folder.mkdir()
            settings, pool = await stack.enter_async_context(ground.database(folder))
            settings = replace(settings, heartbeat_interval_s=5.0)  # agents hear with it which way is taken
            if idle_s is not None:
                settings = replace(settings, engine_idle_s=idle_s)
            ways.append(await stack.enter_async_context(_way(ground, name, settings, pool, folder)))
        yield ways


@asynccontextmanager
async def _way(
    ground: Ground, name: str, settings: Settings, pool: asyncpg.Pool, folder: Path
) -> AsyncIterator[Way]:
    """Workers of their own, an account with limits and budgets, and the engine behind its agent, unless it is `straight`."""
    account = await AccountStore(pool).create("bench", is_provider=True)
    pepper = load_pepper(settings)
    _, node_key = await KeyStore(pool, pepper).create(account.id, prefix="dc1-provider-", scopes=("node",))
    (key,) = await make_accounts(pool, pepper, "limited", 1, balance_nano=LARGE_NANO, **HIGH, **BUDGETS)
    async with AsyncExitStack() as stack:
        asked = await stack.enter_async_context(_worker(settings, folder / "asked"))
        holder = (
            await stack.enter_async_context(_worker(settings, folder / "holder")) if name == HOP else asked
        )
        served = Served(asked.process, asked.url, pool, account.id, key, node_key, folder)
        agent: tuple[int, ...] = ()
        if name == STRAIGHT:
            await served.register(ground.engine.url, context_length=CONTEXT_LENGTH)
        else:
            process = await stack.enter_async_context(
                _agent(
                    settings, holder.url, node_key, ground.engine.url, folder, has_listener=name == LISTENER
                )
            )
            agent = (process.pid,)
            await _until_reached(pool, served, by_listener=name == LISTENER)
        clock = CpuClock(*{asked.process.pid, holder.process.pid})
        yield Way(Arm(name, asked.url, key, clock, Shipping(served)), CpuClock(*agent))


@asynccontextmanager
async def _worker(settings: Settings, folder: Path) -> AsyncIterator[Worker]:
    await asyncio.to_thread(folder.mkdir)
    async with worker("gateway.worker", settings, folder) as started:
        yield started


@asynccontextmanager
async def _agent(
    settings: Settings, gateway: str, key: str, engine: str, folder: Path, *, has_listener: bool
) -> AsyncIterator[Child]:
    """`poolgate agent` before the engine, which it looks at once a minute, so that its CPU is that of turns."""
    arguments = ["agent", "--gateway", gateway, "--engine-url", engine, "--reach", "agent"]
    if has_listener:
        arguments += ["--advertise", f"127.0.0.1:{free_port()}"]
    own = replace(Settings(), data_dir=str(folder / "agent"), engine_poll_s=60.0)
    with (folder / "agent.log").open("wb") as output:
        process = spawn_python(
            "gateway", *arguments, env=environment(own) | {"POOLGATE_AGENT_KEY": key}, cwd=ROOT,
            stdin=subprocess.DEVNULL, stdout=output, stderr=output,
        )  # fmt: skip
    try:
        yield process
    finally:
        await ended(process)


async def _until_reached(pool: asyncpg.Pool, served: Served, *, by_listener: bool) -> None:
    """The engine is in the picture, and the node has the way that it should have and no other."""
    wanted = (
        "select exists (select from nodes where listener_host is not null) and not exists (select from tunnels)"
        if by_listener
        else "select exists (select from tunnels)"
    )
    deadline_s = time.monotonic() + START_S
    while not await pool.fetchval(wanted):
        assert time.monotonic() < deadline_s, "the agent is not reached"
        await asyncio.sleep(0.05)
    await served.until_engines(1)


QUESTION = Question(
    "reach", "What each way to an engine adds", METHOD, measure, rounds=5, cases=(PACED, KEPT, NEW), arms=ARMS,
    pictures=(GATEWAY_CPU, ADDED.format("p50")), is_compared=False,
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(run(QUESTION))
