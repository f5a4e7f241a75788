"""The edge in a world of its own: the real connections, door and aiohttp server over transports and turns that are fakes.

After each input nothing may have escaped, every answer is HTTP and in the order in which requests were taken, each
connection is closed or waits within a bound; and when its client is gone nothing of it is left.
"""

import asyncio
import logging
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import httptools
from aiohttp import web

from config.metrics import Metrics
from config.settings import load_settings
from gateway.edge.connection import NEVER, EdgeConnection
from gateway.edge.cors import Cors
from gateway.edge.door import Door
from gateway.edge.handover import ClientProtocol
from gateway.edge.head import Head
from gateway.edge.refusals import bad_request_handler
from gateway.edge.refused import RefusedKeys
from gateway.relay.downstream import HttpDownstream
from tests.fuzz.inputs import Input, draw

AT_ONCE = 200
"""Clients of one round: turns of the loop, which a round needs some dozens of, are shared."""

QUIET_TURNS = 14
"""Turns of the loop in which nothing happened: then nothing will. aiohttp takes up to ten for a request."""

TURNS_MAX = 2000
BIG = b"b" * 6000
WAITING_MAX = 2 * len(BIG) + 2000
"""Above the mark: the answer that reached it, and one that was begun before the mark was seen."""

SETTINGS = load_settings(environ={}, stream_buffer_bytes=4096, body_bytes_max=2048, header_bytes_max=8190)


class Transport:
    """The client's end. One that reads slowly lets what is sent wait, and reads it all when it is told to."""

    def __init__(self, protocol: Any, *, reads_slowly: bool = False) -> None:
        self.protocol = protocol
        self.sent = bytearray()
        self.taken: list[int] = []  # requests that anybody began to serve, by number
        self.is_lost = False
        self._is_closing = False
        self._waiting = 0
        self._high = 65536
        self._is_full = self._is_paused = False
        self._reads_slowly = reads_slowly

    def write(self, data: bytes) -> None:
        assert not self.is_lost, "written to a connection that is gone"
        self.sent += data
        if self._reads_slowly:
            self._waiting += len(data)
            assert self._waiting <= self._high + WAITING_MAX, "answers pile up"
            if self._waiting > self._high and not self._is_full:
                self._is_full = True
                self.protocol.pause_writing()

    def writelines(self, pieces: list[bytes]) -> None:
        self.write(b"".join(pieces))

    def read(self) -> None:
        """The client reads all that waits."""
        self._waiting = 0
        if self._is_full:
            self._is_full = False
            self.protocol.resume_writing()
        if self._is_closing:
            self.lose(None)

    def send(self, data: bytes) -> None:
        """The client sends something, which is read if anybody reads."""
        if not self._is_closing:
            self.protocol.data_received(data)

    def close(self) -> None:
        if not self._is_closing:
            self._is_closing = True
            if not self._waiting:
                asyncio.get_running_loop().call_soon(self.lose, None)

    def abort(self) -> None:
        self._is_closing = True
        asyncio.get_running_loop().call_soon(self.lose, None)

    def lose(self, error: Exception | None) -> None:
        self._is_closing = True
        if not self.is_lost:
            self.is_lost = True
            self.protocol.connection_lost(error)

    def is_closing(self) -> bool:
        return self._is_closing

    @property
    def is_held(self) -> bool:
        """Nobody reads what the client sends."""
        return self._is_paused

    def pause_reading(self) -> None:
        self._is_paused = True

    def resume_reading(self) -> None:
        self._is_paused = False

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._high = high or 65536

    def get_write_buffer_size(self) -> int:
        return self._waiting

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return ("192.0.2.1", 1) if name == "peername" else default


class Turns:
    """Answers turns at once, later, in pieces or at length, as their bodies say."""

    routes = dict.fromkeys((b"/v1/chat/completions", b"/v1/embeddings"), "route")

    def __init__(self, taken: Callable[[Any], int]) -> None:
        self.taken = taken
        self.running: set[StubTurn] = set()

    def begun(self, connection: EdgeConnection, head: Head) -> "StubTurn":
        return StubTurn(self, connection, head)

    def knows(self, head: Head) -> bool:
        return head.all_fields().get(b"authorization") == b"Bearer known"

    def drain(self) -> None:
        """Its answers keep connections as requests ask."""


class StubTurn:
    """One of them."""

    def __init__(self, turns: Turns, connection: EdgeConnection, head: Head) -> None:
        self._turns, self._connection, self._head = turns, connection, head
        self._down = HttpDownstream(
            connection, is_http_11=head.is_http_11, keep_alive=head.keep_alive, stall_s=1.0,
            own_lines=head.own_lines,
        )  # fmt: skip
        self._is_left = False

    def begin(self, body: bytes) -> None:
        assert len(body) <= SETTINGS.body_bytes_max
        self._turns.running.add(self)
        number = self._turns.taken(self._connection.transport)
        headers = {"x-number": str(number), "content-type": "application/json"}
        loop = asyncio.get_running_loop()
        if body.startswith(b"{stream"):
            self._down.start(headers)
            loop.call_soon(self._stream, 3)
        elif body.startswith(b"later"):
            loop.call_soon(self._whole, headers, b"{}")
        else:
            self._whole(headers, BIG if body.startswith(b"big") else b"{}")

    def leave(self) -> None:
        self._is_left = True
        self._turns.running.discard(self)

    def end_keep_alive(self) -> None:
        self._down.keep_alive = False

    def _whole(self, headers: dict[str, str], body: bytes) -> None:
        if not self._is_left:
            self._down.answer(200, headers, body)
            self._end()

    def _stream(self, left: int) -> None:
        if self._is_left:
            return
        if left:
            self._down.write(b"piece")
            asyncio.get_running_loop().call_soon(self._stream, left - 1)
        else:
            self._down.finish(b"last")
            self._end()

    def _end(self) -> None:
        self._turns.running.discard(self)
        self._connection.answered(self, keep_alive=self._down.keep_alive)


class Answers:
    """Reads what was sent to a client, who never asks with HEAD; what is no HTTP raises."""

    def __init__(self, sent: bytes) -> None:
        self.numbers: list[int] = []
        self.statuses: list[int] = []
        self.bodies: list[bytes] = []
        self._parser = httptools.HttpResponseParser(self)
        self._parser.feed_data(sent)

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"x-number":
            self.numbers.append(int(value))

    def on_headers_complete(self) -> None:
        self.statuses.append(self._parser.get_status_code())
        self.bodies.append(b"")

    def on_body(self, body: bytes) -> None:
        self.bodies[-1] += body


class Told(logging.Handler):
    """What was logged as an error."""

    def __init__(self, failures: list[Any]) -> None:
        super().__init__(logging.ERROR)
        self._failures = failures

    def emit(self, record: logging.LogRecord) -> None:
        self._failures.append((record.getMessage(), record.exc_info))


class World:
    """The edge, and how many requests it has taken."""

    def __init__(self) -> None:
        self._count = 0
        self._failures: list[Any] = []  # what escaped, and errors that were logged
        self._told = Told(self._failures)
        self._skipped_s = 0.0

    async def start(self) -> None:
        """Build it in the running loop."""
        loop = asyncio.get_running_loop()
        logging.getLogger().addHandler(self._told)
        loop.set_exception_handler(lambda _, context: self._failures.append(context))
        app = web.Application(client_max_size=SETTINGS.body_bytes_max)
        app.router.add_route("*", "/{path:.*}", self._cold)
        self._runner = web.AppRunner(app, handler_cancellation=True, access_log=None, auto_decompress=False)
        await self._runner.setup()
        metrics = Metrics()
        self.turns = Turns(self._taken)
        handler = partial(
            ClientProtocol, self._runner.server, loop=loop, on_bad_request=bad_request_handler(metrics),
            buffer_bytes=SETTINGS.stream_buffer_bytes, access_log=None, auto_decompress=False,
        )  # fmt: skip
        self.door = Door(
            SETTINGS, turns=self.turns, handler=handler, cors=Cors(SETTINGS), metrics=metrics,  # type: ignore[arg-type]
            refused_keys=RefusedKeys(SETTINGS, loop.time),
        )  # fmt: skip
        time = self.door.time
        self.door.time = lambda: time() + self._skipped_s
        self._tasks = len(asyncio.all_tasks())

    def _taken(self, transport: Any) -> int:
        self._count += 1
        getattr(transport, "_transport", transport).taken.append(self._count)
        return self._count

    async def _cold(self, request: web.Request) -> web.Response:
        number = self._taken(request.transport)
        if request.path.startswith("/v1/chat"):
            await request.read()
        return web.Response(headers={"x-number": str(number)}, body=b"cold")

    async def round(self, inputs: list[Input]) -> None:
        """Meet them all at once. Raises AssertionError or what else went wrong."""
        clients = [self._connected(each) for each in inputs]
        for step in range(max(len(each.pieces) for each in inputs)):
            for each, client in zip(inputs, clients, strict=True):
                if step < len(each.pieces):
                    client.send(each.pieces[step])
            await asyncio.sleep(0)
        await self._until_quiet(clients)
        for each, client in zip(inputs, clients, strict=True):
            self._check(each, client)
        await self._end(inputs, clients)

    def _connected(self, each: Input) -> Transport:
        connection = self.door()
        transport = Transport(connection, reads_slowly=each.reads_slowly)
        connection.connection_made(transport)  # type: ignore[arg-type]
        return transport

    async def _until_quiet(self, clients: list[Transport]) -> None:
        before: Any = None
        quiet = 0
        for _ in range(TURNS_MAX):
            await asyncio.sleep(0)
            now = [(len(client.sent), client.is_lost, len(client.taken)) for client in clients]
            quiet = quiet + 1 if now == before else 0
            before = now
            if quiet >= QUIET_TURNS:
                return
            if quiet == QUIET_TURNS // 2:
                for client in clients:
                    client.read()
        raise AssertionError("it never comes to rest")

    def _check(self, each: Input, client: Transport) -> None:
        connection = client.protocol
        try:
            assert not self._failures, self._failures
            answers = Answers(bytes(client.sent))
            assert answers.numbers == client.taken[: len(answers.numbers)], "answered out of order"
            is_with_aiohttp = connection._handler is not None
            is_answered = len(answers.numbers) == len(client.taken)
            assert client.is_lost or is_with_aiohttp or is_answered, "one is missing"
            certain = len(each.statuses)
            assert tuple(answers.statuses[:certain]) == each.statuses, "another answer"
            assert not each.is_all or len(answers.statuses) == certain, "an answer to nothing"
            assert not (client.is_lost and connection in self.door.connections)
            if not client.is_lost:
                assert connection.ends_s < NEVER or is_with_aiohttp, connection
                assert not client.is_held or is_with_aiohttp, "nobody will ever read it"
        except Exception as error:
            raise AssertionError(f"{each!r}: {error!r}; sent {bytes(client.sent[-600:])!r}") from error

    async def _end(self, inputs: list[Input], clients: list[Transport]) -> None:
        """They leave in their ways, and nothing of them is left."""
        for each, client in zip(inputs, clients, strict=True):
            if client.is_lost:
                continue
            if each.ending == "fin" and not client.protocol.eof_received():
                client.close()
            elif each.ending == "reset":
                client.lose(ConnectionResetError())
        if any(each.ending == "late" for each in inputs):
            self._pass(SETTINGS.head_timeout_s + 1)
            self._pass(SETTINGS.client_idle_s + 1)
        await asyncio.sleep(0)
        for client in clients:
            client.lose(None)
        for _ in range(TURNS_MAX):
            await asyncio.sleep(0)
            if not self._left:
                break
        assert not self._left, f"{self._left} of {inputs!r}"
        assert not self._failures, f"{self._failures} of {inputs!r}"

    def _pass(self, seconds: float) -> None:
        self._skipped_s += seconds
        self.door.tick()

    @property
    def _left(self) -> list[str]:
        server = self._runner.server
        assert server is not None
        left = {
            "connections": len(self.door.connections), "handlers": len(server.connections),
            "turns": len(self.turns.running), "tasks": len(asyncio.all_tasks()) - self._tasks,
        }  # fmt: skip
        return [f"{count} {name}" for name, count in left.items() if count]

    async def stop(self) -> None:
        """Nothing is running any more."""
        logging.getLogger().removeHandler(self._told)
        await self._runner.cleanup()


async def fuzz(seed: int, count: int, *, first: int = 0) -> int:
    """`count` inputs from the `first` on, each drawn from the seed and its own number. How many were met."""
    world = World()
    await world.start()
    for start in range(first, first + count, AT_ONCE):
        numbers = range(start, min(start + AT_ONCE, first + count))
        inputs = [draw(random.Random(f"{seed}/{number}")) for number in numbers]
        try:
            await world.round(inputs)
        except BaseException as error:
            error.add_note(f"seed {seed}, inputs {numbers.start} to {numbers.stop - 1}")
            raise
    await world.stop()
    return count
