"""Hostile and unlucky clients at the edge: late, silent, greedy, gone, and those that try to slip a request past it.

Time is the door's own clock, which tests set forward; nothing here waits for it.
"""

import asyncio
import json
import random
import re
import socket
import ssl
import struct
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from gateway.edge.connection import AHEAD_BYTES_MAX, EdgeConnection
from tests.certificates import write_pair
from tests.fakes.engine import FakeEngine
from tests.gateways import TestGateway, running_gateway
from tests.waiting import eventually
from tests.wires import ASK, PATH, STREAM, Reply, Wire, chat, get, is_openai, request, wire

READ_BYTES_MAX = 32 * 262_144
"""What the event loop may read at once of one connection, before it can be told to stop."""

UNKNOWN = ASK | {"model": "no-such"}


@pytest.fixture
async def gw(settings, pool) -> AsyncIterator[TestGateway]:
    # No agent beats here, and a machine that is busy takes longer for some of these than a node may be silent.
    async with running_gateway(replace(settings, heartbeat_grace_s=120.0), pool) as running:
        yield running


def set_forward(gw: TestGateway, seconds: float) -> None:
    """So much time passes at the door."""
    door, before = gw.gateway.door, gw.gateway.door.time
    door.time = lambda: before() + seconds
    door.tick()


def is_cut_later(gw: TestGateway) -> bool:
    """Whether a client that reads nothing is given up; what the kernel still took meanwhile counts as read."""
    set_forward(gw, gw.gateway.settings.client_stall_s + 1)
    return not gw.gateway.door.connections


def only(gw: TestGateway) -> EdgeConnection:
    (connection,) = gw.gateway.door.connections
    return connection


async def arrived(gw: TestGateway, size: int) -> EdgeConnection:
    """The one connection, once it has kept so many bytes."""
    await eventually(lambda: any(len(each._ahead) == size for each in gw.gateway.door.connections))
    return only(gw)


async def narrow(gw: TestGateway, client: Wire) -> None:
    """The client reads nothing for now, and the kernel takes little for it."""
    client.reader._transport.pause_reading()
    await eventually(lambda: any(each.transport for each in gw.gateway.door.connections))
    for transport, option in (
        (only(gw).transport, socket.SO_SNDBUF),
        (client.writer.transport, socket.SO_RCVBUF),
    ):
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, option, 65536)


async def has_ended(gw: TestGateway, client: Wire) -> bool:
    assert await client.is_closed()
    await eventually(lambda: not gw.gateway.door.connections)
    return True


async def known(gw: TestGateway, client: Wire) -> None:
    """From now on memory knows the key: the first read of the changes, which forgets all of them, is over."""
    await eventually(lambda: gw.gateway.health.is_ready)
    await client.send(chat(gw, UNKNOWN))
    assert (await client.reply()).status == 404


# --- late clients ----------------------------------------------------------------------------------------------------


async def test_a_connection_that_never_sends_anything_is_closed_without_a_word(gw):
    async with wire(gw) as client:
        await eventually(lambda: gw.gateway.door.connections)
        set_forward(gw, gw.gateway.settings.head_timeout_s)
        assert await has_ended(gw, client)


async def test_a_head_that_does_not_end_in_time_is_a_408(gw):
    async with wire(gw) as client:
        await client.send(b"POST /v1/chat")
        await arrived(gw, 13)
        set_forward(gw, gw.gateway.settings.head_timeout_s + 1)
        assert is_openai(await client.reply(), 408, "request_timeout")
        assert await has_ended(gw, client)


async def test_a_head_that_comes_drop_by_drop_has_no_more_time(gw):
    async with wire(gw) as client:
        await client.send(b"POST /")
        connection = await arrived(gw, 6)
        ends_s = connection.ends_s
        for size in range(7, 20):
            await client.send(b"x")
            await arrived(gw, size)
        set_forward(gw, gw.gateway.settings.head_timeout_s * 0.9)
        assert connection.ends_s == ends_s
        set_forward(gw, gw.gateway.settings.head_timeout_s * 0.2)
        assert is_openai(await client.reply(), 408, "request_timeout")
        assert await has_ended(gw, client)


async def test_empty_lines_before_a_request_buy_a_new_connection_no_time(gw):
    async with wire(gw) as client:
        await eventually(lambda: gw.gateway.door.connections)
        ends_s = only(gw).ends_s
        await client.send(b"\r\n" * 1000 + b"\r")
        assert (await arrived(gw, 1)).ends_s == ends_s
        await client.send(b"\n\r")
        await client.send(b"\n" + get("/api/health"))
        assert (await client.reply()).status == 200
        await client.send(b"\r\n" * 1000)
        await client.send(b"G")
        assert (await arrived(gw, 1)).ends_s < ends_s + gw.gateway.settings.head_timeout_s


LONG_HEAD = b"GET / HTTP/1.1\r\n" + (b"x: " + b"a" * 8000 + b"\r\n") * 9


async def test_odd_heads_that_do_not_end_have_no_more_time_than_others(gw):
    async with wire(gw) as client:
        await client.send(LONG_HEAD)
        await eventually(
            lambda: [each for each in gw.gateway.door.connections if each._handler and each.is_idle]
        )
        assert only(gw).ends_s - gw.gateway.door.time() <= gw.gateway.settings.head_timeout_s
        set_forward(gw, gw.gateway.settings.head_timeout_s + 1)
        assert is_openai(await client.reply(), 408, "request_timeout")
        assert await has_ended(gw, client)


@pytest.mark.parametrize("part", [b"\x16\x03\x01", b"POST / HTTP/1.1\n", b"GET / HTTP/1.1\r\nx: a\0"])
async def test_what_will_never_be_a_head_is_refused_before_it_ends(gw, part):
    async with wire(gw) as client:
        await client.send(part)
        assert is_openai(await client.reply(), 400, None)
        assert await has_ended(gw, client)


async def test_a_connection_between_requests_is_closed_when_it_was_idle_for_so_long(gw, engine):
    await gw.register(engine.url)
    async with wire(gw) as client:
        for raw in (chat(gw), get("/api/health")):
            await client.send(raw)
            assert (await client.reply()).status == 200
        await eventually(lambda: only(gw).is_idle)
        set_forward(gw, gw.gateway.settings.client_idle_s - 5)
        await client.send(get("/api/health"))
        assert (await client.reply()).status == 200
        await eventually(lambda: only(gw).is_idle)
        set_forward(gw, gw.gateway.settings.client_idle_s + 5)
        assert await has_ended(gw, client)


async def test_an_idle_connection_of_aiohttps_has_the_same_bound(gw):
    async with wire(gw) as client:
        await client.send(
            request(gw, b"", "transfer-encoding: chunked", length=False) + b"2\r\n{}\r\n0\r\n\r\n"
        )
        assert (await client.reply()).status == 400
        await eventually(lambda: only(gw).is_idle)
        set_forward(gw, gw.gateway.settings.client_idle_s - 5)
        await client.send(get("/api/health"))
        assert (await client.reply()).status == 200
        await eventually(lambda: only(gw).is_idle)
        set_forward(gw, 10)
        set_forward(gw, gw.gateway.settings.client_idle_s + 5)
        assert await has_ended(gw, client)


async def test_a_body_that_does_not_end_in_time_is_a_408(gw):
    async with wire(gw) as client:
        await known(gw, client)
        await client.send(chat(gw)[:-3])
        await eventually(lambda: only(gw)._reading)
        set_forward(gw, gw.gateway.settings.body_timeout_s + 1)
        reply = await client.reply()
        assert is_openai(reply, 408, "request_timeout")
        assert "body" in reply.error["message"]
        assert await has_ended(gw, client)


@pytest.mark.parametrize("framing", ["content-length: 100", "transfer-encoding: chunked"])
async def test_a_late_body_that_aiohttp_reads_is_a_408_as_well(settings, pool, framing):
    async with running_gateway(replace(settings, body_timeout_s=1.0), pool) as gw, wire(gw) as client:
        body = b"5\r\n" if framing.startswith("t") else b""
        await client.send(request(gw, body, framing, "expect: 100-continue", length=False))
        assert (await client.reply()).status == 100
        assert is_openai(await client.reply(), 408, "request_timeout")


async def test_a_client_without_a_key_is_told_before_its_body_comes(gw):
    async with wire(gw) as client:
        raw = chat(gw).replace(gw.key.encode(), b"sk-pg-wrong")
        await client.send(raw[:-5])
        assert is_openai(await client.reply(), 401, "invalid_api_key")


# --- clients that read nothing, and greedy ones --------------------------------------------------------------------------


async def test_a_client_that_reads_no_answer_gets_no_further_ones_and_in_the_end_is_cut(gw):
    async with wire(gw) as client:
        await known(gw, client)
        await narrow(gw, client)
        client.writer.write(chat(gw, UNKNOWN) * 100_000)
        await eventually(lambda: only(gw).writing_paused)
        connection = only(gw)
        assert connection.transport.get_write_buffer_size() < 2 * connection.buffer_bytes
        await eventually(lambda: connection._is_paused)
        assert len(connection._ahead) <= AHEAD_BYTES_MAX + READ_BYTES_MAX
        await eventually(lambda: is_cut_later(gw))


async def test_a_client_that_reads_late_gets_all_its_answers_in_order(gw):
    count = 20_000
    async with wire(gw) as client:
        await known(gw, client)
        client.reader._transport.pause_reading()
        expected = random.Random(1).choices([400, 404], k=count)
        kinds = {400: chat(gw, {"model": 1}), 404: chat(gw, UNKNOWN)}
        asks = [kinds[status] for status in expected]
        sending = asyncio.create_task(client.send(b"".join(asks)))
        await eventually(lambda: only(gw).writing_paused)
        client.reader._transport.resume_reading()
        assert [(await client.reply()).status for _ in expected] == expected
        await sending


async def test_thousands_of_requests_at_once_are_answered_in_order_and_kept_within_a_bound(gw, engine):
    await gw.register(engine.url)
    count, most = 1000, 0
    async with wire(gw) as client:
        await known(gw, client)
        cycle = [chat(gw), get("/v1/nope"), chat(gw, {"model": 1}), get("/api/health")]
        sending = asyncio.create_task(client.send(b"".join(cycle) * count + b"".join(cycle[:1])))
        for _ in range(count):
            replies = [await client.reply() for _ in cycle]
            assert [reply.status for reply in replies] == [200, 404, 400, 200]
            most = max(most, len(only(gw)._ahead))
        assert (await client.reply()).status == 200
        await sending
    assert most <= AHEAD_BYTES_MAX + READ_BYTES_MAX


async def test_an_answer_that_a_closing_connection_leaves_unread_is_cut_in_the_end(gw):
    async with wire(gw) as client:
        await narrow(gw, client)
        await client.send(get("/api/docs/ui/swagger-ui-bundle.js", "connection: close"))
        await eventually(lambda: any(each.writing_paused for each in gw.gateway.door.connections))
        await eventually(lambda: is_cut_later(gw))


async def test_a_bound_of_bodies_holds_for_the_second_request_of_a_connection_too(settings, pool):
    async with running_gateway(replace(settings, body_bytes_max=2048), pool) as gw, wire(gw) as client:
        await known(gw, client)
        await client.send(request(gw, b" " * 2048))
        assert is_openai(await client.reply(), 400, None)
        await client.send(request(gw, b" " * 2049))
        assert is_openai(await client.reply(), 413, "request_too_large")


# --- what stands behind a request -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "status"),
    [
        (("connection: upgrade, http2-settings", "upgrade: h2c", "http2-settings: AAMAAABk"), 200),
        (("connection: upgrade", "upgrade: websocket"), 200),
        (("accept: a", "accept: b"), 200),
    ],
)
async def test_a_request_behind_an_odd_one_is_answered_next(gw, engine, first, status):
    await gw.register(engine.url)
    async with wire(gw) as client:
        await client.send(chat(gw, ASK, *first) + get("/v1/nope") + chat(gw, STREAM))
        assert [(await client.reply()).status for _ in range(3)] == [status, 404, 200]


async def test_a_request_behind_a_chunked_body_is_answered_next(gw, engine):
    await gw.register(engine.url)
    body = json.dumps(ASK).encode()
    pieces = b"".join(b"%x;ext=1\r\n%b\r\n" % (1, body[at : at + 1]) for at in range(len(body)))
    chunked = request(gw, b"", "transfer-encoding: chunked", length=False) + pieces + b"0\r\nx: y\r\n\r\n"
    async with wire(gw) as client:
        await client.send(chunked + chat(gw) + get("/v1/nope") + chunked)
        assert [(await client.reply()).status for _ in range(4)] == [200, 200, 404, 200]


async def test_requests_behind_answers_of_every_kind_are_answered_next(gw, engine):
    await gw.register(engine.url)
    wrong_key = chat(gw).replace(gw.key.encode(), b"sk-pg-wrong")
    async with wire(gw) as client:
        await client.send(
            chat(gw) + wrong_key + get("/v1/models", f"authorization: Bearer {gw.key}") + chat(gw, {"model": 1})
            + get("/v1/nope") + chat(gw, STREAM) + b"\r\n\r\n" + request(gw, b"{") + chat(gw, ASK, "x: 1")
        )  # fmt: skip
        replies = [await client.reply() for _ in range(8)]
    assert [reply.status for reply in replies] == [200, 401, 200, 400, 404, 200, 400, 200]


async def test_a_connection_alternates_between_both_doors_for_as_long_as_it_likes(gw, engine):
    await gw.register(engine.url)
    models = get("/v1/models", f"authorization: Bearer {gw.key}")
    async with wire(gw) as client:
        for raw, status in (
            (chat(gw), 200), (models, 200), (chat(gw), 200), (get("/v1/nope"), 404), (chat(gw, STREAM), 200),
            (get("/nope", "connection: upgrade", "upgrade: websocket"), 404), (chat(gw), 200), (models, 200),
        ):  # fmt: skip
            await client.send(raw)
            assert (await client.reply()).status == status
        assert len(gw.gateway._runner.server.connections) == 1


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"OPTIONS * HTTP/1.1\r\nhost: x\r\n\r\n", 404),
        (b"GET http://elsewhere/api/health HTTP/1.1\r\nhost: x\r\n\r\n", 200),
        (b"GET HTTP://x:80/api/health?a=b HTTP/1.1\r\nhost: x\r\n\r\n", 200),
        (b"CONNECT example.org:443 HTTP/1.1\r\nhost: example.org\r\n\r\n", 404),
        (b"GET /api/health HTTP/1.0\r\n\r\n", 200),
        (b"TRACE /v1/models HTTP/1.1\r\nhost: x\r\n\r\n", 405),
    ],
)
async def test_rare_forms_of_requests_get_an_answer(gw, raw, status):
    async with wire(gw) as client:
        await client.send(raw)
        assert (await client.reply()).status == status


async def test_a_turn_in_absolute_form_is_a_turn(gw, engine):
    await gw.register(engine.url)
    async with wire(gw) as client:
        await client.send(chat(gw, line=f"POST http://elsewhere{PATH} HTTP/1.1"))
        assert (await client.reply()).status == 200


async def test_lengths_may_have_zeros_in_front(gw, engine):
    await gw.register(engine.url)
    body = json.dumps(ASK).encode()
    async with wire(gw) as client:
        for zeros in ("", "0", "0000", ""):
            await client.send(request(gw, body, f"content-length: {zeros}{len(body)}", length=False))
            assert (await client.reply()).status == 200


async def test_a_stranger_on_the_same_connection_is_not_taken_for_who_was_there_before(gw, engine):
    await gw.register(engine.url)
    async with wire(gw) as client:
        for _ in range(2):
            await client.send(chat(gw))
            assert (await client.reply()).status == 200
        await client.send(chat(gw).replace(gw.key.encode(), gw.key[:-1].encode() + b"!"))
        assert is_openai(await client.reply(), 401, "invalid_api_key")


# --- smuggling -------------------------------------------------------------------------------------------------------


def with_fields(*fields: str) -> str:
    return "\r\n".join([f"POST {PATH} HTTP/1.1", "host: x", *fields, "", ""])


REFUSED = {
    "two lengths": with_fields("content-length: 5", "content-length: 6"),
    "two equal lengths": with_fields("content-length: 0", "content-length: 0"),
    "length and chunked": with_fields("content-length: 5", "transfer-encoding: chunked"),
    "chunked and length": with_fields("transfer-encoding: chunked", "content-length: 5"),
    "space before the colon of a coding": with_fields("transfer-encoding : chunked"),
    "tab before the colon of a coding": with_fields("transfer-encoding\t: chunked"),
    "space before the colon of a length": with_fields("content-length : 5"),
    "a coding that is none": with_fields("transfer-encoding: xchunked"),
    "chunked is not last": with_fields("transfer-encoding: chunked, gzip"),
    "chunked is not last, in two fields": with_fields("transfer-encoding: chunked", "transfer-encoding: gzip"),
    "chunked in a folded line": with_fields("transfer-encoding:\r\n chunked"),
    "a folded line": with_fields("x: a", " b: c"),
    "a folded line with a tab": with_fields("x: a", "\tb: c"),
    "a folded first line": with_fields(" x: a"),
    "plus": with_fields("content-length: +5"),
    "minus": with_fields("content-length: -5"),
    "hexadecimal": with_fields("content-length: 0x5"),
    "a list of lengths": with_fields("content-length: 5,5"),
    "spaces in a length": with_fields("content-length: 5 5"),
    "no length": with_fields("content-length:"),
    "a huge length": with_fields("content-length: " + "9" * 30),
    "a point": with_fields("content-length: 5.0"),
    "an underscore": with_fields("content-length: 1_0"),
    "a bare LF after a field": with_fields("x: a\ny: b"),
    "a bare LF after the line": f"POST {PATH} HTTP/1.1\nhost: x\r\n\r\n",
    "bare LFs": f"POST {PATH} HTTP/1.1\nhost: x\n\n",
    "a bare LF ends the head": f"POST {PATH} HTTP/1.1\r\nhost: x\r\n\n",
    "a bare CR in a value": with_fields("x: a\rb: c"),
    "a bare CR ends a field": with_fields("x: a\r\r\ny: b"),
    "NUL in a value": with_fields("x: a\0b"),
    "NUL in a name": with_fields("a\0b: c"),
    "a control byte in a value": with_fields("x: a\x01b"),
    "DEL in a value": with_fields("x: a\x7fb"),
    "a space in a name": with_fields("a b: c"),
    "an empty name": with_fields(": c"),
    "no colon": with_fields("x"),
    "a byte beyond ASCII in a name": with_fields("\xe9: x"),
    "brackets in a name": with_fields("(a): x"),
    "another version": f"POST {PATH} HTTP/1.2\r\nhost: x\r\n\r\n",
    "version 0.9": f"POST {PATH} HTTP/0.9\r\nhost: x\r\n\r\n",
    "no version": f"GET {PATH}\r\nhost: x\r\n\r\n",
    "a tab in the line": f"POST\t{PATH} HTTP/1.1\r\nhost: x\r\n\r\n",
    "a lower case method": f"post {PATH} HTTP/1.1\r\nhost: x\r\n\r\n",
    "no host": f"POST {PATH} HTTP/1.1\r\ncontent-length: 0\r\n\r\n",
    "two hosts": with_fields("host: y"),
    "a chunk size that is none": with_fields("transfer-encoding: chunked") + "g\r\n",
    "a chunk size with a sign": with_fields("transfer-encoding: chunked") + "+1\r\na\r\n0\r\n\r\n",
    "a chunk size with 0x": with_fields("transfer-encoding: chunked") + "0x1\r\na\r\n0\r\n\r\n",
    "a huge chunk size": with_fields("transfer-encoding: chunked") + "f" * 17 + "\r\n",
    "a chunk with a bare LF": with_fields("transfer-encoding: chunked") + "1\na\r\n0\r\n\r\n",
    "a chunk that is longer than it says": with_fields("transfer-encoding: chunked") + "1\r\nab\r\n0\r\n\r\n",
    "an extension of a chunk with a bare CR": with_fields("transfer-encoding: chunked") + "1;a\rb\r\na\r\n0\r\n\r\n",
    "chunked in HTTP/1.0": with_fields("transfer-encoding: chunked", "content-length: 3").replace("1.1", "1.0"),
}  # fmt: skip


@pytest.mark.parametrize("raw", REFUSED.values(), ids=REFUSED)
async def test_a_request_that_could_end_in_two_places_is_refused_with_all_behind_it(gw, raw):
    async with wire(gw) as client:
        await client.send(raw.encode("latin-1") + get("/api/health") * 3)
        reply = await client.reply()
        assert reply.status in (400, 401), reply
        if reply.status == 401:  # the body broke, after its key was found to be none
            assert "a chunk" in str([name for name, value in REFUSED.items() if value == raw])
        else:
            assert is_openai(reply, 400, None)
        assert await client.is_closed(), "nothing behind it is a request"
    await eventually(lambda: not gw.gateway.door.connections)


async def test_nothing_follows_a_request_without_a_version(gw):
    raw = b"POST /v1/nope\r\nhost: x\r\nconnection: keep-alive\r\ncontent-length: 0\r\n\r\n"
    async with wire(gw) as client:
        await client.send(raw + get("/api/health"))
        assert (await client.reply()).status == 404
        assert await client.is_closed()


async def test_an_expectation_of_odd_bytes_is_a_400_and_no_traceback(gw, caplog):
    async with wire(gw) as client:
        await client.send(chat(gw, UNKNOWN, "expect: \xff"))
        assert is_openai(await client.reply(), 400, None)
    assert [record for record in caplog.records if record.exc_info] == []


TAKEN = {
    "lengths with zeros in front": with_fields("content-length: 0000"),
    "tabs around a length": with_fields("content-length:\t0 "),
    "bytes beyond ASCII in a value": with_fields("x: \xe9\xff", "content-length: 0"),
    "odd names": with_fields("!#$%&'*+-.^_`|~: x", "content-length: 0"),
    "chunked in capitals": with_fields("transfer-encoding: CHUNKED") + "0\r\n\r\n",
    "no length": with_fields("x: y"),
    "two spaces in the line": f"POST  {PATH}  HTTP/1.1\r\nhost: x\r\n\r\n",
    "length of another name": with_fields("content-lengths: 5", "x-transfer-encoding: chunked"),
}


@pytest.mark.parametrize("raw", TAKEN.values(), ids=TAKEN)
async def test_a_request_that_ends_in_one_place_is_taken_and_so_is_the_next(gw, raw):
    async with wire(gw) as client:
        await client.send(raw.encode("latin-1") + get("/api/health"))
        assert is_openai(await client.reply(), 401, "invalid_api_key")
        assert (await client.reply()).status == 200


# --- cut in pieces ---------------------------------------------------------------------------------------------------


MARKS = re.compile(rb'req_[0-9a-f]+|"(?:id|created)":[^,]+|chatcmpl-[0-9a-f-]+')


def told(reply: Reply) -> tuple[int, bytes]:
    return reply.status, MARKS.sub(b"", reply.body)


async def test_requests_cut_at_any_point_are_answered_the_same(settings, pool, engine):
    async with running_gateway(replace(settings, heartbeat_grace_s=100.0), pool) as gw:
        await cut_everywhere(gw, engine)


async def cut_everywhere(gw: TestGateway, engine: FakeEngine) -> None:
    await gw.register(engine.url)
    key = f"authorization: Bearer {gw.key}"
    chunked = request(gw, b"", "transfer-encoding: chunked", length=False) + b"2\r\n{}\r\n0\r\n\r\n"
    raw = (
        chat(gw, {"model": 1}) + get("/v1/nope") + chat(gw, UNKNOWN) + b"\r\n" + get("/v1/models", key) + chat(gw)
        + chunked + get("/v1/nope")
    )  # fmt: skip

    async def answers(*pieces: bytes) -> list[tuple[int, bytes]]:
        async with wire(gw) as client:
            for piece in pieces:
                await client.send(piece)
                await asyncio.sleep(0)  # the pieces come in one by one
            return [told(await client.reply()) for _ in range(7)]

    whole = await answers(raw)
    assert [status for status, _ in whole] == [400, 404, 404, 200, 200, 400, 404]
    for at in range(1, len(raw)):
        assert await answers(raw[:at], raw[at:]) == whole, at
    assert await answers(*(raw[at : at + 1] for at in range(len(raw)))) == whole


# --- clients that are gone -------------------------------------------------------------------------------------------


def reset(client: Wire) -> None:
    """Its end comes as a RST."""
    sock = client.writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.writer.transport.abort()


@pytest.mark.parametrize("how", ["RST", "FIN"])
@pytest.mark.parametrize(
    "where", ["head", "body", "odd head", "chunked body", "turn", "stream", "key look-up", "cold body"]
)
async def test_clients_that_vanish_leave_nothing_wherever_they_were(gw, engines, caplog, how, where):
    engine = await engines(ttft_ms=60_000 if where == "turn" else 1, pace_ms=20, tokens=10_000)
    await gw.register(engine.url)
    long = ASK | {"max_tokens": 1000}
    chunked = request(gw, b"", "transfer-encoding: chunked", length=False) + b"5\r\n{"
    raw = {
        "head": chat(gw)[:40], "body": chat(gw)[:-10], "odd head": b"M-SEARCH * HTTP/1.1\r\n", "chunked body": chunked,
        "turn": chat(gw, long), "stream": chat(gw, long | {"stream": True}), "key look-up": chat(gw, UNKNOWN),
        "cold body": get("/nope", "content-length: 100"),
    }[where]  # fmt: skip
    tasks = len(asyncio.all_tasks())
    async with wire(gw) as client:
        await client.send(raw)
        if where == "stream":
            await client.reader.readuntil(b'"content":"')
        elif where == "turn":
            await engine.until(lambda record: bool(record["requests"]))
        elif where != "key look-up":
            await eventually(
                lambda: any(
                    each._ahead or each._turn or each._handler for each in gw.gateway.door.connections
                )
            )
        if how == "RST":
            reset(client)
    await eventually(lambda: not gw.gateway.door.connections and not gw.gateway._runner.server.connections)
    await eventually(lambda: gw.gateway.lifecycle.in_flight == 0 and len(asyncio.all_tasks()) <= tasks)
    assert [record for record in caplog.records if record.exc_info] == []
    if where in ("turn", "stream"):
        assert [record.outcome for record in await gw.settled(1)] == ["client_gone"]


# --- the end of a worker ---------------------------------------------------------------------------------------------


async def test_a_drain_answers_what_is_there_with_a_close_and_cuts_nothing(settings, pool, engines):
    engine = await engines(ttft_ms=200)
    async with running_gateway(replace(settings, drain_idle_s=2.0), pool) as gw:
        await gw.register(engine.url)
        async with (
            wire(gw) as idle, wire(gw) as turn, wire(gw) as stream, wire(gw) as half, wire(gw) as silent,
            wire(gw) as chunked,
        ):  # fmt: skip
            odd = request(gw, b"", "transfer-encoding: chunked", length=False)
            await idle.send(chat(gw))
            assert (await idle.reply()).status == 200
            await chunked.send(odd + b"2\r\n{}\r\n0\r\n\r\n")
            assert (await chunked.reply()).status == 400
            await turn.send(chat(gw))
            await stream.send(chat(gw, STREAM))
            await half.send(chat(gw)[:30])
            door = gw.gateway.door
            await eventually(
                lambda: gw.gateway.lifecycle.in_flight == 2 and any(each._ahead for each in door.connections)
            )
            stopping = asyncio.create_task(gw.gateway.stop())
            await eventually(lambda: gw.gateway.health.is_draining)
            await idle.send(chat(gw))
            await half.send(chat(gw)[30:])
            await chunked.send(get("/v1/nope"))
            for client, status in ((idle, 200), (turn, 200), (stream, 200), (half, 200), (chunked, 404)):
                reply = await client.reply()
                assert reply.status == status
                assert reply.headers["connection"] == "close"
                assert await client.is_closed()
            assert await silent.is_closed()
            await stopping


async def test_a_request_whose_key_is_looked_up_when_the_worker_ends_is_answered(gw, engine, monkeypatch):
    await gw.register(engine.url)
    keyring = gw.gateway.door.turns.keyring
    found, find = asyncio.Event(), keyring._store.find

    async def slowly(digest: bytes):
        await found.wait()
        return await find(digest)

    monkeypatch.setattr(keyring._store, "find", slowly)
    async with wire(gw) as client:
        await client.send(chat(gw))
        await eventually(lambda: keyring._loading)
        stopping = asyncio.create_task(gw.gateway.stop())
        await eventually(lambda: gw.gateway.door.idle_s == gw.gateway.settings.drain_idle_s)
        set_forward(gw, 10)
        found.set()
        reply = await client.reply()
        assert (reply.status, reply.headers["connection"]) == (200, "close")
        await stopping


async def test_an_answer_that_is_still_being_read_when_the_worker_ends_comes_whole(gw):
    async with wire(gw) as client:
        await narrow(gw, client)
        await client.send(get("/api/docs/ui/swagger-ui-bundle.js", "connection: close"))
        await eventually(lambda: only(gw).writing_paused)
        stopping = asyncio.create_task(gw.gateway.stop())
        await eventually(lambda: gw.gateway.door.idle_s == gw.gateway.settings.drain_idle_s)
        client.reader._transport.resume_reading()
        reply = await client.reply()
        assert len(reply.body) == int(reply.headers["content-length"]) > 1_000_000
        await stopping


async def test_a_connection_that_was_queued_when_the_worker_ends_has_the_time_of_an_idle_one(settings, pool):
    async with running_gateway(replace(settings, drain_idle_s=1.0), pool) as gw:
        door = gw.gateway.door
        door.drain()
        async with wire(gw) as client:
            await eventually(lambda: door.connections)
            left_s = only(gw).ends_s - door.time()
            assert left_s <= 1.0
            await client.send(get("/api/health"))
            assert (await client.reply()).status == 200


# --- browsers of other origins ---------------------------------------------------------------------------------------


ORIGIN = "origin: https://app.example"


@pytest.mark.parametrize("setting", ["https://app.example, https://b.example", "*"])
async def test_pages_of_allowed_origins_may_ask_and_read_at_both_doors(settings, pool, engine, setting):
    async with running_gateway(replace(settings, cors_origins=setting), pool) as gw, wire(gw) as client:
        await gw.register(engine.url)
        asked = ("access-control-request-method: POST", "access-control-request-headers: authorization, x-y")
        await client.send(request(gw, b"", ORIGIN, *asked, line=f"OPTIONS {PATH} HTTP/1.1"))
        reply = await client.reply()
        assert (reply.status, reply.body) == (204, b"")
        assert "POST" in reply.headers["access-control-allow-methods"]
        assert reply.headers["access-control-allow-headers"] == "authorization, x-y"
        for raw in (
            chat(gw, ASK, ORIGIN), chat(gw, STREAM, ORIGIN), chat(gw, {"model": 1}, ORIGIN), get("/v1/nope", ORIGIN),
            chat(gw, ASK, ORIGIN, "accept: a", "accept: b"), chat(gw, STREAM, ORIGIN, "accept: a", "accept: b"),
        ):  # fmt: skip
            await client.send(raw)
            reply = await client.reply()
            assert reply.headers["access-control-allow-origin"] == "https://app.example"
            assert reply.headers["vary"] == "origin"
            assert "x-request-id" in reply.headers["access-control-expose-headers"]
            assert "access-control-allow-credentials" not in reply.headers


async def test_pages_of_other_origins_may_not(settings, pool, engine):
    async with (
        running_gateway(replace(settings, cors_origins="https://b.example"), pool) as gw,
        wire(gw) as client,
    ):
        await gw.register(engine.url)
        for raw in (chat(gw, ASK, ORIGIN), chat(gw, ASK), get("/v1/nope", ORIGIN), get("/v1/nope")):
            await client.send(raw)
            reply = await client.reply()
            assert "access-control-allow-origin" not in reply.headers
            assert reply.headers["vary"] == "origin"
        await client.send(
            request(gw, b"", ORIGIN, "access-control-request-method: POST", line=f"OPTIONS {PATH} HTTP/1.1")
        )
        assert (await client.reply()).status == 405


async def test_without_the_setting_answers_say_nothing_of_origins(gw):
    async with wire(gw) as client:
        for raw in (chat(gw, UNKNOWN, ORIGIN), get("/v1/nope", ORIGIN)):
            await client.send(raw)
            reply = await client.reply()
            assert not {"vary", "access-control-allow-origin"} & reply.headers.keys()


@pytest.mark.parametrize("odd", ["\xff", "https://\xe9.example", "\t\t", "a\tb"])
async def test_odd_bytes_in_an_origin_are_not_repeated_to_it(settings, pool, odd):
    async with running_gateway(replace(settings, cors_origins="*"), pool) as gw, wire(gw) as client:
        await known(gw, client)
        origin = f"origin: {odd}".encode("latin-1")
        for raw in (
            chat(gw, UNKNOWN, f"origin: {odd}"), get("/v1/nope").replace(b"host", origin + b"\r\nhost"),
            chat(gw, UNKNOWN, f"origin: {odd}", "accept: a", "accept: b"),
        ):  # fmt: skip
            await client.send(raw)
            reply = await client.reply()
            assert reply.status == 404, reply
            assert "access-control-allow-origin" not in reply.headers
        asked = (
            "origin: https://a",
            "access-control-request-method: POST",
            f"access-control-request-headers: {odd}",
        )
        await client.send(request(gw, b"", *asked, line=f"OPTIONS {PATH} HTTP/1.1"))
        reply = await client.reply()
        assert reply.status == 204
        assert "access-control-allow-headers" not in reply.headers


# --- refused keys ----------------------------------------------------------------------------------------------------


async def test_a_refused_key_is_in_the_log_with_its_clients_address_at_both_doors(settings, pool, caplog):
    async with (
        running_gateway(replace(settings, trusted_proxies="127.0.0.0/8"), pool) as gw,
        wire(gw) as client,
    ):
        refused = gw.gateway.door.refused_keys
        for number, odd in enumerate(((), ("accept: a", "accept: b"))):
            refused._next_s = 0.0
            raw = chat(gw, UNKNOWN, f"x-forwarded-for: 203.0.113.1, 198.51.100.{number}", *odd)
            await client.send(raw.replace(gw.key.encode(), b"sk-pg-wrong"))
            assert (await client.reply()).status == 401
    lines = [record for record in caplog.records if record.__dict__.get("action") == "key_refused"]
    assert [record.__dict__["client"] for record in lines] == ["198.51.100.0", "198.51.100.1"]
    assert "sk-pg-wrong" not in caplog.text


# --- TLS -------------------------------------------------------------------------------------------------------------


@pytest.fixture
async def secure(settings, pool, tmp_path) -> AsyncIterator[tuple[TestGateway, ssl.SSLContext]]:
    chain, key = write_pair(tmp_path)
    context = ssl.create_default_context(cafile=str(chain))
    with_tls = replace(settings, tls_certificate=str(chain), tls_key=str(key), drain_idle_s=5.0)
    async with running_gateway(with_tls, pool) as running:
        yield running, context


async def test_turns_streams_and_everything_else_go_over_tls(secure, engine):
    gw, tls = secure
    await gw.register(engine.url)
    async with wire(gw, tls=tls) as client:
        await client.send(chat(gw) + chat(gw) + get("/api/health") + chat(gw, STREAM))
        replies = [await client.reply() for _ in range(4)]
        assert [reply.status for reply in replies] == [200] * 4
        assert replies[3].body.endswith(b"data: [DONE]\n\n")
        await client.send(chat(gw, UNKNOWN, "connection: close") + get("/api/health"))
        assert (await client.reply()).status == 404
        assert await client.is_closed()


async def test_a_handshake_that_is_under_way_when_the_worker_ends_is_waited_for(secure):
    gw, tls = secure
    host, port = gw.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    await eventually(lambda: gw.gateway.door.connections)
    stopping = asyncio.create_task(gw.gateway.stop())
    await eventually(lambda: gw.gateway.door.idle_s == gw.gateway.settings.drain_idle_s)
    assert not gw.gateway.door.is_idle
    await writer.start_tls(tls, server_hostname="localhost")
    client = Wire(reader, writer)
    await client.send(get("/api/health"))
    reply = await client.reply()
    assert (reply.status, reply.headers["connection"]) == (200, "close")
    writer.close()
    await stopping


async def test_a_handshake_that_fails_or_never_comes_is_forgotten(secure):
    gw, _ = secure
    async with wire(gw) as plain, wire(gw):
        await plain.send(get("/api/health"))
        assert await plain.is_closed()
        await eventually(lambda: len(gw.gateway.door.connections) == 2)
        set_forward(gw, gw.gateway.settings.tls_handshake_s + 1)
        assert not gw.gateway.door.connections
