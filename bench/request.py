"""What a chat request costs: CPU of all processes of a gateway, with PostgreSQL's and Valkey's beside it."""

import asyncio
import sys

from bench.arms import OURS, UNBILLED, Arm
from bench.bodies import chat_body
from bench.ground import ALL, Ground, on_ground
from bench.load import Job
from bench.question import Asked, Question, run
from bench.rounds import rounds_of, tell
from bench.samples import Sample

CPU = "CPU a request"
IDLE = "CPU a second, idle"
CONNECTIONS = 16
BODIES = {"200 B": (200, 8000), "4 KB": (4096, 8000), "64 KB": (65536, 1500)}
"""Bytes of a body, and how many requests make one measurement: half a second of CPU or more."""

TOKENS = 16
IDLE_S = 5.0
METHOD = """\
Whole answers of 16 tokens, 16 connections that are kept open, each of which asks again when it is answered. CPU is
user and system time of all processes of the gateway, from before the first request until the work of the last one
is done: with poolgate, when its usage is in PostgreSQL. What a gateway does without requests is inside; *idle* says
how much that is. **poolgate** has everything on, as shipped: a key with six limits and two budgets, holds, a choice
among ten nodes, settlement, journal (fsync every 50 ms), shipping to PostgreSQL, metrics, one log line a turn to a
file. **Billing off** is a worker without leases, limits, budgets, journal and settlement, which no setting of the
product gives (bench/unbilled.py); it reckons what a turn may cost at most, at prices of zero. **Bare uvloop** hands
each client's bytes to an engine and back and parses nothing (bench/bare.py): what any gateway on this event loop costs
at least. PostgreSQL's and Valkey's CPU is in rows of its own, and not in poolgate's."""


def measure(asked: Asked) -> list[Sample]:
    return on_ground(lambda ground: _measure(ground, asked))


async def _measure(ground: Ground, asked: Asked) -> list[Sample]:
    samples: list[Sample] = []
    async with ground.together(asked.arms) as arms:
        for number, order in rounds_of(arms, asked.rounds):
            for case in asked.cases:
                for arm in order:
                    samples += await _cost(ground, arm, case, number)
            samples += await _idle(arms, number)
    return [sample for sample in samples if sample.round]


async def _cost(ground: Ground, arm: Arm, case: str, number: int) -> list[Sample]:
    size, requests = BODIES[case]
    some = max(CONNECTIONS, int(requests * arm.few))
    job = Job(
        arm.url, key=arm.key, body=chat_body(size, tokens=TOKENS), connections=CONNECTIONS, requests=some
    )
    spent = await ground.spend(arm, job)
    rows = [(CPU, spent.gateway_s)]
    if arm.name in (OURS, UNBILLED):
        rows += [(f"{CPU}, of PostgreSQL", spent.postgres_s), (f"{CPU}, of Valkey", spent.valkey_s)]
    samples = [Sample(name, case, arm.name, "µs", number, seconds / some * 1e6) for name, seconds in rows]
    tell(f"{case}, {arm.name}: {samples[0].value:.1f} µs")
    return samples


async def _idle(arms: list[Arm], number: int) -> list[Sample]:
    before = [arm.clock.read_s() for arm in arms]
    await asyncio.sleep(IDLE_S)
    return [
        Sample(IDLE, "no requests", arm.name, "µs", number, (arm.clock.read_s() - then) / IDLE_S * 1e6)
        for arm, then in zip(arms, before, strict=True)
    ]


QUESTION = Question(
    "request", "CPU a chat request", METHOD, measure, rounds=7, cases=tuple(BODIES), arms=ALL, pictures=(CPU,)
)

if __name__ == "__main__":
    sys.exit(run(QUESTION))
