"""What 5,000 nodes that report themselves cost one gateway, and what turns notice of it."""

import asyncio
import sys
import time
import uuid
from typing import Any

from bench.arms import OURS, Arm, Shipping
from bench.bodies import MODEL, chat_body
from bench.clocks import CpuClock, private_bytes
from bench.ground import NODES, Ground, on_ground
from bench.load import Job, Outcome
from bench.processes import LoadProcess, Served, served
from bench.question import Asked, Question, run
from bench.rounds import tell
from bench.samples import Sample
from nodes.protocol import AGENT_VERSION

COUNT = 5000
INTERVAL_S = 30.0
"""As agents are told (setting `heartbeat_interval_s`)."""

SECONDS = 15.0
RATE = 100.0
CASE = f"{COUNT:,} nodes"
GATEWAY, POSTGRES = "CPU of the gateway, of one core", "CPU of PostgreSQL, of one core"
MEMORY = "memory of the gateway for each node"
LATENCY, ADDED = "a turn's {}, nobody reports", "added to a turn's {} by heartbeats"
TURN_CPU = "CPU a turn, nobody reports"
METHOD = f"""\
{COUNT:,} simulated agents, each a node with an engine of its own and a heartbeat of 2 KB over HTTP every
{INTERVAL_S:g} s ({COUNT / INTERVAL_S:.0f}/s, evenly, {SECONDS:g} s a round), report to `poolgate serve` with one worker.
All their engines serve one model (ten addresses of one stand-in). *CPU* is that of heartbeats alone. *Memory* is
what the worker's private memory grew by when they all joined. Then turns (200 B, 16 tokens, {RATE:g}/s) are routed among
the {COUNT:,}, with and without heartbeats at the same time, in turn."""


def measure(asked: Asked) -> list[Sample]:
    return on_ground(lambda ground: _measure(ground, asked))


async def _measure(ground: Ground, asked: Asked) -> list[Sample]:
    folder = ground.folder / "heartbeats"
    folder.mkdir()
    async with ground.database(folder) as (settings, pool), served(settings, pool, folder) as gateway:
        (worker,) = gateway.workers()
        await gateway.register(ground.engine.url)
        arm = Arm(OURS, gateway.url, gateway.key, CpuClock(gateway.process.pid), Shipping(gateway))
        await _turns(ground, arm)  # it has everything that it allocates at its first turns
        before = private_bytes([worker])
        tell(f"{COUNT:,} nodes join")
        async with LoadProcess() as agents:
            await _report(ground, agents, gateway, rate=0.0)
            await gateway.until_engines(COUNT + 1)
            await asyncio.sleep(2.0)  # the last change is read
            grown = (private_bytes([worker]) - before) / COUNT / 1024
            samples = [Sample(MEMORY, CASE, OURS, "KB", 1, grown)]
            tell(f"memory: {grown:.1f} KB a node")
            for number in range(1, asked.rounds + 1):
                samples += await _round(ground, arm, gateway, agents, number)
    return samples


async def _round(ground: Ground, arm: Arm, gateway: Served, agents: LoadProcess, number: int) -> list[Sample]:
    clocks = (arm.clock, CpuClock(ground.stores.pids["postgres"]))
    began = [clock.read_s() for clock in clocks]
    seen = await _report(ground, agents, gateway, rate=COUNT / INTERVAL_S)
    gateway_s, postgres_s = (clock.read_s() - then for clock, then in zip(clocks, began, strict=True))
    rows = [
        (GATEWAY, "%", gateway_s / seen.seconds * 100), (POSTGRES, "%", postgres_s / seen.seconds * 100),
    ]  # fmt: skip
    before_s = arm.clock.read_s()
    alone = await _turns(ground, arm)
    turn_us = (arm.clock.read_s() - before_s) / (RATE * SECONDS) * 1e6
    _, beside = await asyncio.gather(
        _report(ground, agents, gateway, rate=COUNT / INTERVAL_S), _turns(ground, arm)
    )
    rows += [
        (TURN_CPU, "µs", turn_us), (LATENCY.format("p50"), "ms", alone.p50_ms),
        (LATENCY.format("p99"), "ms", alone.p99_ms), (ADDED.format("p50"), "ms", beside.p50_ms - alone.p50_ms),
        (ADDED.format("p99"), "ms", beside.p99_ms - alone.p99_ms),
    ]  # fmt: skip
    tell(", ".join(f"{name} {value:.2f} {unit}" for name, unit, value in rows))
    return [Sample(name, CASE, OURS, unit, number, value) for name, unit, value in rows]


async def _report(ground: Ground, agents: LoadProcess, gateway: Served, *, rate: float) -> Outcome:
    """Every node reports, in turn: as fast as the gateway takes it, or at a rate for a while. Their engines have worked."""
    requests = int(rate * SECONDS) or COUNT
    tokens = time.monotonic_ns() // 10**6
    bodies = [_beat(ground, number, tokens) | {"api_key": gateway.provider_key} for number in range(COUNT)]
    job = Job(
        gateway.url,
        path="/api/providers/heartbeat",
        bodies=bodies,
        connections=64,
        requests=requests,
        rate=rate,
    )
    seen = await agents.run(job)
    assert seen.verdicts == {"whole": requests}, seen
    return seen


async def _turns(ground: Ground, arm: Arm) -> Outcome:
    job = Job(
        arm.url,
        key=arm.key,
        body=chat_body(200, tokens=16),
        connections=16,
        requests=int(RATE * SECONDS),
        rate=RATE,
    )
    return (await ground.spend(arm, job)).outcome


def _beat(ground: Ground, number: int, tokens: int) -> dict[str, Any]:
    """What the agent of a host with one GPU and one engine says of it, which has worked on so many tokens."""
    model = {"id": MODEL, "context_length": 131_072, "kind": "generate", "parent": None}
    engine = {
        "engine_id": "e0", "url": ground.engines[number % NODES], "state": "ready", "reason": "", "restarts": 0,
        "models": [model], "block_size": 16, "kv_tokens": 500_000, "prompt_tokens": tokens, "completion_tokens": tokens,
    }  # fmt: skip
    gpu = {
        "name": "NVIDIA L40S", "vram_mib": 46_068, "free_vram_mib": 5_068, "util_pct": 40, "temp_c": 61, "power_w": 280,
        "compute_capability": "8.9",
    }  # fmt: skip
    status = {
        "gpu_name": gpu["name"], "gpu_vram_mib": 46_068, "driver_version": "570.86.10", "gpu_util_pct": 40, "temp_c": 61,
        "power_w": 280, "free_vram_mib": 5_068, "daemon_version": AGENT_VERSION, "python_version": "3.12.3",
        "os_info": "Linux-6.8.0-x86_64-with-glibc2.39", "compute_capability": "8.9", "cuda_version": "12.8", "gpu_count": 1,
        "all_gpus": [gpu],
    }  # fmt: skip
    return {
        "gpu_status": status, "uptime": 100_000.0, "provider_ip": "10.0.0.1",
        "provider_hostname": f"gpu-{number:04}", "cached_models": [MODEL],
        "resource_spec": {"cpu_count": 32, "memory_gib": 256, "disk_gib": 4000, "os": "Debian 12"},
        "node_id": str(uuid.uuid5(uuid.NAMESPACE_OID, f"node {number}")), "epoch": 1, "agent_version": AGENT_VERSION,
        "engines": [engine], "load": {"e0": {"running": 3, "waiting": 0, "kv_usage": 0.41, "sleeping": False}},
    }  # fmt: skip


QUESTION = Question(
    "heartbeats", "What nodes that report themselves cost", METHOD, measure, rounds=3, cases=(CASE,), arms=(OURS,),
    is_compared=False,
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(run(QUESTION))
