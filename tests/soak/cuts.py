"""Streams cut at random points, by their clients and by their engines: what is charged is what was delivered.

In lockstep, where the engine waits for the client's receipt of each event, to the token; when everything flows freely
nothing under what the client has and nothing over what the engine sent. A failure names its seed, which
`POOLGATE_CUTS_SEED` sets.
"""

import asyncio
import os
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg

from bench.processes import MODEL, Served, served
from billing import audit
from billing.money import NANO
from billing.prices import PriceBook, cost_nano
from config.defaults import Settings
from gateway.identity.accounts import AccountStore
from tests.fakes.cutting import LEAVINGS, Counted, Seen, Stream, counted, delivered, read, written
from tests.fakes.engine import FakeEngine
from tests.waiting import eventually

TOKENS = 14
AT_ONCE = 8
"""Streams in flight: more would only wait for the two cores of a small machine."""

CHUNK_TIMEOUT_S = 5.0
"""A stalled engine's; no receipt takes so long."""

CREDITED_NANO = 1_000_000 * NANO
FAULTS = ("close", "reset", "error_mid", "truncated_chunk", "no_finish")
USAGE: tuple[dict[str, Any], ...] = (
    {},
    {"stream_options": {"include_usage": True}},
    {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
)

# What a tokenizer makes of texts whose characters take several tokens: all but the last of them show nothing.
SPLIT = [
    "Caf",
    "é",
    "",
    "",
    "\U0001f98a",
    " ",
    "",
    "日",
    "",
    "本",
    "語",
    "",
    "",
    "\U0001f469‍\U0001f4bb",
    " и",
]
ARGUMENTS = ['{"', "city", '":"', "Zü", "", "rich", " ", "", "東", "京", '","n', '":', "1", "}"]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


@dataclass(frozen=True, slots=True)
class Scene:
    """A kind of stream: what is asked, how the stand-in says it, and after how many events at most a client leaves."""

    name: str
    body: dict[str, Any]
    knobs: dict[str, Any] = field(default_factory=dict)
    path: str = "/v1/chat/completions"
    events: int = TOKENS + 1
    unasked: int = 1  # events that the client never sees, before its first one
    fault: str | None = None

    @property
    def n(self) -> int:
        return int(self.body.get("n", 1))


SCENES = (
    Scene("one answer", {}),
    Scene("merged events", {}, {"merge": 3}, events=6),
    Scene("two answers", {"n": 2}, events=2 * TOKENS + 2),
    Scene("two answers of unequal length, merged", {"n": 2, "ignore_eos": False},
          {"answer": [SPLIT[:5], SPLIT], "merge": 2}, events=12),
    Scene("tools", {"tools": [TOOL], "tool_choice": "required", "n": 2, "ignore_eos": False},
          {"tool_arguments": ARGUMENTS}, events=24),
    Scene("characters of several tokens", {}, {"answer": SPLIT}, events=10),
    Scene("a byte at a time", {}, {"answer": SPLIT}, events=10, fault="drip"),
    Scene("tokens without text", {"n": 2}, {"textless_every": 3, "merge": 2}, events=15),
    Scene("three prompts", {"prompt": ["One, two,", "Three", "Four and five"]}, path="/v1/completions",
          events=3 * TOKENS),
    Scene("two prompts with two answers each", {"prompt": ["One, two,", "Three"], "n": 2}, {"merge": 3},
          path="/v1/completions", events=18),
    Scene("complete", {"prompt": "Hello"}, {"answer": SPLIT, "merge": 2}, path="/v1/complete/stream", events=7,
          unasked=2),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Size:
    """Cuts of each scene: by clients and by engines in lockstep, by clients and engines in free flow. And of all: `stalls`
    of an engine, clients that leave before the `early` first event, and `deaths` of an engine."""

    by_clients: int
    by_engines: int
    free: int
    stalls: int
    early: int
    deaths: int
    cuts_min: int


SHORT = Size(by_clients=4, by_engines=1, free=3, stalls=2, early=2, deaths=1, cuts_min=55)
LONG = Size(by_clients=60, by_engines=20, free=40, stalls=24, early=24, deaths=6, cuts_min=1000)


@dataclass(slots=True)
class Tally:
    """What it came to, in free flow and in lockstep."""

    cuts: Counter[str] = field(default_factory=Counter)
    whole: int = 0
    received: int = 0
    charged: int = 0
    sent: int = 0
    lockstep: int = 0


@dataclass(slots=True)
class Run:
    """One run over one gateway and one engine. Each stream has a number, which its prompt ends with."""

    gateway: Served
    engine: FakeEngine
    rng: random.Random
    tally: Tally = field(default_factory=Tally)
    numbers: "count[int]" = field(default_factory=count)
    prices: PriceBook = field(default_factory=PriceBook.load)

    async def lockstep(self, scene: Scene, by_clients: int, by_engines: int) -> None:
        """Cuts of one scene at which nothing is under way: exact."""
        leaves = [self._leaves(scene) for _ in range(by_clients)]
        fails = [self._stream(scene) for _ in range(by_engines)]
        faults = [self._fault(scene, stream, self.rng.choice(FAULTS)) for stream in fails]
        await self._batch(scene, leaves + fails, faults, lockstep=scene.unasked)

    async def stalls(self, stalls: int) -> None:
        """An engine that falls silent, in lockstep: the client is told, and pays for what came before."""
        scene = SCENES[3]
        streams = [self._stream(scene) for _ in range(stalls)]
        faults = [self._fault(scene, stream, "stall") for stream in streams]
        await self._batch(scene, streams, faults, lockstep=1)

    async def free(self, scene: Scene, cuts: int) -> None:
        """Cuts while everything flows, at once or at the pace of tokens."""
        for pace_ms in (0.0, 2.0):
            streams = [self._leaves(scene) for _ in range(cuts // 2 + cuts % 2 * (pace_ms > 0))]
            fails = [self._stream(scene) for _ in range(cuts // 8)]
            faults = [self._fault(scene, stream, self.rng.choice(FAULTS)) for stream in fails]
            await self._batch(scene, streams + fails, faults, pace_ms=pace_ms, jitter=0.5)

    async def early(self, clients: int) -> None:
        """Clients that leave before anything came: nothing is charged, though the engine has the prompt."""
        await self._engine_as(SCENES[0], [], lockstep=0)
        asking = [
            asyncio.create_task(read(self.gateway.url, self.gateway.key, self._stream(SCENES[0])))
            for _ in range(clients)
        ]
        await self.engine.until(lambda record: record["running"] == clients)
        for task in asking:
            task.cancel()
        await asyncio.wait(asking)
        entries = await self._ended()
        for entry in entries:
            row = await self._row(entry["request_id"])
            assert (row["outcome"], _charged(row)) == ("client_gone", Counted()), dict(row)
            assert row["amount_nano"] == 0
            self.tally.cuts["before the first event"] += 1
        assert len(entries) == clients

    async def deaths(self, deaths: int) -> None:
        """The engine's process ends in a stream's midst and its record with it: the client's own events are the proof."""
        body = SCENES[0].body | USAGE[2]
        for _ in range(deaths):
            stream = self._stream(replace(SCENES[0], body=body))
            after = self.rng.randint(1, TOKENS - 1)
            await self._engine_as(SCENES[0], [self._fault(SCENES[0], stream, "die", after)], lockstep=1)
            seen = await read(self.gateway.url, self.gateway.key, replace(stream, tells=self.engine))
            await self.engine.wait()
            row = await self._row(seen.request_id)
            assert seen.error is not None, seen
            assert (row["outcome"], row["completion_tokens"]) == ("engine_failed", after), (dict(row), seen)
            assert _charged(row) == counted(seen.events, 1), (dict(row), seen)
            self._is_priced(row)
            self.tally.cuts["the engine died"] += 1
            self.tally.lockstep += after
            await self.engine.start()

    async def books(self) -> None:
        """Everything paid in is there, is held, or was spent; nothing is held any more, and what was spent are the turns."""
        turns = await self.gateway.pool.fetchval("select sum(amount_nano)::bigint from usage")

        async def add_up() -> bool:
            account = await AccountStore(self.gateway.pool).show(self.gateway.account_id)
            assert account.balance_nano + account.held_nano + account.spent_nano == CREDITED_NANO, account
            return account.held_nano == 0 and account.spent_nano == turns

        await eventually(add_up)

    # --- one batch ------------------------------------------------------------------------------------------------

    def _stream(self, scene: Scene) -> Stream:
        said = f"Tell me a story. #{next(self.numbers):06d}."
        body = {"model": MODEL, "stream": True, "max_tokens": TOKENS, "ignore_eos": True} | scene.body
        if scene.path == "/v1/chat/completions":
            body["messages"] = [{"role": "user", "content": said}]
        elif isinstance(body["prompt"], list):
            body["prompt"] = [*body["prompt"][:-1], said]
        else:
            body["prompt"] = said
        if scene.path == "/v1/complete/stream":
            del body["stream"]
            del body["ignore_eos"]
        elif "stream_options" not in body:
            body |= self.rng.choice(USAGE)
        return Stream(scene.path, body)

    def _leaves(self, scene: Scene) -> Stream:
        after, leaving = self.rng.randint(1, scene.events), self.rng.choice(LEAVINGS)
        return replace(self._stream(scene), leaves_after=after, leaving=leaving)

    def _fault(self, scene: Scene, stream: Stream, kind: str, after: int | None = None) -> dict[str, Any]:
        """The stand-in's order to fail at this stream. 0 is right after the headers: before the first event."""
        least = 1 if kind == "stall" else 0  # for its first event an engine has much longer
        after = self.rng.randint(least, TOKENS - 2) if after is None else after
        return {"kind": kind, "after": after, "times": 1, "contains": _number(stream)}

    async def _batch(
        self, scene: Scene, streams: Sequence[Stream], faults: list[dict[str, Any]], **knobs: Any
    ) -> None:
        if scene.fault is not None:
            faults = [*faults, {"kind": scene.fault, "times": None}]
        await self._engine_as(scene, faults, **knobs)
        is_lockstep = "lockstep" in knobs
        turn = asyncio.Semaphore(AT_ONCE)

        async def ask(stream: Stream) -> Seen:
            async with turn:
                told = replace(stream, tells=self.engine) if is_lockstep else stream
                return await read(self.gateway.url, self.gateway.key, told)

        answers = await asyncio.gather(*map(ask, streams))
        entries = {entry["request_id"]: entry for entry in await self._ended()}
        for stream, seen in zip(streams, answers, strict=True):
            words = f"{scene.name}, {knobs}, {stream}, {faults}"
            try:
                row = await self._row(seen.request_id)
                self._judge(scene, seen, entries.get(seen.request_id), row, is_lockstep=is_lockstep)
            except AssertionError as error:
                raise AssertionError(f"{words}\n{seen}\n{error}") from error

    async def _engine_as(self, scene: Scene, faults: list[dict[str, Any]], **knobs: Any) -> None:
        usual = {"answer": None, "merge": 1, "textless_every": 0, "lockstep": None, "pace_ms": 0.0}
        await self.engine.reset()
        await self.engine.knobs(**usual | scene.knobs | knobs, record_events=True, faults=faults)

    async def _ended(self) -> list[dict[str, Any]]:
        """What the engine wrote, once it is at rest."""
        record = await self.engine.until(lambda record: record["running"] == record["waiting"] == 0)
        return list(record["requests"])

    async def _row(self, request_id: str) -> asyncpg.Record:
        rows: list[asyncpg.Record] = []

        async def is_there() -> bool:
            rows[:] = await self.gateway.pool.fetch(
                "select *, extract(epoch from started_at)::float8 as started_s from usage where turn_id = $1",
                UUID(request_id.removeprefix("req_")),
            )
            return bool(rows)

        await eventually(is_there)
        (row,) = rows
        return row

    # --- what must hold -------------------------------------------------------------------------------------------

    def _judge(
        self,
        scene: Scene,
        seen: Seen,
        entry: dict[str, Any] | None,
        row: asyncpg.Record,
        *,
        is_lockstep: bool,
    ) -> None:
        assert entry is not None, "the engine knows nothing of it"
        charged = _charged(row)
        if seen.status != 200 or (seen.error is not None and not seen.events):
            assert (charged, row["amount_nano"]) == (Counted(), 0), dict(row)
            assert seen.error is not None
            self.tally.cuts["before the first event"] += 1
            return
        sent = written(entry["events"])
        received, most = delivered(scene.path, sent, seen, scene.n), counted(sent, scene.n)
        outcome = row["outcome"]
        assert not row["estimated"]
        assert most.completion <= entry["tokens_written"]
        if is_lockstep and outcome != "finished":
            assert charged == received, (charged, received, dict(row))
            self.tally.lockstep += charged.completion
        else:
            assert received <= charged <= most, (received, charged, most, dict(row))
        if outcome == "finished":
            assert charged == Counted(entry["prompt_tokens"], entry["tokens_written"]), dict(row)
            assert entry["finished"]
            self.tally.whole += 1
        elif outcome == "engine_failed":
            assert seen.error is not None or seen.has_left, "the client was not told"
            assert not seen.is_done
            assert not entry["finished"]
        else:
            assert (outcome, seen.has_left) == ("client_gone", True), dict(row)
        self._is_priced(row)
        if outcome != "finished":
            how = "in lockstep" if is_lockstep else "in free flow"
            self.tally.cuts[f"{'by clients' if outcome == 'client_gone' else 'by engines'} {how}"] += 1
            if not is_lockstep:
                self.tally.received += received.completion
                self.tally.charged += charged.completion
                self.tally.sent += most.completion

    def _is_priced(self, row: asyncpg.Record) -> None:
        price = self.prices.price(MODEL, row["started_s"])
        tokens = row["prompt_tokens"], row["cached_tokens"], row["completion_tokens"]
        assert (row["amount_nano"], row["loss_nano"]) == (cost_nano(price, *tokens), 0), dict(row)


async def streams_cut(
    settings: Settings, pool: asyncpg.Pool, folder: Path, size: Size, tell: Callable[[str], None] = print
) -> dict[str, float]:
    """Every scene cut in every way, each turn held against the engine's record; at the end the book is audited."""
    seed = int(os.environ.get("POOLGATE_CUTS_SEED") or random.SystemRandom().randrange(2**32))
    settings = replace(
        settings, workers=2, heartbeat_grace_s=3600.0, heartbeat_interval_s=30.0, chunk_timeout_s=CHUNK_TIMEOUT_S,
        breaker_failures=1000, usage_flush_s=0.05,
    )  # fmt: skip
    try:
        async with served(settings, pool, folder) as gateway, FakeEngine() as engine:
            await gateway.register(engine.url)
            run = Run(gateway, engine, random.Random(seed))
            await _all(run, size, tell)
        broken = [found for found in await audit.run(pool, settings) if found.state != "ok"]
        assert not broken, broken
    except AssertionError as error:
        raise AssertionError(f"POOLGATE_CUTS_SEED={seed}\n{error}") from error
    numbers = _numbers(run.tally)
    tell(str(numbers))
    assert sum(run.tally.cuts.values()) >= size.cuts_min, (seed, numbers)
    return numbers


async def _all(run: Run, size: Size, tell: Callable[[str], None]) -> None:
    for scene in SCENES:
        await run.lockstep(scene, size.by_clients, size.by_engines)
        await run.free(scene, size.free)
        tell(f"{scene.name}: {sum(run.tally.cuts.values())} cuts so far")
    await run.stalls(size.stalls)
    await run.early(size.early)
    await run.deaths(size.deaths)
    await run.books()


def _charged(row: asyncpg.Record) -> Counted:
    return Counted(row["prompt_tokens"], row["completion_tokens"])


def _number(stream: Stream) -> str:
    asked = stream.body["messages"][0]["content"] if "messages" in stream.body else stream.body["prompt"]
    text = asked[-1] if isinstance(asked, list) else asked
    return str(text[text.index("#") :])


def _numbers(tally: Tally) -> dict[str, float]:
    ways: Iterable[tuple[str, int]] = sorted(tally.cuts.items())
    return {
        "cuts": sum(tally.cuts.values()),
        **dict(ways),
        "streams that ended before they were cut": tally.whole,
        "tokens charged in lockstep, each of them delivered": tally.lockstep,
        "tokens received in free flow, at least": tally.received,
        "tokens charged in free flow": tally.charged,
        "tokens sent in free flow": tally.sent,
    }
