"""The load of benchmarks and soaks: raw HTTP/1.1 on kept connections, cheap enough to share a core with what it measures.

It sends what it is told and says what came back; what the answers should be is its caller's to say. As a process
(`python -m bench.load`) it reads one job a line as JSON and answers each with one line.
"""

import asyncio
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import count, cycle
from random import Random, randrange
from time import perf_counter  # uvloop tells whole milliseconds
from typing import Any, Literal
from urllib.parse import urlsplit

import httptools
import uvloop

from bench.bodies import NUMBER
from bench.samples import quantile
from bench.stamps import ages_ms

Verdict = Literal["whole", "refused", "error_event", "cut", "reset", "silent"]
"""How a request ended for its client: `refused` is an HTTP error, or an error event before any other; `error_event` one
after some; `cut` an answer that stops without either; `reset` no answer at all; `silent` nothing within the bound."""

GIVE_UP_S = 120.0
STARTED_TOGETHER_MAX = 200
"""Connections opened at a time: a thousand at once would measure the backlog."""


@dataclass(slots=True)
class Answer:
    """What came back for one request. Times are seconds since it was sent; `first_s` is that of the body's first byte."""

    status: int = 0
    body: bytes = b""
    is_ended: bool = False
    gave_up: bool = False
    seconds: float = 0.0
    first_s: float = 0.0
    local_port: int = 0

    @property
    def is_stream(self) -> bool:
        return self.body.startswith((b"data: ", b": "))

    @property
    def events(self) -> int:
        """Chunks of a stream: all events but `[DONE]`, errors and usage."""
        return self.body.count(b'"choices":[{')

    @property
    def verdict(self) -> Verdict:
        if self.gave_up:
            return "silent"
        if self.status >= 400:
            return "refused"
        if b'data: {"error":' in self.body:
            return "error_event" if self.events else "refused"
        is_whole = b"data: [DONE]" in self.body and b'"finish_reason":"' in self.body
        if self.is_ended and (is_whole or not self.is_stream):
            return "whole"
        return "cut" if self.status else "reset"


class Client(asyncio.Protocol):
    """One connection, one request at a time; it connects again when it has to. `ages` takes those of stamped chunks."""

    def __init__(self, host: str, port: int, ages: list[float] | None = None) -> None:
        self._host, self._port = host, port
        self._loop = asyncio.get_running_loop()
        self._transport: Any = None
        self._answered: asyncio.Future[None] | None = None
        self._answer = Answer()
        self._parts: list[bytes] = []
        self._ages = ages
        self._started_s = 0.0
        self.local_port = 0

    async def ask(self, request: bytes, give_up_s: float = GIVE_UP_S) -> Answer:
        """Send it; whatever happens comes back as an answer."""
        self._started_s = perf_counter()
        self._answer, self._parts = Answer(), []
        self._answered = self._loop.create_future()
        timer = self._loop.call_later(give_up_s, self._give_up)
        try:
            if self._transport is None or self._transport.is_closing():
                await self._loop.create_connection(lambda: self, self._host, self._port)
            self._answer.local_port = self.local_port
            self._transport.write(request)
            await self._answered
        except OSError:
            pass  # an answer without a status: `reset`
        finally:
            timer.cancel()
        self._answer.body = b"".join(self._parts)
        self._answer.seconds = perf_counter() - self._started_s
        return self._answer

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._parser = httptools.HttpResponseParser(self)
        self.local_port = transport.get_extra_info("sockname")[1]

    def data_received(self, data: bytes) -> None:
        if self._ages is not None:
            self._ages += ages_ms(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end()

    def on_headers_complete(self) -> None:
        self._answer.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        if not self._parts:
            self._answer.first_s = perf_counter() - self._started_s
        self._parts.append(body)

    def on_message_complete(self) -> None:
        self._answer.is_ended = True
        if not self._parser.should_keep_alive():
            self._transport.close()
        self._end()

    def _give_up(self) -> None:
        self._answer.gave_up = True
        self.close()
        self._end()

    def _end(self) -> None:
        if self._answered is not None and not self._answered.done():
            self._answered.set_result(None)


@dataclass(frozen=True, slots=True)
class Job:
    """A load. With `rate` requests start at even times whatever becomes of the earlier ones, else each connection sends
    its next one when it has its answer. `keys`: one request each, in turn, instead of all by `key`. `bodies`: one of them
    each (at random by `seed`, in turn without one) instead of `body`. `events`: chunks that a whole stream must have.
    `stamped`: chunks carry stamps (`bench.stamps`). A body may be numbered (`bench.bodies`)."""

    url: str
    path: str = "/v1/chat/completions"
    key: str = ""
    keys: Sequence[str] = ()
    body: dict[str, Any] = field(default_factory=dict)
    bodies: Sequence[dict[str, Any]] = ()
    seed: int = 0
    connections: int = 1
    requests: int = 1
    rate: float = 0.0
    events: int | None = None
    stamped: bool = False
    give_up_s: float = GIVE_UP_S


@dataclass(slots=True)
class Outcome:
    """What a job came to, in milliseconds: whole answers, the first byte of a stream's body, the age of a stamped chunk when
    it came. `ages` counts the stamps."""

    verdicts: dict[str, int]
    statuses: dict[str, int]
    events: int
    wrong_length: int
    seconds: float
    p50_ms: float
    p99_ms: float
    ttft_p50_ms: float
    ttft_p99_ms: float
    age_p50_ms: float
    age_p99_ms: float
    ages: int


def request_bytes(job: Job) -> bytes:
    """The request that a job sends again and again."""
    parts = urlsplit(job.url)
    body = json.dumps(job.body).encode()
    key = f"authorization: Bearer {job.key}\r\n" if job.key else ""
    head = (
        f"POST {job.path} HTTP/1.1\r\nhost: {parts.netloc}\r\n{key}content-type: application/json\r\n"
        f"accept: application/json\r\nuser-agent: poolgate-bench\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def requests_of(job: Job) -> Iterator[bytes]:
    """One after the other, without end."""
    if job.bodies:
        each = [requests_of(replace(job, body=body, bodies=())) for body in job.bodies]
        if not job.seed:
            return map(next, cycle(each))
        rng = Random(job.seed)
        return (next(each[rng.randrange(len(each))]) for _ in count())
    mark = b"-the-key-"
    before, after = request_bytes(replace(job, key=mark.decode())).split(mark)
    keys = cycle(key.encode() for key in job.keys or (job.key,))
    start, is_numbered, end = after.partition(NUMBER.encode())
    if is_numbered:
        numbers = count(randrange(10**8))
        return (b"%b%b%b%08d%b" % (before, next(keys), start, next(numbers) % 10**8, end) for _ in count())
    return (before + key + after for key in keys) if job.keys else cycle((request_bytes(job),))


async def run(job: Job) -> Outcome:
    """Put the load on, and wait for the last answer."""
    parts = urlsplit(job.url)
    host, port = parts.hostname or "", parts.port or 80
    requests = requests_of(job)
    tally = Tally(job.events)
    ages = tally.ages if job.stamped else None
    clients = [Client(host, port, ages) for _ in range(job.connections)]
    started_s = perf_counter()
    if job.rate:
        await _at_rate(job, clients, requests, tally)
    else:
        await _in_turn(job, clients, requests, tally)
    seconds = perf_counter() - started_s
    for client in clients:
        client.close()
    return tally.outcome(seconds)


async def _in_turn(job: Job, clients: list[Client], requests: Iterator[bytes], tally: "Tally") -> None:
    left = job.requests
    opening = asyncio.Semaphore(STARTED_TOGETHER_MAX)

    async def work(client: Client) -> None:
        nonlocal left
        async with opening:
            await asyncio.sleep(0)
        while left > 0:
            left -= 1
            tally.add(await client.ask(next(requests), job.give_up_s))

    await asyncio.gather(*map(work, clients))


async def _at_rate(job: Job, clients: list[Client], requests: Iterator[bytes], tally: "Tally") -> None:
    """Latency is counted from when a request was due, so a stall is not hidden by the requests that it holds up."""
    idle = list(clients)
    host, port = urlsplit(job.url).hostname or "", urlsplit(job.url).port or 80
    began_s = perf_counter() + 0.05

    async def one(due_s: float) -> None:
        client = idle.pop() if idle else Client(host, port)
        late_s = max(0.0, perf_counter() - due_s)
        answer = await client.ask(next(requests), job.give_up_s)
        answer.seconds += late_s
        answer.first_s += late_s
        idle.append(client)
        tally.add(answer)

    tasks = []
    for number in range(job.requests):
        due_s = began_s + number / job.rate
        await asyncio.sleep(max(0.0, due_s - perf_counter()))
        tasks.append(asyncio.create_task(one(due_s)))
    await asyncio.gather(*tasks)
    for client in idle:
        client.close()


class Tally:
    """Counts answers as they come: bodies are not kept."""

    def __init__(self, events: int | None) -> None:
        self._expected = events
        self._verdicts: Counter[str] = Counter()
        self._statuses: Counter[str] = Counter()
        self._events = 0
        self._wrong_length = 0
        self._latencies: list[float] = []
        self._ttfts: list[float] = []
        self.ages: list[float] = []

    def add(self, answer: Answer) -> None:
        verdict = answer.verdict
        self._verdicts[verdict] += 1
        self._statuses[str(answer.status)] += 1
        if answer.is_stream:
            self._events += answer.events
            self._wrong_length += self._expected is not None and answer.events != self._expected
        if verdict == "whole":
            self._latencies.append(answer.seconds * 1000)
            if answer.is_stream:
                self._ttfts.append(answer.first_s * 1000)

    def outcome(self, seconds: float) -> Outcome:
        return Outcome(
            dict(self._verdicts), dict(self._statuses), self._events, self._wrong_length, seconds,
            p50_ms=quantile(self._latencies, 0.5), p99_ms=quantile(self._latencies, 0.99),
            ttft_p50_ms=quantile(self._ttfts, 0.5), ttft_p99_ms=quantile(self._ttfts, 0.99),
            age_p50_ms=quantile(self.ages, 0.5), age_p99_ms=quantile(self.ages, 0.99), ages=len(self.ages),
        )  # fmt: skip


async def _serve() -> None:
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        outcome = await run(Job(**json.loads(line)))
        print(json.dumps(asdict(outcome)), flush=True)


if __name__ == "__main__":
    uvloop.run(_serve())
