"""Prompts that share system prompts: how often engines find them in their caches, by policy, and how even the load stays.

Before stand-ins; `bench.prefix_vllm` asks the same of real engines.
"""

import asyncio
import random
import re
import sys
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.arms import OURS, Arm, Shipping, peer
from bench.bodies import MODEL, NUMBER
from bench.clocks import CpuClock
from bench.ground import Ground, on_ground
from bench.load import Job, Outcome
from bench.peers import NotInstalled, VllmRouter
from bench.processes import free_port, served
from bench.question import Asked, Question, run
from bench.rounds import rounds_of, tell
from bench.samples import Sample
from tests.fakes.engine import FakeEngine

HITS = "prompt tokens found in a cache"
GAIN = "times what a random choice finds"
AGAINST_PEER = "times what vllm-router's cache-aware policy finds"
LENGTH = "prompt tokens a request"
BUSIEST = "busiest node, times the mean"
TTFT = "first byte of a stream, p50"
AGAINST_TWO = "times the first byte's p50 of power of two"

RANDOM, TWO, PEER = "at random", "power of two", "vllm-router, cache-aware"
STAND_INS, COLD = "4 stand-ins", "4 stand-ins, cold prompts"

PROMPTS, PROMPT_BYTES = 64, 4200
WORKERS = 2
BLOCK = 32
BLOCKS = (PROMPTS // 3) * 34
"""A node's KV cache: a third of the system prompts with their questions, of about 1,080 tokens each."""

SETTINGS: dict[str, dict[str, Any]] = {
    OURS: {}, RANDOM: {"routing_policy": "load", "choice_sample": 1},
    TWO: {"routing_policy": "load", "choice_sample": 2},
}  # fmt: skip
METHOD = f"""\
{PROMPTS} system prompts of about 1,000 tokens, each request one of them at random with a question of its own, streamed
answers of 16 tokens. The KV cache of a node holds a third of them (`--num-gpu-blocks-override {BLOCKS} --block-size
{BLOCK}`). *Found in a cache* is what the engines say (`vllm:prefix_cache_hits_total` of `..._queries_total`), after as
many requests that warm up. The stand-ins take 120 ms for 1,000 uncached tokens and 4 ms a token of an answer; as
vLLM, they compute one prompt after the other, in steps of 2,048 tokens that all others wait for
(`bench/fake_engine/prefills.py` has what was measured). 12 requests are in flight. poolgate runs {WORKERS} workers;
*at random* and *power of two* are poolgate with `routing_policy` load and a
sample of 1 and of 2; vllm-router runs with `--policy cache_aware` as it comes;
it has engines tokenise each prompt first, which they only do with `--enable-scale-out`. *Cold prompts* are all different, so
that there is nothing to find."""


@dataclass(frozen=True, slots=True)
class Load:
    """What one case sends, and to which engines."""

    requests: int
    connections: int
    engines: Callable[[Path], AbstractAsyncContextManager[list[str]]]
    is_cold: bool = False
    is_timed: bool = True


class RouterByCache(VllmRouter):
    """vllm-router with the policy that it has for this."""

    def command(self, port: int, engines: Sequence[str], folder: Path) -> list[str]:
        words = super().command(port, engines, folder)
        return ["cache_aware" if word == "round_robin" else word for word in words]


def measure(asked: Asked) -> list[Sample]:
    return measured(LOADS, asked)


def measured(loads: Mapping[str, Load], asked: Asked) -> list[Sample]:
    """The cases by their loads."""
    samples = on_ground(lambda ground: _measure(ground, loads, asked))
    return samples + _ratios(samples)


async def _measure(ground: Ground, loads: Mapping[str, Load], asked: Asked) -> list[Sample]:
    samples: list[Sample] = []
    for case in asked.cases:
        try:
            samples += await _case(ground, asked, case, loads[case])
        except NotInstalled as missing:
            tell(f"left out: {case}: {missing}")
    return samples


async def _case(ground: Ground, asked: Asked, case: str, load: Load) -> list[Sample]:
    """All arms before the same engines. Raises NotInstalled where there are none."""
    samples: list[Sample] = []
    async with AsyncExitStack() as stack:
        engines = await stack.enter_async_context(load.engines(ground.folder))
        arms = []
        for name in asked.arms:
            tell(f"{case}: starting {name}")
            try:
                arms.append(await stack.enter_async_context(_arm(ground, name, engines)))
            except NotInstalled as missing:
                tell(f"left out: {missing}")
        for number, order in rounds_of(arms, asked.rounds):
            for arm in order if number else ():
                samples += await _one(ground, case, load, arm, engines, number)
    return samples


async def _one(
    ground: Ground, case: str, load: Load, arm: Arm, engines: Sequence[str], number: int
) -> list[Sample]:
    await asyncio.gather(*(asyncio.to_thread(_forget, engine) for engine in engines))
    rng = random.Random(number)
    await _put_on(ground, arm, load, rng)
    before = [await asyncio.to_thread(counters, engine) for engine in engines]
    seen = await _put_on(ground, arm, load, rng)
    after = [await asyncio.to_thread(counters, engine) for engine in engines]
    asked, found, turns = (
        [now[name] - then[name] for now, then in zip(after, before, strict=True)] for name in COUNTERS
    )
    share, busiest = sum(found) / sum(asked) * 100, max(turns) * len(turns) / sum(turns)
    length = sum(asked) / sum(turns)
    tell(
        f"{case}, {arm.name}: {share:.1f} % of {length:.0f} tokens found, busiest {busiest:.2f},"
        f" first byte {seen.ttft_p50_ms:.0f} ms"
    )
    rows = [(BUSIEST, "x", busiest), (LENGTH, "", length)]
    if not load.is_cold:
        rows.insert(0, (HITS, "%", share))
    if load.is_timed:
        rows.append((TTFT, "ms", seen.ttft_p50_ms))
    return [Sample(name, case, arm.name, unit, number, value) for name, unit, value in rows]


async def _put_on(ground: Ground, arm: Arm, load: Load, rng: random.Random) -> Outcome:
    count = load.requests if load.is_cold else PROMPTS
    job = Job(
        arm.url, key=arm.key, bodies=[_body(rng if load.is_cold else random.Random(n)) for n in range(count)],
        seed=0 if load.is_cold else rng.randrange(1, 10**9), connections=load.connections, requests=load.requests,
        give_up_s=300.0,
    )  # fmt: skip
    outcome = await ground.load.run(job)
    assert outcome.verdicts == {"whole": load.requests}, (arm.name, outcome)
    await arm.settle(load.requests)
    return outcome


def _body(rng: random.Random) -> dict[str, Any]:
    """A chat whose system prompt is `rng`'s, with a question that is never asked again."""
    words = []
    size = 0
    while size < PROMPT_BYTES:
        words.append(WORDS[rng.randrange(len(WORDS))])
        size += len(words[-1]) + 1
    messages = [
        {"role": "system", "content": " ".join(words)}, {"role": "user", "content": f"Question {NUMBER}?"},
    ]  # fmt: skip
    return {
        "model": MODEL, "messages": messages, "max_tokens": 16, "ignore_eos": True, "stream": True,
    }  # fmt: skip


WORDS = (
    "answer", "question", "system", "person", "always", "never", "please", "short", "long", "number", "city", "house",
    "water", "light", "music", "paper", "river", "mountain", "table", "window", "garden", "winter", "summer", "evening",
    "a", "of", "to", "in", "is", "it", "on", "by", "we", "he", "or", "an", "as", "at", "be", "do", "if", "no", "so",
    "up", "my", "me", "and", "the", "for", "you", "not", "are", "can", "was", "but", "all",
    "yes,", "now;", "then.", "well,", "7,", "12,", "30.", "lattice", "zephyr",
)  # fmt: skip
"""Mixed so that a token has about four bytes, as in most text."""


def _ratios(samples: Sequence[Sample]) -> list[Sample]:
    """Ours by another's of the same round."""
    known = {(one.measure, one.case, one.arm, one.round): one.value for one in samples}
    found = []
    for measure_, name, other in ((HITS, GAIN, RANDOM), (HITS, AGAINST_PEER, PEER), (TTFT, AGAINST_TWO, TWO)):
        for (of, case, arm, number), value in known.items():
            base = known.get((measure_, case, other, number))
            if (of, arm) == (measure_, OURS) and base and (measure_ == HITS or case == COLD):
                found.append(Sample(name, case, OURS, "x", number, value / base))
    return found


# --- engines and arms -------------------------------------------------------------------------------------------------


@asynccontextmanager
async def stand_ins(_: Path) -> AsyncIterator[list[str]]:
    """Four processes, each with a cache of its own."""
    flags = (
        "--enable-scale-out",
        "--no-record",
        "--max-model-len",
        "2048",
        "--block-size",
        str(BLOCK),
        "--num-gpu-blocks",
        str(BLOCKS),
    )
    async with AsyncExitStack() as stack:
        engines = [
            await stack.enter_async_context(FakeEngine(*flags, ttft_per_1k_ms=120.0, pace_ms=4.0))
            for _ in range(4)
        ]
        yield [engine.url for engine in engines]


@asynccontextmanager
async def _arm(ground: Ground, name: str, engines: Sequence[str]) -> AsyncIterator[Arm]:
    folder = ground.folder / f"{name.partition(',')[0]}-{free_port()}"
    folder.mkdir()
    if name == PEER:
        async with peer(RouterByCache(), engines, folder) as other:
            yield replace(other, name=PEER)
        return
    async with ground.database(folder) as (settings, pool):
        settings = replace(settings, workers=WORKERS, **SETTINGS[name])
        async with served(settings, pool, folder) as gateway:
            for engine in engines:
                await gateway.register(engine, kv_tokens=BLOCKS * BLOCK, block_size=BLOCK)
            await gateway.until_engines(len(engines))
            yield Arm(name, gateway.url, gateway.key, CpuClock(gateway.process.pid), Shipping(gateway))


COUNTERS = ("prefix_cache_queries_total", "prefix_cache_hits_total", "request_success_total")


def counters(engine: str) -> dict[str, float]:
    """What an engine says that it did, summed over labels."""
    with urllib.request.urlopen(f"{engine}/metrics", timeout=60) as answer:
        text = answer.read().decode()
    return {
        name: sum(map(float, re.findall(rf"^vllm:{name}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)))
        for name in COUNTERS
    }


def _forget(engine: str) -> None:
    """Empty its cache."""
    for path in ("/reset_prefix_cache", "/_fake/reset"):
        try:
            with urllib.request.urlopen(urllib.request.Request(engine + path, b""), timeout=60):
                return
        except urllib.error.HTTPError:
            continue
    raise AssertionError(f"{engine} does not forget")


LOADS = {STAND_INS: Load(960, 12, stand_ins), COLD: Load(480, 12, stand_ins, is_cold=True)}

QUESTION = Question(
    "prefix", "Prompts that begin alike", METHOD, measure, rounds=3, cases=tuple(LOADS),
    arms=(OURS, RANDOM, TWO, PEER), is_compared=False,
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(run(QUESTION))
