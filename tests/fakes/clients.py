"""Clients that remember what they saw of each request: its id, its status, the tokens that arrived, how it ended.

Raw HTTP/1.1 on kept connections; one may leave in the middle of an answer. What should have been charged for what was seen
is the oracle's (tests/simulation/oracle.py).
"""

import asyncio
import json
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import httptools

from bench.load import Answer
from tests.fakes.gateway_process import GatewayProcess
from tests.waiting import eventually

TAIL_BYTES = 200
GIVE_UP_S = 30.0
"""Past every bound of the gateways in these tests: who waits so long was left hanging."""

Ending = Literal["whole", "refused", "error_event", "cut", "reset", "silent", "left"]
"""As bench.load.Verdict says; `left`: the client went away itself."""


@dataclass(slots=True)
class Ask:
    """One request. `leaves_after`: go away at so many events; `leaves_s`: or after so long."""

    number: int
    account_id: int
    key: str
    body: dict[str, Any]
    path: str = "/v1/chat/completions"
    idempotency_key: str | None = None
    leaves_after: int | None = None
    leaves_s: float | None = None

    def wire(self) -> bytes:
        body = json.dumps(self.body).encode()
        idempotency = f"idempotency-key: {self.idempotency_key}\r\n" if self.idempotency_key else ""
        return (
            f"POST {self.path} HTTP/1.1\r\nhost: poolgate\r\nauthorization: Bearer {self.key}\r\n{idempotency}"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        ).encode() + body


@dataclass(slots=True)
class Sighting:
    """What one client saw of one request. Times are unix seconds; `tokens` are those in the events of a stream that arrived
    whole, with one token an event as our engines send. Of the body the end is kept."""

    ask: Ask
    began_at: float
    ended_at: float = 0.0
    status: int = 0
    ending: Ending = "reset"
    tokens: int = 0
    has_begun: bool = False  # an event of the engine arrived
    headers: dict[str, str] = field(default_factory=dict)
    tail: bytes = b""

    @property
    def request_id(self) -> str | None:
        """None if no head of an answer came, or it is another turn's answer, given again."""
        return None if self.is_replay else self.headers.get("x-request-id")

    @property
    def is_replay(self) -> bool:
        return self.headers.get("idempotent-replayed") == "true"

    @property
    def wants_stream(self) -> bool:
        return bool(self.ask.body.get("stream"))

    def close(self, answer: Answer, *, has_left: bool) -> None:
        """The request is over."""
        self.ended_at = time.time()
        self.status = answer.status
        self.ending = "left" if has_left and not answer.is_ended else answer.verdict
        body = answer.body[: answer.body.rfind(b"\n\n") + 2]
        self.tokens = body.count(b'"choices":[{') - body.count(b'"delta":{"role":"assistant"')
        self.has_begun = self.wants_stream and answer.events > 0
        self.tail = answer.body[-TAIL_BYTES:]

    def told(self) -> str:
        return (
            f"#{self.ask.number} of account {self.ask.account_id}: {self.ending} {self.status}"
            f" {self.headers.get('x-request-id')} tokens={self.tokens} replay={self.is_replay}"
            f" {self.ended_at - self.began_at:.2f} s, asked {json.dumps(self.ask.body)[:300]}"
            f" key={self.ask.idempotency_key}, got {self.tail!r}"
        )


class Client(asyncio.Protocol):
    """One connection, one request at a time; it connects again when it has to."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.local_port = 0
        self._loop = asyncio.get_running_loop()
        self._transport: Any = None
        self._done: asyncio.Future[None] | None = None
        self._sighting: Sighting | None = None
        self._answer = Answer()
        self._has_left = False
        self._parts: list[bytes] = []
        self._events = 0

    @property
    def is_connected(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    async def connect(self) -> None:
        """Raises OSError."""
        await self._loop.create_connection(lambda: self, "127.0.0.1", self.port)

    async def ask(self, ask: Ask, give_up_s: float = GIVE_UP_S) -> Sighting:
        """Whatever happens comes back."""
        sighting = self._sighting = Sighting(ask, time.time())
        self._answer, self._has_left = Answer(), False
        self._parts, self._events = [], 0
        self._done = self._loop.create_future()
        timers = [self._loop.call_later(give_up_s, self._give_up)]
        with suppress(OSError):
            if not self.is_connected:
                await self.connect()
            if ask.leaves_s is not None:
                timers.append(self._loop.call_later(ask.leaves_s, self._leave))
            self._transport.write(ask.wire())
            await self._done
        for timer in timers:
            timer.cancel()
        self._sighting = None
        self._answer.body = b"".join(self._parts)
        sighting.close(self._answer, has_left=self._has_left)
        return sighting

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._parser = httptools.HttpResponseParser(self)
        self.local_port = transport.get_extra_info("sockname")[1]

    def data_received(self, data: bytes) -> None:
        if self._sighting is None:
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._sighting is not None:
            self._sighting.headers[name.decode().lower()] = value.decode()

    def on_headers_complete(self) -> None:
        if self._sighting is not None:
            self._answer.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        if self._sighting is None:
            return
        self._parts.append(body)
        leaves_after = self._sighting.ask.leaves_after
        if leaves_after is not None:
            self._events += body.count(b'"choices":[{')
            if self._events >= leaves_after:
                self._leave()

    def on_message_complete(self) -> None:
        if self._sighting is not None:
            self._answer.is_ended = True
        if not self._parser.should_keep_alive():
            self._transport.close()
        self._end()

    def _leave(self) -> None:
        if self._sighting is not None and not self._answer.is_ended:
            self._has_left = True
            self._transport.abort()
            self._end()

    def _give_up(self) -> None:
        if self._sighting is not None:
            self._answer.gave_up = True
        self.close()
        self._end()

    def _end(self) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_result(None)


class Clients:
    """Kept connections to one gateway: each request takes the one that was idle longest, or a new one."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._idle: deque[Client] = deque()
        self.sightings: list[Sighting] = []

    async def open(self, count: int) -> None:
        """So many beforehand: taken in turns, they keep every worker as busy as it has a part of them."""
        made = [Client(self._port) for _ in range(count)]
        await asyncio.gather(*(client.connect() for client in made))
        self._idle.extend(made)

    async def ask(self, ask: Ask, give_up_s: float = GIVE_UP_S) -> Sighting:
        client = self._idle.popleft() if self._idle else Client(self._port)
        sighting = await client.ask(ask, give_up_s)
        self.sightings.append(sighting)
        self._idle.append(client)
        return sighting

    def close(self) -> None:
        for client in self._idle:
            client.close()


async def on_one_worker(gateway: GatewayProcess, count: int) -> list[Client]:
    """So many connections that one worker has: they go to workers by a hash, so those of the others are closed again."""
    chosen = gateway.workers()[0]
    opened: list[Client] = []
    found: list[Client] = []
    while len(found) < count:
        opened += await spread(gateway, count // 2 + 1)
        await _accepted(gateway, opened)
        ports = gateway.client_ports(chosen)
        found = [client for client in opened if client.local_port in ports]
    for client in opened:
        if client not in found[:count]:
            client.close()
    return found[:count]


async def on_each_worker(gateway: GatewayProcess) -> list[Client]:
    """One connection to every worker."""
    opened: list[Client] = []
    while True:
        client = Client(gateway.port)
        await client.connect()
        opened.append(client)
        await _accepted(gateway, opened)
        ends = [gateway.client_ports(worker) for worker in gateway.workers()]
        owners = {
            client: n for client in opened for n, ports in enumerate(ends) if client.local_port in ports
        }
        first = {n: client for client, n in reversed(owners.items())}
        if len(first) == gateway.settings.workers:
            for client in opened:
                if client not in first.values():
                    client.close()
            return list(first.values())


async def spread(gateway: GatewayProcess, count: int) -> list[Client]:
    """So many connections as they come, and they come to every worker."""
    opened = [Client(gateway.port) for _ in range(count)]
    await asyncio.gather(*(client.connect() for client in opened))
    return opened


async def _accepted(gateway: GatewayProcess, clients: Sequence[Client]) -> None:
    """Until the kernel's table has them: a connection is in it once its worker has accepted it."""

    def are() -> bool:
        ports = set().union(*(gateway.client_ports(worker) for worker in gateway.workers()))
        return all(client.local_port in ports for client in clients if client.is_connected)

    await eventually(are)
