"""The edge's grammar of heads against llhttp's: what it takes, llhttp takes too, and reads the same in it."""

from contextlib import suppress
from typing import Any

import httptools
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.edge.head import HEADERS_MAX, Head, read_head

LINE = b"POST /v1/chat/completions HTTP/1.1\r\n"


class Read:
    """One request as llhttp reads it."""

    def __init__(self, raw: bytes) -> None:
        self.target = b""
        self.headers: list[tuple[bytes, bytes]] = []
        self.body = b""
        self.is_whole = False
        self.keeps_alive: bool | None = None
        self.parser = httptools.HttpRequestParser(self)
        with suppress(httptools.HttpParserUpgrade):  # what stands behind it is the next request all the same
            self.parser.feed_data(raw)
        self.method: bytes = self.parser.get_method()
        self.version: str = self.parser.get_http_version()

    def on_url(self, url: bytes) -> None:
        self.target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value.rstrip(b" \t")))

    def on_headers_complete(self) -> None:
        self.keeps_alive = self.parser.should_keep_alive()

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self.is_whole = True


def agrees(head: Head, raw: bytes) -> None:
    """llhttp reads the same request in `raw`, and it ends where `head` says."""
    body = b"x" * min(head.body_bytes, 1000)
    read = Read(raw + body)
    assert read.is_whole or head.body_bytes > len(body), "it ends later"
    assert read.method == head.method
    assert read.target == head.target
    assert (read.version == "1.1") is head.is_http_11
    assert dict(read.headers) == head.fields
    assert len(read.headers) == len(head.fields)
    assert read.body == body
    assert read.keeps_alive is head.keep_alive


NAMES = st.sampled_from(
    [b"Host", b"host", b"Content-Length", b"content-length", b"Content-Type", b"Connection", b"connection", b"Upgrade",
     b"Transfer-Encoding", b"Expect", b"Trailer", b"TE", b"Authorization", b"Accept", b"X-a", b"content-lengthy", b"*",
     b"Keep-Alive", b"Proxy-Connection", b"x_y", b"a b", b"", b":", b"\xc3\xa9"]
)  # fmt: skip
VALUES = st.sampled_from(
    [b"", b"x", b"0", b"5", b"007", b" 12 ", b"\t3", b"3\t", b"+5", b"-1", b"0x5", b"5,5", b"5 5", b"9" * 15, b"9" * 25,
     b"close", b"Keep-Alive", b"keep-alive, close", b"close,keep-alive", b"upgrade", b"Upgrade, TE", b"close\t", b"clos",
     b" close , upgrade", b"closed", b"close;x", b",", b",close,", b"te", b"http2-settings", b"chunked", b"gzip, chunked",
     b"websocket", b"h2c", b"100-continue", b"\xe9\xff", b"a\tb", b"a\x7fb", b"a\x00b", b"a\rb", b"a\nb", b" \t "]
)  # fmt: skip
SEPARATORS = st.sampled_from([b":", b": ", b":\t", b":  ", b" :", b"\t: ", b""])
ENDS = st.sampled_from([b"\r\n"] * 20 + [b"\n", b"\r", b"\r\r\n", b"\r\n ", b"\r\n\t"])
METHODS = st.sampled_from(
    [b"POST", b"GET", b"HEAD", b"PUT", b"DELETE", b"OPTIONS", b"PATCH", b"CONNECT", b"post", b"POS", b"PRI"]
)
TARGETS = st.one_of(
    st.sampled_from([b"/", b"*", b"/v1/chat/completions", b"/a?b=c", b"http://x/y", b"//x", b"/a#b", b"x:1", b"foo",
                     b"/\xe9", b"HTTP://x",
                     b"http:/x", b"http://", b"http://a@b/", b"http://a@b@c/", b"?"]),
    st.text("/az%?#@:&[]{}|\\^\"<>`~!*'", max_size=8).map(lambda text: b"/" + text.encode()),
)  # fmt: skip
VERSIONS = st.sampled_from(
    [b"HTTP/1.1"] * 6 + [b"HTTP/1.0"] * 3 + [b"HTTP/0.9", b"HTTP/2.0", b"http/1.1", b"HTTP/1.10"]
)


@st.composite
def heads(draw: Any) -> bytes:
    """A head with something odd here and there, and often nothing odd."""
    line = draw(METHODS) + b" " + draw(TARGETS) + b" " + draw(VERSIONS) + draw(ENDS)
    host = b"Host: x\r\n" if draw(st.booleans()) else b""
    fields = [
        draw(NAMES) + draw(SEPARATORS) + draw(VALUES) + draw(ENDS) for _ in range(draw(st.integers(0, 5)))
    ]
    return line + host + b"".join(fields) + b"\r\n"


@settings(max_examples=3000, deadline=None)
@given(heads())
def test_what_is_taken_is_taken_by_llhttp_and_means_the_same(raw: bytes):
    head = read_head(raw)
    if head is not None:
        agrees(head, raw)


@settings(max_examples=1000, deadline=None)
@given(NAMES, SEPARATORS, VALUES, VERSIONS)
def test_one_odd_field_in_a_plain_head_is_refused_or_means_the_same(
    name: bytes, separator: bytes, value: bytes, version: bytes
):
    raw = b"POST /v1/completions " + version + b"\r\nhost: x\r\n" + name + separator + value + b"\r\n\r\n"
    head = read_head(raw)
    if head is not None:
        agrees(head, raw)


@settings(max_examples=1000, deadline=None)
@given(st.binary(min_size=1, max_size=3), st.integers(0, 120))
def test_some_odd_bytes_anywhere_in_a_plain_head_are_refused_or_mean_the_same(odd: bytes, at: int):
    raw = LINE + b"Host: x\r\nContent-Length: 12\r\nConnection: keep-alive\r\nAccept: */*\r\n\r\n"
    at = min(at, len(raw) - 4)  # what stands behind a head is a body's
    for changed in (raw[:at] + odd + raw[at:], raw[:at] + odd + raw[at + len(odd) :]):
        end = changed.find(b"\r\n\r\n") + 4
        head = read_head(changed[:end]) if end >= 4 else None
        if head is not None:
            agrees(head, changed[:end])


LENGTHS = st.one_of(
    st.integers(0, 300).map(lambda number: str(number).encode()),
    st.sampled_from([b"", b"+1", b"-1", b"0x1", b"1,1", b"1 ", b" 1", b"1\t", b"007", b"1" * 15, b"9" * 16,
                     b"9" * 40, "\uff11".encode(), b"1_0"]),
)  # fmt: skip


@settings(max_examples=2000, deadline=None)
@given(LENGTHS, LENGTHS, st.integers(0, 300), st.booleans(), st.sampled_from([b"", b" ", b"\t", b"  "]))
def test_a_body_behind_the_same_head_is_what_a_fresh_look_finds(
    first: bytes, second: bytes, size: int, is_last: bool, space: bytes
):
    def with_length(length: bytes) -> bytes:
        fields = [b"Host: 1", b"X: 12", b"content-length:" + space + length]
        return LINE + b"\r\n".join(fields if is_last else fields[::-1]) + b"\r\n\r\n"

    head = read_head(with_length(first))
    if head is None:
        return
    head.body_bytes_max = 200
    data = with_length(second) + b"y" * size
    fresh = read_head(with_length(second))
    body = head.body_again(data)
    if body is not None:
        assert fresh is not None
        assert fresh.body_bytes == size <= 200
        assert body == b"y" * size
        assert fresh.fields.keys() == head.fields.keys()
    elif fresh is not None and first == first.strip() and second == str(fresh.body_bytes).encode():
        assert fresh.body_bytes != size or size > 200, (
            "known again whenever it is plain"
        )  # so without zeros before it


@settings(max_examples=1000, deadline=None)
@given(st.integers(0, 120), st.binary(min_size=1, max_size=1))
def test_a_head_with_any_other_byte_is_not_known_again(at: int, byte: bytes):
    raw = LINE + b"Host: x\r\nContent-Length: 2\r\nAuthorization: Bearer k\r\n\r\n"
    head = read_head(raw)
    assert head is not None
    head.body_bytes_max = 10
    at = min(at, len(raw) - 1)
    changed = raw[:at] + byte + raw[at + 1 :]
    assert (head.body_again(changed + b"{}") is not None) is (changed == raw)


@pytest.mark.parametrize("cut", range(1, 60))
def test_a_request_that_has_not_come_whole_is_not_known_again(cut: int):
    raw = LINE + b"Host: x\r\nContent-Length: 2\r\n\r\n{}"
    head = read_head(raw[:-2])
    assert head is not None
    head.body_bytes_max = 10
    assert head.body_again(raw) == b"{}"
    assert head.body_again(raw[:-cut]) is None
    assert head.body_again(raw + raw[:cut]) is None


def test_so_many_fields_are_taken_and_one_more_is_not():
    fields = [b"x-%d: 1\r\n" % number for number in range(HEADERS_MAX)]
    raw = LINE + b"host: x\r\n" + b"".join(fields[1:])
    assert read_head(raw + b"\r\n") is not None
    assert read_head(raw + fields[0] + b"\r\n") is None


@pytest.mark.parametrize(
    "fields",
    [
        b"content-length: 5\r\ncontent-length: 5\r\n",
        b"content-length: 5\r\nContent-Length: 6\r\n",
        b"content-length: 5\r\ntransfer-encoding: chunked\r\n",
        b"transfer-encoding: chunked\r\n",
        b"Transfer-Encoding : chunked\r\n",
        b"content-length : 5\r\n",
        b"content-length: +5\r\n",
        b"content-length: 0x5\r\n",
        b"content-length: 5,5\r\n",
        b"content-length: 5\r\n 5\r\n",
        b"content-length: 9999999999999999\r\n",
        b"content-length:\r\n",
        b"x: a\nb: c\r\n",
        b"x: a\rb: c\r\n",
        b"x: \x00\r\n",
        b"\x00: x\r\n",
        b"expect: 100-continue\r\n",
        b"trailer: x\r\n",
        b"connection: x\r\n",
        b"upgrade: websocket\r\n",
        b"host: y\r\n",
        b": x\r\n",
        b"x\r\n",
        b" x: y\r\n",
    ],
)
def test_a_head_that_could_mean_two_things_is_not_plain(fields: bytes):
    assert read_head(LINE + b"host: x\r\n\r\n") is not None
    assert read_head(LINE + b"host: x\r\n" + fields + b"\r\n") is None


def test_a_slim_head_reads_its_fields_anew():
    raw = b"POST /v1/x HTTP/1.1\r\nhost: x\r\nidempotency-key: k\r\ncontent-length: 12\r\nauthorization: Bearer s\r\n\r\n"
    head = read_head(raw)
    assert head is not None
    before = dict(head.fields)
    head.slim()
    assert (head.fields, head.is_keyed) == ({}, True)
    assert head.all_fields() == before | {b"content-length": b"0"}
