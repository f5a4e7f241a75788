"""What an open stream holds in memory, at a thousand and at eight thousand of them."""

import asyncio
import sys
from dataclasses import dataclass

from bench.arms import Arm
from bench.bodies import chat_body
from bench.clocks import private_bytes
from bench.ground import Ground, on_ground
from bench.load import Job
from bench.peers import PEERS, NotInstalled
from bench.question import Asked, Question, run
from bench.rounds import rounds_of, tell
from bench.samples import Sample

KB = "memory a stream"
LOST = "streams lost"
TOTAL = "memory of the gateway"
SIZES = {"1,000 streams": 1000, "8,000 streams": 8000}
WARM_STREAMS, WARM_CHUNKS = 50, 10
PACE_MS = 500.0
FLOW_S = 12.0
"""How long all streams flow together, while memory is read."""

START_A_SECOND = 1000
"""Streams that a gateway may be slow to begin are waited for: so many a second, plus what the slowest one needs."""

SAMPLE_S = 0.5
PROMPT_BYTES = 4096
METHOD = f"""\
A gateway is started for each round; {WARM_STREAMS} short streams warm it up, and what it then holds is *no
streams*. Then come 1,000 streams and after them 8,000, each on a connection of its own, with a prompt of
{PROMPT_BYTES // 1024} KB and a chunk every {PACE_MS:g} ms; memory is read every {SAMPLE_S:g} s from the start until
the last stream ended, and the most that was seen counts. It is the private memory of all processes of the gateway
(`Anonymous` in /proc/PID/smaps_rollup: heaps and stacks, no files); what the kernel keeps for sockets is in
nobody's number. Client and engine are processes of their own. A stream is lost if it does not come to its end with
all of its chunks. LiteLLM is not asked: 2,000 chunks a second are more than one worker of it can send (see what a
chunk costs there)."""


def measure(asked: Asked) -> list[Sample]:
    return on_ground(lambda ground: _measure(ground, asked))


async def _measure(ground: Ground, asked: Asked) -> list[Sample]:
    samples: list[Sample] = []
    for number, order in rounds_of(asked.arms, asked.rounds):
        for name in order if number else ():
            try:
                async with ground.start(name) as arm:
                    samples += await _streams(ground, arm, asked, number)
            except NotInstalled as missing:
                tell(f"left out: {missing}")
    return samples


@dataclass(frozen=True, slots=True)
class Seen:
    """The most memory while streams flowed, and how many did not end whole."""

    bytes_most: int
    lost: int


async def _streams(ground: Ground, arm: Arm, asked: Asked, number: int) -> list[Sample]:
    await _flow(ground, arm, WARM_STREAMS, WARM_CHUNKS, pace_ms=5.0)
    empty = private_bytes(arm.clock.processes())
    samples = [Sample(TOTAL, "no streams", arm.name, "MB", number, empty / 2**20)]
    for case in asked.cases:
        streams = SIZES[case]
        chunks = int((FLOW_S + streams / START_A_SECOND) * 1000 / PACE_MS)
        seen = await _flow(ground, arm, streams, chunks, pace_ms=PACE_MS)
        stream_kb = (seen.bytes_most - empty) / streams / 1024
        tell(f"{case}, {arm.name}: {stream_kb:.1f} KB a stream, {seen.lost} lost")
        samples += [
            Sample(TOTAL, case, arm.name, "MB", number, seen.bytes_most / 2**20),
            Sample(KB, case, arm.name, "KB", number, stream_kb),
            Sample(LOST, case, arm.name, "", number, seen.lost),
        ]
    return samples


async def _flow(ground: Ground, arm: Arm, streams: int, chunks: int, *, pace_ms: float) -> Seen:
    await ground.engine.knobs(pace_ms=pace_ms, phase_ms=pace_ms, jitter=0.2, stamped=False)
    # One event more than tokens: the first one says that the assistant speaks.
    job = Job(
        arm.url, key=arm.key, body=chat_body(PROMPT_BYTES, tokens=chunks, stream=True), connections=streams,
        requests=streams, events=chunks + 1, give_up_s=300.0,
    )  # fmt: skip
    running = asyncio.create_task(ground.load.run(job))
    most = 0
    while not running.done():
        most = max(most, private_bytes(arm.clock.processes()))
        await asyncio.wait({running}, timeout=SAMPLE_S)
    outcome = await running
    whole = outcome.verdicts.get("whole", 0)
    lost = streams - whole + outcome.wrong_length
    if not lost:
        await arm.settle(streams)
    return Seen(most, lost)


QUESTION = Question(
    "memory", "Memory a stream", METHOD, measure, rounds=5, cases=tuple(SIZES),
    arms=("poolgate", *(peer.name for peer in PEERS if peer.streams_max)), pictures=(KB,),
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(run(QUESTION))
