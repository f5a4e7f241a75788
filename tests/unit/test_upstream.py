"""Our connection to an engine, against a server that says exactly what it is told, byte by byte."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from itertools import accumulate

import httptools
import pytest
from hypothesis import given
from hypothesis import settings as settings_of
from hypothesis import strategies as st

from config.defaults import Settings
from gateway.relay import upstream
from gateway.relay.upstream import ConnectFailed, UpstreamConnection, UpstreamLost, UpstreamPool, cut_chunks
from tests.waiting import eventually

REQUEST = UpstreamPool("engine", 1, Settings()).request("/v1/chat/completions", "req_1", b"{}")
WHOLE = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
CHUNK = b"3\r\nabc\r\n"
END = b"0\r\n\r\n"


class Server:
    """Accepts connections; a test writes and reads on each as it likes."""

    def __init__(self) -> None:
        self.accepted: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted.append((reader, writer))

    async def says(self, data: bytes, *, of: int = -1) -> None:
        await eventually(lambda: len(self.accepted) > max(of, 0))
        writer = self.accepted[of][1]
        writer.write(data)
        await writer.drain()

    async def heard(self, *, of: int = -1) -> bytes:
        """One whole request."""
        await eventually(lambda: len(self.accepted) > max(of, 0))
        return await self.accepted[of][0].readexactly(len(REQUEST))

    async def sees_end(self, *, of: int = -1) -> bool:
        """Our side closed the connection."""
        try:
            return await self.accepted[of][0].read() == b""
        except ConnectionResetError:
            return True

    def hangs_up(self, *, of: int = -1) -> None:
        self.accepted[of][1].close()


@pytest.fixture
def settings() -> Settings:
    return Settings(engine_idle_s=60.0, engine_idle_connections_max=3, connect_timeout_s=10.0)


@pytest.fixture
async def server() -> AsyncIterator[tuple[Server, int]]:
    told = Server()
    listener = await asyncio.start_server(told.accept, "127.0.0.1", 0)
    yield told, listener.sockets[0].getsockname()[1]
    listener.close()
    for _, writer in told.accepted:
        writer.close()


@pytest.fixture
def peer(server) -> Server:
    return server[0]


@pytest.fixture
async def pool(server, settings) -> AsyncIterator[UpstreamPool]:
    made = UpstreamPool("127.0.0.1", server[1], settings)
    yield made
    made.close()


async def over(connection: UpstreamConnection) -> None:
    await eventually(lambda: connection.is_over)


def ignored() -> None:
    """What comes is looked at by the test itself."""


async def begun(pool: UpstreamPool) -> UpstreamConnection:
    connection = pool.idle() or await pool.connect()
    connection.begin(REQUEST, ignored)
    return connection


async def answered(pool: UpstreamPool, peer: Server, data: bytes = WHOLE) -> UpstreamConnection:
    connection = await begun(pool)
    await peer.heard()
    await peer.says(data)
    await over(connection)
    return connection


# --- one answer ----------------------------------------------------------------------------------------------------


def test_a_request_carries_our_headers_and_no_others():
    head, _, body = (
        UpstreamPool("10.0.0.1", 8000, Settings())
        .request("/v1/x", "req_9", b'{"a":1}')
        .partition(b"\r\n\r\n")
    )
    assert head.split(b"\r\n") == [
        b"POST /v1/x HTTP/1.1",
        b"host: 10.0.0.1:8000",
        b"content-type: application/json",
        b"x-request-id: req_9",
        b"content-length: 7",
    ]
    assert body == b'{"a":1}'


async def test_a_whole_answer_is_taken_once(pool, peer):
    connection = await answered(pool, peer)
    assert (connection.status, connection.complete, connection.failure) == (200, True, None)
    assert connection.peek() == b"ok"
    assert connection.take() == b"ok"
    assert (connection.take(), connection.buffered) == (b"", 0)


async def test_what_was_buffered_is_taken_and_what_follows_goes_to_the_sink(pool, peer):
    connection, got = await begun(pool), []
    await peer.heard()
    await peer.says(HEAD + CHUNK)
    await eventually(lambda: connection.buffered == 3)
    connection.attach(got.append)
    await peer.says(CHUNK + END)
    await over(connection)
    assert (connection.take(), b"".join(got)) == (b"abc", b"abc")


@pytest.mark.parametrize("data", [WHOLE, HEAD + CHUNK + CHUNK + END])
async def test_an_answer_may_come_byte_by_byte(pool, peer, data):
    connection = await begun(pool)
    await peer.heard()
    for byte in data:
        await peer.says(bytes([byte]))
        await asyncio.sleep(0)
    await over(connection)
    assert connection.take() in (b"ok", b"abcabc")


@pytest.mark.parametrize("status", ["100 Continue", "103 Early Hints", "102 Processing"])
async def test_informational_answers_come_before_the_answer_and_are_not_it(pool, peer, status):
    connection = await begun(pool)
    await peer.says(f"HTTP/1.1 {status}\r\nlink: x\r\n\r\n".encode())
    await peer.heard()
    assert (connection.status, connection.complete) == (0, False)
    await peer.says(WHOLE)
    await over(connection)
    assert (connection.status, connection.take()) == (200, b"ok")
    assert connection.status == 200
    connection.release()
    assert pool.idle() is connection


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"SSH-2.0-x\r\n",
        b"HTTP/1.1 999999 x\r\n\r\n",
        HEAD + b"zz\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n",
    ],
)
async def test_what_is_no_http_answer_is_a_failure_and_closes(pool, peer, data):
    connection = await begun(pool)
    await peer.heard()
    await peer.says(data)
    await over(connection)
    assert connection.failure is not None
    assert connection.closed
    assert await peer.sees_end()


async def test_an_end_before_the_answer_is_whole_is_a_failure(pool, peer):
    connection = await begun(pool)
    await peer.heard()
    await peer.says(HEAD + CHUNK)
    peer.hangs_up()
    await over(connection)
    assert not connection.complete
    assert connection.failure is not None
    assert connection.take() == b"abc"


async def test_a_sink_that_fails_ends_the_turn_and_not_the_process(pool, peer, caplog):
    def broken(_data: bytes) -> None:
        raise RuntimeError("in the sink")

    connection = await begun(pool)
    connection.attach(broken)
    await peer.heard()
    await peer.says(HEAD + CHUNK)
    await over(connection)
    assert connection.closed
    assert [record.action for record in caplog.records] == ["relay_failed"]


# --- use again -----------------------------------------------------------------------------------------------------


async def test_a_clean_connection_is_used_again(pool, peer):
    connection = await answered(pool, peer)
    connection.release()
    assert await answered(pool, peer) is connection
    assert len(peer.accepted) == 1
    assert connection.turns == 2
    assert connection.take() == b"ok"


async def test_the_youngest_idle_connection_is_used_first(pool, peer):
    first, second = await begun(pool), await begun(pool)
    await peer.says(WHOLE, of=0)
    await peer.says(WHOLE, of=1)
    for connection in (first, second):
        await over(connection)
        connection.release()
    assert pool.idle() is second
    assert pool.idle() is first
    assert pool.idle() is None


async def test_connections_past_their_age_are_never_used_again(peer, server, settings):
    pool = UpstreamPool("127.0.0.1", server[1], replace(settings, engine_idle_s=0.0))
    connection = await answered(pool, peer)
    connection.release()
    await asyncio.sleep(0.01)
    assert pool.idle() is None
    assert connection.closed
    assert await peer.sees_end()


async def test_no_more_idle_connections_are_kept_than_the_bound(pool, peer, settings):
    connections = [await begun(pool) for _ in range(5)]
    for number, connection in enumerate(connections):
        await peer.says(WHOLE, of=number)
        await over(connection)
        connection.release()
    assert repr(pool).endswith("idle=3>")
    assert [connection.closed for connection in connections] == [False, False, False, True, True]


@pytest.mark.parametrize(
    "data",
    [
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok",
        b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nok",
    ],
)
async def test_an_engine_that_says_close_is_believed(pool, peer, data):
    connection = await answered(pool, peer, data)
    connection.release()
    assert connection.closed
    assert pool.idle() is None


async def test_an_answer_that_only_the_end_ends_is_whole_and_not_used_again(pool, peer):
    connection = await begun(pool)
    await peer.heard()
    await peer.says(b"HTTP/1.1 200 OK\r\n\r\nuntil the end")
    peer.hangs_up()
    await over(connection)
    connection.release()
    assert pool.idle() is None
    assert connection.take() == b"until the end"


async def test_a_released_stream_lingers_for_its_last_chunk(pool, peer):
    connection = await begun(pool)
    await peer.heard()
    await peer.says(HEAD + CHUNK)
    await eventually(lambda: connection.buffered == 3)
    connection.release()
    assert pool.idle() is None, "not yet"
    await peer.says(END)
    await eventually(lambda: repr(pool).endswith("idle=1>"))
    assert pool.idle() is connection
    assert connection.buffered == 0


async def test_a_released_stream_that_brings_no_end_is_closed(pool, peer, monkeypatch):
    monkeypatch.setattr(upstream, "LINGER_S", 0.02)
    connection = await begun(pool)
    await peer.heard()
    await peer.says(HEAD + CHUNK)
    await eventually(lambda: connection.buffered == 3)
    connection.release()
    assert await peer.sees_end()
    assert connection.closed
    assert pool.idle() is None


async def test_the_linger_of_one_turn_does_not_end_the_next(pool, peer, monkeypatch):
    monkeypatch.setattr(upstream, "LINGER_S", 0.05)
    connection = await begun(pool)
    await peer.heard()
    await peer.says(HEAD + CHUNK)
    await eventually(lambda: connection.buffered == 3)
    connection.release()
    await peer.says(END)
    await eventually(lambda: repr(pool).endswith("idle=1>"))
    assert await begun(pool) is connection
    await asyncio.sleep(0.1)  # the timer of the first turn fires
    assert not connection.closed
    await peer.says(WHOLE)
    await over(connection)
    assert connection.take() == b"ok"


async def test_a_paused_connection_is_not_used_again(pool, peer):
    connection = await answered(pool, peer)
    connection.complete = False
    connection.pause()
    connection.complete = True
    connection.release()
    assert connection.closed


async def test_pausing_holds_the_engine_back_and_resuming_gets_the_rest(pool, peer):
    connection, got = await begun(pool), []
    connection.attach(got.append)
    await peer.heard()
    await peer.says(HEAD + CHUNK)
    await eventually(lambda: got)
    connection.pause()
    connection.pause()
    await peer.says(CHUNK + END)
    await asyncio.sleep(0.05)
    assert b"".join(got) == b"abc"
    connection.resume()
    await over(connection)
    assert b"".join(got) == b"abcabc"


async def test_bytes_that_nobody_asked_for_end_an_idle_connection(pool, peer):
    connection = await answered(pool, peer)
    connection.release()
    await peer.says(WHOLE)
    await eventually(lambda: connection.closed)
    assert pool.idle() is None


@pytest.mark.parametrize("second", [WHOLE, WHOLE[:-1], b"HTTP/1.1 200 OK\r\n", b"x"])
async def test_a_second_answer_right_behind_the_first_is_not_part_of_it_nor_of_the_next_turn(
    pool, peer, second
):
    connection = await answered(pool, peer, WHOLE + second)
    assert connection.take() == b"ok"
    connection.release()
    assert connection.closed
    assert pool.idle() is None


@pytest.mark.parametrize("second", [WHOLE, b"x"])
async def test_who_asked_hears_of_an_answer_with_a_second_one_right_behind_it(pool, peer, second):
    connection, got, news = await pool.connect(), [], []
    connection.begin(REQUEST, lambda: news.append(connection.complete))
    connection.attach(got.append)
    await peer.heard()
    await peer.says(HEAD + CHUNK + CHUNK + END + second)
    await over(connection)
    assert news[-1:] == [True]
    connection.release()
    assert connection.closed


async def test_an_engine_that_hangs_up_on_an_idle_connection_costs_nothing(pool, peer):
    connection = await answered(pool, peer)
    connection.release()
    peer.hangs_up()
    await eventually(lambda: connection.closed)
    assert pool.idle() is None


async def test_a_request_that_crosses_the_engines_hang_up_is_known_to_be_stale(pool, peer):
    connection = await answered(pool, peer)
    connection.release()
    connection = pool.idle()
    peer.hangs_up()  # its FIN is on the way while we send
    connection.begin(REQUEST, ignored)
    await over(connection)
    assert connection.failure is not None
    assert connection.was_stale


async def test_a_new_connection_that_fails_is_not_stale(pool, peer):
    connection = await begun(pool)
    await peer.heard()
    peer.hangs_up()
    await over(connection)
    assert not connection.was_stale


async def test_a_failure_after_the_status_is_not_stale(pool, peer):
    (await answered(pool, peer)).release()
    connection = await begun(pool)
    await peer.says(HEAD)
    await eventually(lambda: connection.status == 200)
    peer.hangs_up()
    await over(connection)
    assert not connection.was_stale


# --- closing -------------------------------------------------------------------------------------------------------


async def test_closing_is_seen_by_the_engine_at_once(pool, peer):
    connection = await begun(pool)
    await peer.heard()
    connection.close()
    connection.close()
    assert await peer.sees_end()


async def test_a_closed_pool_closes_idle_connections_and_those_that_come_back(pool, peer):
    idle, busy = await begun(pool), await begun(pool)
    for number, connection in enumerate((idle, busy)):
        await peer.says(WHOLE, of=number)
        await over(connection)
    idle.release()
    pool.close()
    assert idle.closed
    busy.release()
    assert busy.closed


async def test_nobody_listening_is_a_connect_failure(settings, unused_tcp_port_factory: Callable[[], int]):
    pool = UpstreamPool("127.0.0.1", unused_tcp_port_factory(), settings)
    with pytest.raises(ConnectFailed):
        await pool.connect()


async def test_a_host_that_does_not_answer_is_a_connect_failure_in_time(pool, monkeypatch):
    async def never(*_: object) -> None:
        await asyncio.Event().wait()

    pool._settings = replace(pool._settings, connect_timeout_s=0.05)
    monkeypatch.setattr(asyncio.get_running_loop().__class__, "create_connection", never, raising=False)
    with pytest.raises(ConnectFailed, match="too long"):
        await pool.connect()


@pytest.mark.parametrize(
    ("data", "inside"),
    [
        *((b"%x\r\n%b\r\n" % (size, b"x" * size), b"x" * size) for size in (1, 16, 255, 256, 4095, 4096, 65535)),
        (b"10\r\n\r\n%b\r\n" % (b"x" * 14), b"\r\n" + b"x" * 14), (b"3\r\nabc\r\n", b"abc"),
        *((b"%x\r\n%b\r\n" % (size + much, b"x" * size), None) for size in (16, 255, 256, 4096) for much in (-1, 1)),
        (b"", None), (b"1", None), (b"1\r", None), (b"1\r\n", None), (b"10\r\nab", None), (b"0\r\n\r\n", None),
        (b"\r\n", None), (b"10\r\n%b" % (b"x" * 18), None), (b"10;x=y\r\n%b\r\n" % (b"x" * 16), None), (b"-2\r\n", None),
        (b"+10\r\n%b\r\n" % (b"x" * 16), None), (b"0x10\r\n%b\r\n" % (b"x" * 16), None), (b"4\r\nabcde\r\n", None),
        (b" 10\r\n%b\r\n" % (b"x" * 16), None), (b"10\n%b\r\n" % (b"x" * 16), None), (b"bc\r\n", None),
        (b"0010\r\n%b\r\n" % (b"x" * 16), None), (b"A\r\n%b\r\n" % (b"x" * 10), None), (b"g\r\n%b\r\n" % (b"x" * 16), None),
        (b"3\r\nabc\n\n", None), (b"3\r\nabc\r", None), (b"3\r\nabc\rx", None),
        (b"10000\r\n%b\r\n" % (b"x" * 65536), None),
    ],
    ids=range(40),
)  # fmt: skip
def test_only_whole_plain_chunks_are_cut(data, inside):
    bodies: list[bytes] = []
    assert cut_chunks(b"--1\r\na\r\n" + data, 2, bodies) == 8 + (len(data) if inside is not None else 0)
    assert bodies == ([b"a"] if inside is None else [b"a", inside])


@pytest.mark.parametrize("behind", [b"", b"5", b"5\r\nab", b"\r\n", b"0\r\n\r\n", b"2;\r\nab\r\n"])
def test_chunks_are_cut_up_to_what_is_none(behind):
    bodies: list[bytes] = []
    assert cut_chunks(b"1\r\na\r\n2\r\nbc\r\n" + behind, 0, bodies) == 13
    assert bodies == [b"a", b"bc"]


class Alone(UpstreamLost):
    """What llhttp says of an answer of which it sees every byte, as a connection would tell it."""

    def __init__(self) -> None:
        self.parser = httptools.HttpResponseParser(self)
        self.body = b""
        self.came: list[bytes] = []
        self.complete = self.failed = self.has_more = False

    def read(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError:
            self.has_more = self.complete  # it is of what came behind the answer
            self.failed = not self.complete
        if not self.failed:
            self.body += b"".join(self.came)
        self.came.clear()

    def on_message_begin(self) -> None:
        if self.complete:
            raise self

    def on_body(self, body: bytes) -> None:
        self.came.append(body)

    def on_message_complete(self) -> None:
        self.complete = self.parser.get_status_code() >= 200


class Wire:
    """A transport that goes nowhere."""

    def write(self, data: bytes) -> None: ...
    def abort(self) -> None: ...
    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...


SIZES = st.one_of(st.integers(1, 20), st.sampled_from([255, 256, 300, 4095, 4096, 65535, 65536, 70000]))
PLAIN_CHUNKS = st.tuples(st.text("0123456789abcdef\r\n;", min_size=1, max_size=9), SIZES).map(
    lambda told: b"%x\r\n%b\r\n" % (told[1], (told[0].encode() * told[1])[: told[1]])
)
ODD_CHUNKS = st.sampled_from(
    [b"3;x=y\r\nabc\r\n", b"003\r\nabc\r\n", b"A\r\n0123456789\r\n", b"1\r\n\r\r\n", b"4\r\n2\r\n\r\r\n"]
)
BROKEN_CHUNKS = st.sampled_from(
    [b"3\r\nabcd\r\n", b"4\r\nabc\r\n", b"3\nabc\r\n", b"\r\n", b" 3\r\nabc\r\n", b"zz\r\n", b"3\r\nabc\n",
     b"3\r\nabcxy", b"3\r\nabc\r\r", b"-1\r\n", b"fffffffffffffffff\r\n", b"3\r\nabc"]
)  # fmt: skip
ENDS = st.sampled_from(
    [b"", END, END, END, b"0\r\nx: y\r\n\r\n", b"00\r\n\r\n", b"0\r\n", END + WHOLE, END + b"x"]
)
HEADS = st.sampled_from([HEAD, HEAD, b"HTTP/1.1 100 Continue\r\n\r\n" + HEAD, b"HTTP/1.1 200 OK\r\n\r\n"])


@settings_of(max_examples=400, deadline=None)
@given(
    head=HEADS,
    plain=st.lists(PLAIN_CHUNKS, max_size=6),
    odd=st.lists(st.one_of(PLAIN_CHUNKS, ODD_CHUNKS, BROKEN_CHUNKS), max_size=3),
    more=st.lists(st.one_of(PLAIN_CHUNKS, ODD_CHUNKS), max_size=4),
    end=ENDS,
    data=st.data(),
)
def test_an_answer_is_what_llhttp_alone_says_however_it_is_cut(head, plain, odd, more, end, data):
    """Its chunks pass llhttp by where they are whole and plain, and it must not matter which do."""
    told = [head, *plain, *odd, *more, end]
    wire = b"".join(told)
    borders = list(accumulate(map(len, told)))
    near = st.tuples(st.sampled_from(borders), st.integers(-6, 6)).map(sum)
    cuts = sorted(data.draw(st.sets(st.one_of(near, st.integers(0, len(wire))), max_size=8)))
    cuts = [cut for cut in cuts if 0 < cut < len(wire)]
    attach_at = data.draw(st.integers(0, len(cuts) + 1))
    loop = asyncio.new_event_loop()
    try:
        connection, alone, got = UpstreamConnection(loop), Alone(), []
        connection.connection_made(Wire())
        connection.begin(REQUEST, ignored)
        for number, (start, stop) in enumerate(zip([0, *cuts], [*cuts, len(wire)], strict=True)):
            if number == attach_at:
                connection.attach(got.append)
            alone.read(wire[start:stop])
            connection.data_received(wire[start:stop])
            if alone.failed or alone.complete:
                break
    finally:
        loop.close()
    assert connection.complete == alone.complete
    assert connection.closed == alone.failed
    assert not (connection._keeps_alive and alone.has_more)
    assert (connection.failure is not None) == (alone.failed and not alone.complete)
    if not alone.failed:
        assert connection.take() + b"".join(got) == alone.body
    elif attach_at == 0:
        assert b"".join(got) == alone.body


@pytest.mark.parametrize("behind", [b"", CHUNK])
async def test_a_chunk_that_nothing_closes_is_a_failure(pool, peer, behind):
    connection, got = await begun(pool), []
    connection.attach(got.append)
    await peer.says(HEAD + CHUNK)
    await eventually(lambda: got == [b"abc"])
    await peer.says(b"3\r\nabcxy" + behind)
    await over(connection)
    assert (connection.failure is not None, got) == (True, [b"abc"])


async def test_what_follows_half_a_size_is_no_chunk_though_it_looks_like_one(pool, peer):
    connection, got = await begun(pool), []
    connection.attach(got.append)
    await peer.says(HEAD + CHUNK)
    await eventually(lambda: got == [b"abc"])
    await peer.says(b"1")
    await asyncio.sleep(0.05)
    body = b"x" * 0xAB + b"\r\n" + b"y" * (0x100 - 2)
    await peer.says(b"ab\r\n" + body[: 0xAB + 2])
    await eventually(lambda: len(got) == 2)
    await peer.says(body[0xAB + 2 :] + b"\r\n" + END)
    await over(connection)
    assert (connection.complete, b"".join(got)) == (True, b"abc" + body)


async def test_a_stream_is_the_same_however_its_chunks_fall_into_reads(pool, peer):
    """Whole chunks pass the parser by, others do not, and it must not matter which comes after which."""
    chunks = [b"%x\r\n%b\r\n" % (len(text), text) for text in (b"a", b"bc" * 9, b"def", b"g" * 300, b"\r\n")]
    wire = b"".join(chunks)
    for cut in range(1, len(wire), 7):
        connection = await begun(pool)
        got: list[bytes] = []
        await peer.says(HEAD)
        await eventually(lambda: connection.status == 200)  # noqa: B023 - awaited here
        connection.attach(got.append)
        for piece in (wire[:cut], wire[cut:], *chunks, END):
            connection.data_received(piece)
        assert b"".join(got) == b"".join(chunk.partition(b"\r\n")[2][:-2] for chunk in chunks) * 2
        assert connection.complete
        connection.close()


# --- plain heads, which llhttp does not see --------------------------------------------------------------------------

PLAIN = (
    b"HTTP/1.1 200 OK\r\ndate: Sun, 22 Nov 2026 01:21:39 GMT\r\nserver: uvicorn\r\ncontent-length: 5\r\n"
    b"content-type: application/json\r\n\r\n"
)


@pytest.mark.parametrize("cut", [len(PLAIN) + 5, len(PLAIN), len(PLAIN) + 2, len(PLAIN) - 1, 20])
async def test_a_plain_answer_is_whole_however_it_is_cut(pool, peer, cut):
    connection = await begun(pool)
    await peer.heard()
    data = PLAIN + b"12345"
    await peer.says(data[:cut])
    await asyncio.sleep(0.01)
    if data[cut:]:
        assert not connection.is_over
        await peer.says(data[cut:])
    await over(connection)
    assert (connection.status, connection.complete, connection.take()) == (200, True, b"12345")
    connection.release()
    assert await answered(pool, peer) is connection, "and what comes next is read as ever"
    assert connection.take() == b"ok"


async def test_bytes_behind_a_plain_answer_are_no_part_of_it_and_end_the_connection(pool, peer):
    connection = await begun(pool)
    await peer.heard()
    await peer.says(PLAIN + b"12345HTTP/1.1 200 OK\r\n")
    await over(connection)
    assert (connection.complete, connection.take()) == (True, b"12345")
    connection.release()
    assert connection.closed
    assert pool.idle() is None


async def test_a_plain_answer_that_breaks_off_is_a_failure(pool, peer):
    connection = await begun(pool)
    await peer.heard()
    await peer.says(PLAIN + b"123")
    peer.hangs_up()
    await over(connection)
    assert not connection.complete
    assert connection.failure is not None


@pytest.mark.parametrize(
    "field",
    [b"connection: close", b"transfer-encoding: chunked", b"content-length: 6", b"upgrade: x", b"x: y\x00"],
)
async def test_a_head_with_anything_else_is_llhttps_to_judge(field):
    data = PLAIN.replace(b"server: uvicorn", field)
    assert upstream.PLAIN_HEAD.match(PLAIN)
    assert not upstream.PLAIN_HEAD.match(data)
    assert not upstream.PLAIN_HEAD.match(PLAIN.replace(b"\r\n\r\n", b"\r\n" + field + b"\r\n\r\n"))


async def test_the_rest_of_a_plain_answer_goes_to_the_sink_too(pool, peer):
    connection, got = await begun(pool), []
    await peer.heard()
    await peer.says(PLAIN + b"12")
    await eventually(lambda: connection.buffered == 2)
    connection.attach(got.append)
    await peer.says(b"345")
    await over(connection)
    assert (connection.take(), got, connection.complete) == (b"12", [b"345"], True)
