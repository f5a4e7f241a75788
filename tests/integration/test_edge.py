"""What may come in at the edge, over a real socket: each gets its answer in its surface's shape, and nothing leaks.

Bounds: a body of body_bytes_max (10 MiB), a request line or one header of header_bytes_max (8190 bytes), 128 headers.
"""

import asyncio
import contextlib
import gzip
import json
import logging
import re
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import psutil
import pytest

from gateway.api.services import KEYRING
from gateway.identity.keys import KeyStore
from gateway.identity.secrets import load_pepper
from tests.gateways import TestGateway, running_gateway
from tests.waiting import eventually
from tests.wires import ASK, HOST, JSON, PATH, STREAM, Reply, Wire, chat, get, is_openai, request, wire

MB = 2**20


@pytest.fixture
async def gw(settings, pool) -> AsyncIterator[TestGateway]:
    async with running_gateway(settings, pool) as running:
        yield running


async def still_serves(gw: TestGateway) -> bool:
    async with wire(gw) as client:
        return (await (await client.send(get("/api/health"))).reply()).status == 200


# --- bodies that are too large ---------------------------------------------------------------------------------------


async def test_a_body_that_says_it_is_too_large_is_refused_before_it_is_read(gw):
    async with wire(gw) as client:
        await client.send(request(gw, b"", f"content-length: {50 * MB}", length=False))
        assert is_openai(await client.reply(), 413, "request_too_large")


async def test_a_connection_is_used_again_after_the_body_that_was_refused(gw, engine):
    await gw.register(engine.url)
    async with wire(gw) as client:
        await client.send(request(gw, b" " * (11 * MB)))
        assert is_openai(await client.reply(), 413, "request_too_large")
        await client.send(chat(gw))
        assert (await client.reply()).status == 200


async def grown_mb(
    gw: TestGateway, client: Wire, head: bytes, piece: bytes, pieces: int
) -> tuple[float, Reply]:
    """Send it all, as far as anybody reads; how much this process (gateway and client) grew, at most."""
    process = psutil.Process()
    before, most = process.memory_info().rss, 0

    async def flood() -> None:
        try:
            await client.send(head)
            for _ in range(pieces):
                await client.send(piece)
        except ConnectionError:
            pass  # it had enough of us

    sending = asyncio.create_task(flood())
    replying = asyncio.create_task(client.reply())
    while not replying.done():
        most = max(most, process.memory_info().rss - before)
        await asyncio.sleep(0.005)
    most = max(most, process.memory_info().rss - before)
    sending.cancel()
    await asyncio.gather(sending, return_exceptions=True)
    return most / MB, await replying


async def test_fifty_mb_in_chunks_are_refused_and_memory_grows_by_the_bound_at_most(gw):
    async with wire(gw) as client:
        piece = b"%x\r\n%b\r\n" % (MB, b" " * MB)
        head = request(gw, b"", "transfer-encoding: chunked", length=False)
        grown, reply = await grown_mb(gw, client, head, piece, 50)
    assert is_openai(reply, 413, "request_too_large")
    assert grown < 35, grown  # the bound of 10 MiB, twice while it is joined
    assert await still_serves(gw)


async def test_fifty_mb_with_a_length_never_come_into_memory(gw):
    async with wire(gw) as client:
        head = request(gw, b"", f"content-length: {50 * MB}", length=False)
        grown, reply = await grown_mb(gw, client, head, b" " * MB, 50)
    assert is_openai(reply, 413, "request_too_large")
    assert grown < 12, grown


async def test_a_body_at_the_bound_is_read_and_one_byte_more_is_not(settings, pool):
    async with running_gateway(replace(settings, body_bytes_max=2048), pool) as gw:
        for size, expected in ((2048, (400, None)), (2049, (413, "request_too_large"))):
            async with wire(gw) as client:
                await client.send(request(gw, b" " * size))
                assert is_openai(await client.reply(), *expected)
            async with wire(gw) as client:
                await client.send(request(gw, b"", "transfer-encoding: chunked", length=False))
                await client.send(b"%x\r\n%b\r\n0\r\n\r\n" % (size, b" " * size))
                assert is_openai(await client.reply(), *expected)


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd", "GZIP", "gzip, gzip", "made-up"])
async def test_a_compressed_body_is_refused_clearly(gw, encoding):
    body = gzip.compress(json.dumps(ASK).encode())
    async with wire(gw) as client:
        await client.send(request(gw, body, f"content-encoding: {encoding}"))
        reply = await client.reply()
        assert is_openai(reply, 400, "unsupported_content_encoding")
        await client.send(get("/api/health"))
        assert (await client.reply()).status == 200


async def test_a_zip_bomb_is_never_inflated(gw):
    bomb = gzip.compress(b" " * (1000 * MB), 9)
    async with wire(gw) as client:
        grown, reply = await grown_mb(
            gw,
            client,
            request(gw, b"", f"content-length: {len(bomb)}", "content-encoding: gzip", length=False),
            bomb,
            1,
        )
    assert is_openai(reply, 400, "unsupported_content_encoding")
    assert grown < 12, grown


async def test_a_body_called_identity_is_as_it_is(gw, engine):
    await gw.register(engine.url)
    async with wire(gw) as client:
        await client.send(chat(gw, ASK, "content-encoding: identity"))
        assert (await client.reply()).status == 200


# --- bodies that make no sense ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", None),
        (b"{", None),
        (b"null", None),
        (b"[]", None),
        (b"\xff\xfe", None),
        (b'{"model": NaN}', None),
        (b"\x00", None),
        (b"[" * 100_000, None),
        (b'{"a":' * 100_000, None),
        (b'{"model": "x"}', "missing_required_parameter"),
        (json.dumps(ASK | {"model": 5}).encode(), "invalid_type"),
        (json.dumps(ASK | {"messages": "hi"}).encode(), "invalid_type"),
        (json.dumps(ASK | {"max_tokens": "many"}).encode(), "invalid_type"),
        (json.dumps(ASK | {"max_tokens": 10**400}).encode(), None),
        (json.dumps(ASK | {"stream": "yes"}).encode(), "invalid_type"),
    ],
    ids=range(15),
)
async def test_a_body_that_is_no_request_is_a_400(gw, body, code):
    async with wire(gw) as client:
        await client.send(request(gw, body))
        reply = await client.reply()
        assert reply.status == 400, reply
        assert is_openai(reply, 400, code if code is not None else reply.error["code"])
        assert len(reply.body) < 2000
        await client.send(get("/api/health"))
        assert (await client.reply()).status == 200, "the connection goes on"


async def test_an_unknown_model_is_a_404_that_names_the_param(gw):
    async with wire(gw) as client:
        reply = await (await client.send(chat(gw, ASK | {"model": "no-such"}))).reply()
    assert is_openai(reply, 404, "model_not_found")
    assert reply.error["param"] == "model"


@pytest.mark.parametrize("kind", ["text/plain", "multipart/form-data; boundary=x", "application/xml"])
async def test_another_content_type_is_a_400(gw, kind):
    async with wire(gw) as client:
        lines = (
            f"POST {PATH} HTTP/1.1\r\n{HOST}\r\ncontent-type: {kind}\r\nauthorization: Bearer {gw.key}\r\n"
        )
        await client.send((lines + "content-length: 2\r\n\r\n{}").encode())
        assert is_openai(await client.reply(), 400, "unsupported_content_type")


# --- paths and methods -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    ["/v1", "/v1/", "/v1/nope", "/v1/chat/completions/", "/v1/chat/completions/x", "/v1//chat/completions",
     "/v1/%2e%2e/health", "/v1/../v1/nope", "/v1/chat%2fcompletions", "/v1/tokenize", "/v1/%c3%a9", "/v1/%00", "/v1/%ff"],
)  # fmt: skip
async def test_an_unknown_path_under_v1_is_a_404_in_openais_shape(gw, path):
    async with wire(gw) as client:
        line = f"POST {path} HTTP/1.1"
        reply = await (await client.send(request(gw, b"{}", line=line))).reply()
    assert is_openai(reply, 404, "not_found")


@pytest.mark.parametrize(
    "path", ["/", "/nope", "/api", "/api/nope", "/metrics/x", "/tokenize", "/v1x", "/sleep", "/.env"]
)
async def test_an_unknown_path_elsewhere_has_one_plain_error(gw, path):
    async with wire(gw) as client:
        reply = await (await client.send(get(path))).reply()
    assert reply.status == 404
    assert reply.json["error"] == "There is nothing at this path."
    assert reply.headers["x-request-id"] == reply.json["request_id"]


@pytest.mark.parametrize("path", ["/api/v1/customer/nope", "/api/v2/nope"])
async def test_the_customer_surface_has_its_own_shape(gw, path):
    async with wire(gw) as client:
        reply = await (await client.send(get(path))).reply()
    assert reply.status == 404
    assert set(reply.error) == {"code", "message", "request_id", "details"}
    assert reply.error["request_id"] == reply.headers["x-request-id"]


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("GET", PATH, {"POST"}),
        ("DELETE", PATH, {"POST"}),
        ("PUT", "/v1/models", {"GET", "HEAD"}),
        ("PATCH", PATH, {"POST"}),
        ("OPTIONS", PATH, {"POST"}),
        ("TRACE", PATH, {"POST"}),
        ("PROPFIND", PATH, {"POST"}),
        ("GET", "/api/providers/heartbeat", {"POST"}),
    ],
)
async def test_a_wrong_method_is_a_405_that_says_which_are_right(gw, method, path, allow):
    async with wire(gw) as client:
        reply = await (await client.send(request(gw, b"", line=f"{method} {path} HTTP/1.1"))).reply()
    assert set(reply.headers["allow"].replace(" ", "").split(",")) == allow
    if path.startswith("/v1"):
        assert is_openai(reply, 405, "method_not_allowed")
    else:
        assert (reply.status, isinstance(reply.error, str)) == (405, True)


async def test_head_has_the_headers_and_no_body(gw):
    async with wire(gw) as client:
        await client.send(b"HEAD /v1/models HTTP/1.1\r\nhost: x\r\n\r\n")
        reply = await client.reply(to="HEAD")
        assert (reply.status, reply.body) == (200, b"")
        assert int(reply.headers["content-length"]) > 0
        await client.send(b"HEAD /v1/nope HTTP/1.1\r\nhost: x\r\n\r\n")
        assert (await client.reply(to="HEAD")).status == 404
        await client.send(get("/api/health"))
        assert (await client.reply()).status == 200


# --- what is hardly HTTP ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "head",
    [
        get("/health", "x-long: " + "a" * 100_000),
        get("/health", "a" * 100_000 + ": x"),
        get("/health", *(f"x-{number}: 1" for number in range(10_000))),
        get("/health?" + "a" * 100_000),
        get("/" + "a" * 9000),
    ],
    ids=["one long value", "one long name", "ten thousand headers", "a long query", "a long path"],
)
async def test_a_header_flood_is_a_431_and_the_connection_ends(gw, head):
    async with wire(gw) as client:
        with_errors = asyncio.create_task(_send_all(client, head))
        assert is_openai(await client.reply(), 431, "headers_too_large")
        assert await client.is_closed()
        await with_errors
    assert await still_serves(gw)


async def _send_all(client: Wire, data: bytes) -> None:
    with contextlib.suppress(ConnectionError):  # it may be refused before the end
        await client.send(data)


async def test_headers_without_end_never_come_into_memory(gw):
    async with wire(gw) as client:
        grown, reply = await grown_mb(gw, client, b"GET / HTTP/1.1\r\n", b"x: " + b"a" * MB, 50)
    assert reply.status == 431
    assert grown < 12, grown


async def test_headers_within_the_bounds_are_taken(gw):
    async with wire(gw) as client:
        headers = ["x-long: " + "a" * 8000, *(f"x-{number}: 1" for number in range(100))]
        assert (await (await client.send(get("/health", *headers))).reply()).status == 200


TLS_HELLO = bytes.fromhex("16030100a5010000a10303") + b"\x00" * 32


@pytest.mark.parametrize(
    "data",
    [
        b"\x00\r\n\r\n",
        b"\x00" * 5000,
        b"GET /health HTTP/1.1\r\nhost: x\r\nx: a\x00b\r\n\r\n",
        b"GET /hea\x00lth HTTP/1.1\r\nhost: x\r\n\r\n",
        TLS_HELLO,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.0\r\n",
        b"GET /health\r\n\r\n",
        b"GET /health HTTP/9.9\r\nhost: x\r\n\r\n",
        b"GET  /health  HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost x\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost: x\r\n folded: y\r\n\r\n",
        b"POST /v1/models HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n",
        b"POST /v1/models HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n",
        b"POST /v1/models HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\n",
        b"POST /v1/models HTTP/1.1\r\nhost: x\r\ntransfer-encoding: gzip, x\r\n\r\n",
        b"GET http://[ HTTP/1.1\r\nhost: x\r\n\r\n",
        b"\xff\xfe\xfd\r\n\r\n",
    ],
    ids=range(18),
)
async def test_what_is_no_http_gets_a_400_or_a_close_and_no_traceback(gw, caplog, data):
    async with wire(gw) as client:
        await client.send(data)
        client.writer.write_eof()
        try:
            reply = await client.reply()
        except (asyncio.IncompleteReadError, ConnectionResetError):
            reply = None
        if reply is not None:
            assert reply.status == 400, reply
            assert is_openai(reply, 400, None)
            assert await client.is_closed()
    assert [record for record in caplog.records if record.exc_info] == []
    assert await still_serves(gw)


async def test_a_chunked_body_that_breaks_off_into_garbage_is_a_400(gw):
    async with wire(gw) as client:
        await client.send(request(gw, b"", "transfer-encoding: chunked", length=False) + b"2\r\n{}\r\nzz\r\n")
        assert is_openai(await client.reply(), 400, None)
        assert await client.is_closed()


# --- connections -----------------------------------------------------------------------------------------------------


async def test_a_client_of_http_1_0_gets_a_stream_that_the_close_ends(gw, engine):
    await gw.register(engine.url)
    async with wire(gw) as client:
        await client.send(chat(gw, STREAM, line=f"POST {PATH} HTTP/1.0"))
        reply = await client.reply()
    assert reply.status == 200
    assert "transfer-encoding" not in reply.headers
    assert "content-length" not in reply.headers
    assert reply.headers["connection"] == "close"
    assert reply.body.endswith(b"data: [DONE]\n\n")


async def test_a_client_of_http_1_0_may_keep_its_connection_for_whole_answers(gw, engine):
    await gw.register(engine.url)
    async with wire(gw) as client:
        for _ in range(2):
            await client.send(chat(gw, ASK, "connection: keep-alive", line=f"POST {PATH} HTTP/1.0"))
            reply = await client.reply()
            assert (reply.status, reply.headers["connection"]) == (200, "keep-alive")
        await client.send(chat(gw, ASK, line=f"POST {PATH} HTTP/1.0"))
        assert (await client.reply()).status == 200
        assert await client.is_closed()


async def test_a_client_that_waits_for_100_continue_gets_it(gw, engine):
    await gw.register(engine.url)
    body = json.dumps(ASK).encode()
    async with wire(gw) as client:
        await client.send(
            request(gw, b"", "expect: 100-continue", f"content-length: {len(body)}", length=False)
        )
        assert (await client.reply()).status == 100
        await client.send(body)
        assert (await client.reply()).status == 200


async def test_another_expectation_is_refused_in_our_shape(gw):
    async with wire(gw) as client:
        reply = await (await client.send(chat(gw, ASK, "expect: a-miracle"))).reply()
    assert is_openai(reply, 400, None)
    assert reply.error["message"] == "Expectation Failed"


@pytest.mark.parametrize(
    "bodies", [[ASK, ASK], [STREAM, ASK], [ASK, STREAM], [STREAM, STREAM, {"model": "x"}, ASK]]
)
async def test_a_connection_is_used_again_after_every_kind_of_answer(gw, engine, bodies):
    await gw.register(engine.url)
    async with wire(gw) as client:
        for body in bodies:
            await client.send(chat(gw, body))
            assert (await client.reply()).status == (200 if "messages" in body else 400)
        await client.send(chat(gw, ASK, "connection: close"))
        reply = await client.reply()
        assert (reply.status, reply.headers["connection"]) == (200, "close")
        assert await client.is_closed()


@pytest.mark.parametrize("protocol", ["websocket", "h2c"])
async def test_an_upgrade_that_is_not_offered_is_ignored_and_the_connection_goes_on(gw, engine, protocol):
    await gw.register(engine.url)
    async with wire(gw) as client:
        upgrade = ("connection: upgrade", f"upgrade: {protocol}")
        for body in (ASK, STREAM):
            await client.send(chat(gw, body, *upgrade))
            assert (await client.reply()).status == 200
        await client.send(get("/v1/nope", *upgrade))
        assert is_openai(await client.reply(), 404, "not_found")


async def test_pipelined_requests_are_answered_in_order(gw, engines):
    engine = await engines(ttft_ms=50)
    await gw.register(engine.url)
    async with wire(gw) as client:
        await client.send(
            chat(gw, STREAM) + get("/api/health") + chat(gw) + get("/v1/nope") + chat(gw, STREAM)
        )
        replies = [await client.reply() for _ in range(5)]
    assert [reply.status for reply in replies] == [200, 200, 200, 404, 200]
    assert replies[0].body.endswith(b"[DONE]\n\n")
    assert replies[1].json["status"] == "ok"
    assert replies[2].json["object"] == "chat.completion"
    assert replies[4].body.endswith(b"[DONE]\n\n")
    assert len({reply.headers["x-request-id"] for reply in replies}) == 5


async def test_ten_thousand_pipelined_requests_behind_a_slow_one_are_held_back(gw, engines):
    engine = await engines(ttft_ms=60_000)
    await gw.register(engine.url)
    async with wire(gw) as client:
        await client.send(chat(gw, STREAM))
        await eventually(lambda: gw.gateway.lifecycle.in_flight == 1)
        before = psutil.Process().memory_info().rss
        client.writer.write(get("/api/health") * 500_000)  # 17 MB
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1.0):
                await client.writer.drain()
        grown = (psutil.Process().memory_info().rss - before) / MB
        client.writer.transport.abort()
    assert grown < 45, grown  # the client's own buffer is in this process too


async def test_a_body_that_comes_slowly_is_waited_for(gw, engine):
    await gw.register(engine.url)
    body = json.dumps(ASK).encode()
    async with wire(gw) as client:
        await client.send(request(gw, b"", f"content-length: {len(body)}", length=False))
        for byte in body:
            await client.send(bytes([byte]))
            await asyncio.sleep(0.002)
        assert (await client.reply()).status == 200


async def test_a_key_that_is_revoked_while_a_body_comes_is_refused(gw, engine):
    await gw.register(engine.url)
    body = json.dumps(ASK).encode()
    async with wire(gw) as client:
        await client.send(request(gw, b"", f"content-length: {len(body)}", length=False) + body[:9])
        await eventually(lambda: gw.gateway._runner.app[KEYRING].lookup(gw.key) is not None)
        await KeyStore(gw.pool, load_pepper(gw.gateway.settings)).revoke(gw.key_row.id)
        await eventually(lambda: gw.gateway._runner.app[KEYRING].lookup(gw.key) is None)
        await client.send(body[9:])
        assert (await client.reply()).status == 401
    assert not await engine.requests()


async def test_clients_that_leave_in_the_middle_of_a_request_leave_nothing(gw, caplog):
    whole = chat(gw)
    for cut in (1, 30, len(whole) - 10):
        async with wire(gw) as client:
            await client.send(whole[:cut])
    await eventually(lambda: len(gw.gateway._runner.server.connections) == 0)
    assert gw.gateway.lifecycle.in_flight == 0
    assert [record for record in caplog.records if record.exc_info] == []


# --- nothing leaks ---------------------------------------------------------------------------------------------------


LEAK = re.compile(
    rb"aiohttp|python|uvicorn|asyncio|asyncpg|redis|pydantic|orjson|traceback|File \"|/work|/tmp|site-packages"
    rb"|127\.0\.0\.1:\d+|\.py\b|postgres",
    re.IGNORECASE,
)


def leaks(reply: Reply) -> list[bytes]:
    head = "\n".join(f"{name}: {value}" for name, value in reply.headers.items()).encode()
    return LEAK.findall(head + reply.body)


async def test_no_answer_says_what_runs_here(gw, engine):
    await gw.register(engine.url)
    requests = [
        get("/health"), get("/v1/nope"), get("/nope"), get("/v1/models"), get("/ready"), get("/api/health"),
        chat(gw), chat(gw, STREAM), chat(gw, {"model": 1}), request(gw, b"{"),
        chat(gw, ASK, "expect: a-miracle"), chat(gw, line=f"DELETE {PATH} HTTP/1.1"),
        get("/api/docs/ui/../../../etc/passwd"), get("/api/docs/ui/%2e%2e%2fstart.py"), get("/api/docs/ui/"),
        get("/health", "x: " + "a" * 9000), b"\x00\r\n\r\n",
    ]  # fmt: skip
    for raw in requests:
        async with wire(gw) as client:
            reply = await (await client.send(raw)).reply()
            assert leaks(reply) == [], raw[:60]
            assert reply.headers.get("server", "poolgate") == "poolgate"
            assert reply.headers["x-request-id"].startswith("req_"), raw[:60]


async def test_a_failure_inside_poolgate_is_a_500_without_its_cause(gw, monkeypatch, caplog):
    monkeypatch.setattr(gw.gateway.lifecycle._admission, "_registry", BrokenRegistry())
    async with wire(gw) as client:
        reply = await (await client.send(chat(gw))).reply()
        assert is_openai(reply, 500, "internal_error")
        assert b"secret" not in reply.body
        await client.send(get("/api/health"))
        assert (await client.reply()).status == 200
    crashed = next(record for record in caplog.records if record.__dict__.get("action") == "request_crashed")
    assert crashed.__dict__["request_id"] == reply.headers["x-request-id"]
    assert "the secret cause" in str(crashed.exc_info)


class BrokenRegistry:
    """No turn gets beyond it."""

    @property
    def snapshot(self) -> Any:
        raise RuntimeError("the secret cause")


@pytest.mark.parametrize("engine_alive", [True, False])
async def test_an_engines_address_is_in_no_answer(gw, engine, engine_alive):
    await gw.register(engine.url)
    if not engine_alive:
        await engine.kill()
    for body in (ASK, STREAM):
        async with wire(gw) as client:
            reply = await (await client.send(chat(gw, body))).reply()
            assert reply.status == (200 if engine_alive else 503)
            assert str(engine.port).encode() not in reply.body
            assert leaks(reply) == []


async def test_a_key_is_in_no_log_wherever_it_was_sent(gw, engine, caplog, monkeypatch):
    caplog.set_level(logging.DEBUG)
    await gw.register(engine.url)
    secret = "sk-pg-THE-SECRET-of-somebody"

    def everywhere() -> list[bytes]:
        keyed = f"{PATH}?key={secret}"
        body = json.dumps(ASK | {"api_key": secret}).encode()
        beat = json.dumps({"api_key": secret}).encode()
        lines = [HOST, JSON, f"content-length: {len(body)}"]
        return [
            ("\r\n".join([f"POST {PATH} HTTP/1.1", *lines, f"{name}: {secret}"]) + "\r\n\r\n").encode() + body
            for name in ("authorization: Bearer", "authorization", "x-api-key", "x-renter-key", "x-provider-key", "cookie")
        ] + [
            chat(gw, ASK | {"api_key": secret}, line=f"POST {keyed} HTTP/1.1"),
            chat(gw, line=f"DELETE {keyed} HTTP/1.1"),
            get(f"/nope?key={secret}"), get(f"/v1/models?key={secret}"),
            get(f"/health?key={secret}", "x: " + "a" * 9000),
            get("/health", f"authorization: Bearer {secret}", "bro ken"),
            request(gw, beat, line="POST /api/providers/heartbeat HTTP/1.1"),
        ]  # fmt: skip

    async def send_all() -> None:
        for raw in everywhere():
            async with wire(gw) as client:
                reply = await (await client.send(raw.replace(b"Bearer: ", b"Bearer "))).reply()
                assert secret.encode() not in reply.body

    await send_all()
    monkeypatch.setattr(gw.gateway.lifecycle._admission, "_registry", BrokenRegistry())
    await send_all()
    text = caplog.text + " ".join(str(record.__dict__) for record in caplog.records)
    assert "request_crashed" in text
    assert secret not in text
    assert gw.key not in text


async def test_refusals_are_counted_by_code(gw):
    for _ in range(3):
        async with wire(gw) as client:
            await (await client.send(get("/v1/nope"))).reply()
    text = gw.gateway.metrics.render().decode()
    assert re.search(r'poolgate_refusals_total\{code="not_found"\} 3\.0', text)
