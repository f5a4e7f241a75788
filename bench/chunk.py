"""What a streamed chunk costs, when an engine sends a hundred at once and when it sends at a pace; how late it comes."""

import sys

from bench.arms import DIRECT, Arm
from bench.bodies import chat_body
from bench.ground import ALL, Ground, on_ground
from bench.load import Job
from bench.question import Asked, Question, run
from bench.rounds import rounds_of, tell
from bench.samples import Sample, paired_differences

CPU = "CPU a chunk"
DELAY = "chunk delay, {}"
ADDED = "added chunk delay, {}"
CONNECTIONS = 16
BURST, BURST_CHUNKS, BURST_STREAMS = "burst of 100", 100, 1000
PACED, PACED_CHUNKS, PACED_STREAMS, PACE_MS, JITTER = "paced 20 ms x 256", 400, 256, 20.0, 0.3
METHOD = f"""\
**Burst**: {BURST_STREAMS:,} streams of {BURST_CHUNKS} chunks, {CONNECTIONS} at a time; the engine writes all chunks
of a stream at once, each framed as an HTTP chunk of its own, as vLLM's server does. **Paced**: {PACED_STREAMS}
streams of {PACED_CHUNKS} chunks, one every {PACE_MS:g} ms on average (±{JITTER:.0%} at random); each stream starts
at a random moment within {PACE_MS:g} ms, so they don't beat together. What a stream's request costs, and what a
gateway does without requests, is inside.

The engine writes the time (CLOCK_MONOTONIC) into the text of each paced chunk just before it sends it, and the load
generator, on the same machine, takes the age of each stamp when it reads it. *Direct* is the same without a
gateway; *added* is the difference of both medians, or of both 99th percentiles, within a round. The engine's timer
has steps of 1 ms: some 13 chunks leave together, and the last of them waits for the others, with a gateway and
without. poolgate asks the engine for a count of tokens in each chunk and takes it out again, so the engine sends it
more bytes than it sends the others."""


def measure(asked: Asked) -> list[Sample]:
    return on_ground(lambda ground: _measure(ground, asked))


async def _measure(ground: Ground, asked: Asked) -> list[Sample]:
    samples: list[Sample] = []
    async with ground.together(asked.arms) as arms:
        for number, order in rounds_of(arms, asked.rounds):
            if BURST in asked.cases:
                for arm in order:
                    samples += await _burst(ground, arm, number) if arm.name != DIRECT else []
            if PACED in asked.cases:
                for arm in order:
                    samples += await _paced(ground, arm, number) if arm.few == 1 else []
    samples = [sample for sample in samples if sample.round]
    for share in ("p50", "p99"):
        samples += paired_differences(samples, DELAY.format(share), ADDED.format(share), DIRECT)
    return samples


async def _burst(ground: Ground, arm: Arm, number: int) -> list[Sample]:
    await ground.engine.knobs(pace_ms=0.0, phase_ms=0.0, jitter=0.0, stamped=False)
    body = chat_body(200, tokens=BURST_CHUNKS, stream=True)
    streams = max(CONNECTIONS, int(BURST_STREAMS * arm.few))
    spent = await ground.spend(
        arm, Job(arm.url, key=arm.key, body=body, connections=CONNECTIONS, requests=streams)
    )
    cost_us = spent.gateway_s / spent.outcome.events * 1e6
    tell(f"{BURST}, {arm.name}: {cost_us:.2f} µs")
    return [Sample(CPU, BURST, arm.name, "µs", number, cost_us)]


async def _paced(ground: Ground, arm: Arm, number: int) -> list[Sample]:
    await ground.engine.knobs(pace_ms=PACE_MS, phase_ms=PACE_MS, jitter=JITTER, stamped=True)
    body = chat_body(200, tokens=PACED_CHUNKS, stream=True)
    streams = PACED_STREAMS
    spent = await ground.spend(
        arm, Job(arm.url, key=arm.key, body=body, connections=streams, requests=streams, stamped=True)
    )
    seen = spent.outcome
    assert seen.ages > 0.9 * streams * PACED_CHUNKS, f"only {seen.ages} stamps came through {arm.name}"
    rows = [
        (DELAY.format("p50"), "ms", seen.age_p50_ms),
        (DELAY.format("p99"), "ms", seen.age_p99_ms),
    ]
    if arm.name != DIRECT:
        rows.insert(0, (CPU, "µs", spent.gateway_s / seen.events * 1e6))
    tell(f"{PACED}, {arm.name}: " + ", ".join(f"{value:.2f} {unit}" for _, unit, value in rows))
    return [Sample(name, PACED, arm.name, unit, number, value) for name, unit, value in rows]


QUESTION = Question(
    "chunk", "CPU a streamed chunk, and its delay", METHOD, measure, rounds=5, cases=(BURST, PACED),
    arms=(*ALL, DIRECT), pictures=(CPU, ADDED.format("p99")),
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(run(QUESTION))
