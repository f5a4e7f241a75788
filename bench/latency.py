"""How much later an answer comes through a gateway than from the engine, at fixed rates; and a stream's first byte."""

import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.arms import DIRECT, Arm
from bench.bodies import chat_body
from bench.ground import ALL, Ground, on_ground
from bench.load import Job
from bench.peers import h2load_version
from bench.question import Asked, Question, run
from bench.rounds import rounds_of, tell
from bench.samples import Sample, paired_differences, quantile

LATENCY = "latency, {}"
ADDED = "added latency, {}"
CPU = "CPU a request at this rate"
CONNECTIONS = 16
SECONDS = 4.0
HELD = 0.9
"""A gateway holds a rate if it answers this share of it while it lasts."""

STREAMS = "first byte of a stream, 100/s"
STREAM_RATE = 100.0
CASES = {f"{rate:,}/s": rate for rate in (100, 500, 1000, 2000)}
METHOD = f"""\
`h2load --h1` sends whole chat requests (200 B, 16 tokens) for {SECONDS:g} s at a fixed rate over {CONNECTIONS}
connections, whose moments are spread over the pause between two requests of one. *Direct* is the same load on the
engine itself, in the same round; *added* is the difference of both medians, or of both 99th percentiles. A peer is
not asked for a rate after it answered less than {HELD:.0%} of one: that row is missing. h2load has one request at a
time on a connection: behind one that is late, the next ones of its connection start late. **First byte of a
stream** is measured by bench/load.py, counted from when a request was due."""


def measure(asked: Asked) -> list[Sample]:
    h2load_version()
    return on_ground(lambda ground: _measure(ground, asked))


async def _measure(ground: Ground, asked: Asked) -> list[Sample]:
    samples: list[Sample] = []
    most = dict.fromkeys(asked.arms, 10**9)
    async with ground.together(asked.arms) as arms:
        for number, order in rounds_of(arms, asked.rounds):
            for case in asked.cases if number else asked.cases[:1]:
                for arm in order:
                    if case == STREAMS:
                        samples += await _first_bytes(ground, arm, number)
                    elif CASES[case] <= most[arm.name]:
                        found = await _at_rate(ground, arm, case, number)
                        samples += found
                        most[arm.name] = most[arm.name] if found else CASES[case] - 1
    for share in ("p50", "p99"):
        samples += paired_differences(samples, LATENCY.format(share), ADDED.format(share), DIRECT)
    samples = [sample for sample in samples if sample.round]
    # What was held in some rounds only is not held.
    full = {one for one in {(s.case, s.arm) for s in samples} if _rounds(samples, *one) == asked.rounds}
    return [sample for sample in samples if (sample.case, sample.arm) in full]


def _rounds(samples: Sequence[Sample], case: str, arm: str) -> int:
    return len({sample.round for sample in samples if (sample.case, sample.arm) == (case, arm)})


@dataclass(frozen=True, slots=True)
class Times:
    """What h2load saw: answers a second, and how long each took."""

    rate: float
    milliseconds: list[float]


async def _at_rate(ground: Ground, arm: Arm, case: str, number: int) -> list[Sample]:
    """Nothing if the arm does not hold the rate."""
    await ground.engine.knobs(pace_ms=0.0, phase_ms=0.0, jitter=0.0, stamped=False)
    rate = CASES[case]
    requests = int(rate * SECONDS)
    before_s = arm.clock.read_s()
    times = await _h2load(ground.folder, arm, rate, requests)
    await arm.settle(len(times.milliseconds))
    cpu_us = (arm.clock.read_s() - before_s) / requests * 1e6
    if len(times.milliseconds) < requests or times.rate < HELD * rate:
        tell(f"{case}, {arm.name}: {times.rate:,.0f}/s only")
        return []
    p50_ms, p99_ms = (quantile(times.milliseconds, share) for share in (0.5, 0.99))
    tell(f"{case}, {arm.name}: p50 {p50_ms:.2f} ms, p99 {p99_ms:.2f} ms")
    rows = [(LATENCY.format("p50"), "ms", p50_ms), (LATENCY.format("p99"), "ms", p99_ms)]
    if arm.name != DIRECT:
        rows.append((CPU, "µs", cpu_us))
    return [Sample(name, case, arm.name, unit, number, value) for name, unit, value in rows]


async def _h2load(folder: Path, arm: Arm, rate: float, requests: int) -> Times:
    body, log = folder / "h2load.json", folder / "h2load.log"
    body.write_text(json.dumps(chat_body(200, tokens=16)))
    log.unlink(missing_ok=True)
    pause_ms = CONNECTIONS / rate * 1000
    process = await asyncio.create_subprocess_exec(
        "h2load", "--h1", "-c", str(CONNECTIONS), "-n", str(requests), f"--rps={rate / CONNECTIONS}",
        # One connection after the other, each a sixteenth of a pause later in its own rhythm than the one before.
        "-r", "1", f"--rate-period={max(1, round(pause_ms + pause_ms / CONNECTIONS))}ms", "-d", str(body), "-H",
        "content-type: application/json", "-H", f"authorization: Bearer {arm.key}", f"--log-file={log}",
        f"{arm.url}/v1/chat/completions", stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    await process.wait()
    return times_of(log.read_text())


def times_of(log: str) -> Times:
    """From h2load's log: start (µs since 1970), status, duration (µs), for each request. The rate is that of the middle
    half of the answers, which the start of the connections does not slow."""
    rows = [tuple(map(int, line.split("\t")[:3])) for line in log.splitlines()]
    good = [(start + took, took) for start, status, took in rows if status == 200]
    ends = sorted(end for end, _ in good)
    some = ends[len(ends) // 4 : len(ends) - len(ends) // 4]
    rate = (len(some) - 1) / (some[-1] - some[0]) * 1e6 if len(some) > 1 and some[-1] > some[0] else 0.0
    return Times(rate, [took / 1000 for _, took in good])


async def _first_bytes(ground: Ground, arm: Arm, number: int) -> list[Sample]:
    if arm.few < 1:
        return []
    await ground.engine.knobs(pace_ms=0.0, phase_ms=0.0, jitter=0.0, stamped=False)
    job = Job(
        arm.url, key=arm.key, body=chat_body(200, tokens=16, stream=True), connections=4,
        requests=int(STREAM_RATE * SECONDS), rate=STREAM_RATE,
    )  # fmt: skip
    seen = (await ground.spend(arm, job)).outcome
    tell(f"{STREAMS}, {arm.name}: p50 {seen.ttft_p50_ms:.2f} ms, p99 {seen.ttft_p99_ms:.2f} ms")
    rows = [(LATENCY.format("p50"), seen.ttft_p50_ms), (LATENCY.format("p99"), seen.ttft_p99_ms)]
    return [Sample(name, STREAMS, arm.name, "ms", number, value) for name, value in rows]


QUESTION = Question(
    "latency", "Added latency at fixed rates", METHOD, measure, rounds=5, cases=(*CASES, STREAMS),
    arms=(*ALL, DIRECT), pictures=(ADDED.format("p50"), ADDED.format("p99")), is_compared=False,
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(run(QUESTION))
