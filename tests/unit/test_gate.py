"""What an agent lets pass to an engine: the gateway's own requests, less what was for the agent, and nothing else."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.defaults import Settings
from gateway.reach.ways import Ways
from gateway.relay.upstream import UpstreamPool
from nodes.agent.gate import HEAD_BYTES_MAX, Answered, Head, RequestGate
from nodes.reach import Listener

REACH = Listener("127.0.0.1", 8443, "0" * 64, 1, "node", "e0")
POOL = UpstreamPool("127.0.0.1", 8443, Settings(), reach=REACH, ways=Ways(b"pepper-of-the-tests", None))  # type: ignore[arg-type]


def gate(seen: list[Head] | None = None) -> RequestGate:
    return RequestGate((seen if seen is not None else []).append)


def refused(data: bytes) -> int:
    with pytest.raises(Answered) as answer:
        gate().feed(data)
    return answer.value.status


def test_a_gateways_request_passes_without_token_and_engine():
    heads: list[Head] = []
    passed = gate(heads).feed(POOL.request("/v1/chat/completions", "req_1", b'{"a":1}'))
    assert passed == (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1:8443\r\ncontent-type: application/json\r\n"
        b'x-request-id: req_1\r\ncontent-length: 7\r\n\r\n{"a":1}'
    )
    (head,) = heads
    assert (len(head.fields["x-poolgate-token"]), head.fields["x-poolgate-engine"]) == (64, "e0")
    assert gate().feed(POOL.bare("/health")).startswith(b"GET /health HTTP/1.1\r\n")


@given(st.lists(st.binary(max_size=50), min_size=1, max_size=4), st.data())
def test_requests_pass_whole_and_in_order_however_they_are_cut_up(
    bodies: list[bytes], data: st.DataObject
) -> None:
    whole = b"".join(POOL.request("/v1/completions", f"req_{n}", body) for n, body in enumerate(bodies))
    wanted = b"".join(
        gate().feed(POOL.request("/v1/completions", f"req_{n}", body)) for n, body in enumerate(bodies)
    )
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=6)))
    one, got = gate(), b""
    for start, end in zip([0, *cuts], [*cuts, len(whole)], strict=True):
        got += one.feed(whole[start:end])
    assert got == wanted


HEADS = [
    b"GET /metrics HTTP/1.1", b"POST /sleep HTTP/1.1", b"DELETE /health HTTP/1.1", b"POST /health HTTP/1.1",
    b"GET /health HTTP/1.0", b"GET /health", b"GET  /health HTTP/1.1", b"GET http://h/health HTTP/1.1",
    b"GET /health HTTP/1.1\r\nno colon", b"GET /health HTTP/1.1\r\n folded: x", b"GET /health HTTP/1.1\r\na : x",
    b"GET /health HTTP/1.1\r\na: x\r\nA: y", b"GET /health HTTP/1.1\nhost: x", b"GET /health HTTP/1.1\r\na: x\x00",
    b"POST /tokenize HTTP/1.1\r\ntransfer-encoding: chunked", b"POST /tokenize HTTP/1.1\r\nexpect: 100-continue",
    b"GET /health HTTP/1.1\r\nupgrade: websocket", b"POST /tokenize HTTP/1.1\r\ncontent-length: -1",
    b"POST /tokenize HTTP/1.1\r\ncontent-length: 1, 1", b"POST /tokenize HTTP/1.1\r\ncontent-length: 99999999999",
    b"POST /tokenize HTTP/1.1\r\ncontent-length: +5", b"POST /tokenize?x=1 HTTP/1.1", b"POST /v1/../sleep HTTP/1.1",
]  # fmt: skip


@pytest.mark.parametrize("head", HEADS, ids=range(len(HEADS)))
def test_what_gateways_do_not_write_is_refused(head: bytes) -> None:
    assert refused(head + b"\r\n\r\n") == 403


def test_a_head_that_does_not_end_is_refused():
    assert refused(b"GET /health HTTP/1.1\r\na: " + b"x" * HEAD_BYTES_MAX) == 403


@given(st.binary(max_size=300))
def test_any_bytes_are_refused_or_kept_and_never_passed(data: bytes) -> None:
    with contextlib.suppress(Answered):
        assert gate().feed(b"\xff" + data) == b""
