"""The stand-in engine misbehaves exactly as it is told, and records what it saw."""

import asyncio
import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.fakes import captures
from tests.fakes.engine import ROOT, FakeEngine

pytest_plugins = ["tests.fakes.engine_fixtures"]


def chat(*, stream: bool = True, **fields: Any) -> bytes:
    body: dict[str, Any] = {
        "model": "smollm2-135m",
        "messages": [{"role": "user", "content": "hello"}],
        **fields,
    }
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    data = json.dumps(body).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nX-Request-Id: t-1\r\nContent-Type: application/json\r\n"
    return head.encode() + b"Content-Length: %d\r\n\r\n" % len(data) + data


async def raw(engine: FakeEngine, request: bytes, *, until: bytes | None = None) -> bytes:
    """All bytes up to a mark, or up to the end of the connection; a reset raises."""
    reader, writer = await asyncio.open_connection("127.0.0.1", engine.port)
    received = b""
    try:
        writer.write(request)
        while (until is None or until not in received) and (data := await reader.read(1 << 16)):
            received += data
        return received
    finally:
        writer.close()


async def ended(engine: FakeEngine) -> dict[str, Any]:
    """The only request, once it is over."""
    record = await engine.until(lambda record: bool(record["requests"]) and record["requests"][0]["how"])
    return dict(record["requests"][0])


async def test_record_tells_what_came_and_what_went(engine: FakeEngine) -> None:
    await engine.knobs(record_bodies=True, tokens=7)
    await captures.exchange(engine.port, chat())
    entry = await ended(engine)
    assert entry["request_id"] == "t-1"
    assert entry["headers"]["content-type"] == "application/json"
    assert entry["body"]["stream"] is True
    assert (entry["completion_tokens"], entry["tokens_written"]) == (7, 7)
    assert (entry["finished"], entry["aborted"], entry["how"]) == (True, False, "finished")


@pytest.mark.parametrize("status", [400, 404, 500, 503])
async def test_error_status_comes_with_a_real_body(engine: FakeEngine, status: int) -> None:
    await engine.fault("http_error", status=status)
    answer = await captures.exchange(engine.port, chat())
    assert answer.status.split()[1] == b"%d" % status
    assert json.loads(answer.body)["error"]["code"] == status
    assert (await captures.exchange(engine.port, chat())).status == b"HTTP/1.1 200 OK"


async def test_error_can_be_the_first_event(engine: FakeEngine) -> None:
    await engine.fault("error_first", status=503)
    answer = await captures.exchange(engine.port, chat())
    assert answer.events[0].startswith(b'data: {"error": {"message": "The engine is currently busy')
    assert answer.events[1:] == [b"data: [DONE]\n\n"]


async def test_finish_reason_can_be_missing_before_done(engine: FakeEngine) -> None:
    await engine.fault("no_finish", after=100)
    answer = await captures.exchange(engine.port, chat())
    assert answer.is_whole
    assert answer.events[-1] == b"data: [DONE]\n\n"
    assert b'"finish_reason":"' not in answer.body


@pytest.mark.parametrize(("after", "events"), [(0, 0), (1, 2), (5, 6)])
async def test_stall_leaves_the_connection_open_and_silent(
    engine: FakeEngine, after: int, events: int
) -> None:
    await engine.fault("stall", after=after)
    answer = await captures.exchange(engine.port, chat(), chunks=events)
    assert answer.chunks is not None
    assert len(answer.chunks) == events
    entry = await ended(engine)
    assert (entry["how"], entry["aborted"], entry["tokens_written"]) == ("stall", True, after)


async def test_stall_before_headers_sends_nothing(engine: FakeEngine) -> None:
    await engine.fault("stall", after=-1)
    reader, writer = await asyncio.open_connection("127.0.0.1", engine.port)
    writer.write(chat())
    await engine.until(lambda record: record["running"] == 1)
    writer.close()
    assert await reader.read() == b""


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("after", [-1, 0, 3])
async def test_closed_connection_cuts_the_answer(engine: FakeEngine, after: int, stream: bool) -> None:
    await engine.fault("close", after=after)
    received = await raw(engine, chat(stream=stream))
    assert (received == b"") == (after < 0)
    if received:
        answer = captures.parse(received)
        assert not answer.is_whole
        assert answer.chunks is None or len(answer.chunks) == (after and after + 1)


@pytest.mark.parametrize("after", [-1, 3])
async def test_reset_is_seen_as_a_reset(engine: FakeEngine, after: int) -> None:
    await engine.fault("reset", after=after)
    with pytest.raises(ConnectionResetError):
        await raw(engine, chat())


async def test_death_in_a_stream_takes_the_process_and_restart_keeps_the_port(engine: FakeEngine) -> None:
    port = engine.port
    await engine.fault("die", after=2)
    assert (await raw(engine, chat())).count(b"data: ") == 3
    assert await engine.wait() == 1
    await engine.start()
    assert engine.port == port
    assert (await captures.exchange(engine.port, chat())).is_whole


async def test_garbage_is_no_http(engine: FakeEngine) -> None:
    await engine.fault("garbage")
    assert not (await raw(engine, chat())).startswith(b"HTTP")


async def test_truncated_chunk_is_shorter_than_it_says(engine: FakeEngine) -> None:
    await engine.fault("truncated_chunk", after=2)
    assert b"\r\nfff\r\n" in (await raw(engine, chat()))[-80:]


async def test_endless_event_never_ends_its_line(engine: FakeEngine) -> None:
    await engine.fault("endless_event", after=1)
    received = await raw(engine, chat(), until=b"x" * 15000)
    assert b"\n\n" not in received.rpartition(b"data: ")[2]


@pytest.mark.parametrize("kind", ["drip", "drip_wire"])
async def test_dripped_answer_is_the_same_answer(engine: FakeEngine, kind: str) -> None:
    whole = await captures.exchange(engine.port, chat(max_tokens=3))
    await engine.fault(kind, gap_ms=0.01)
    dripped = await captures.exchange(engine.port, chat(max_tokens=3))
    assert whole.chunks is not None
    assert dripped.chunks is not None
    assert captures.mask(b"".join(dripped.chunks)) == captures.mask(b"".join(whole.chunks))
    assert (kind == "drip") == all(len(chunk) == 1 for chunk in dripped.chunks)


async def test_huge_answer_waits_for_its_reader(engine: FakeEngine) -> None:
    await engine.fault("huge", size_bytes=3_000_000)
    answer = await captures.exchange(engine.port, chat())
    assert answer.is_whole
    assert len(answer.body) > 3_000_000


async def test_slow_reader_holds_the_writer_not_the_producer(engines: Any) -> None:
    engine = await engines("--max-model-len", "400000")
    reader, writer = await asyncio.open_connection("127.0.0.1", engine.port, limit=1024)
    writer.write(chat(max_tokens=200_000, ignore_eos=True))
    await engine.until(lambda record: record["generation_tokens"] == 200_000)
    writer.transport.abort()
    entry = await ended(engine)
    assert entry["completion_tokens"] == 200_000
    assert entry["tokens_written"] < 200_000
    assert reader is not None


@pytest.mark.parametrize("half", [True, False])
async def test_leaving_client_aborts_its_request(engine: FakeEngine, half: bool) -> None:
    await engine.knobs(pace_ms=5)
    _, writer = await asyncio.open_connection("127.0.0.1", engine.port)
    writer.write(chat(max_tokens=2000, ignore_eos=True))
    await engine.until(lambda record: record["generation_tokens"] > 2)
    if half:
        writer.write_eof()
    else:
        writer.close()
    entry = await ended(engine)
    assert (entry["how"], entry["aborted"], entry["finished"]) == ("client_closed", True, False)
    assert 2 < entry["completion_tokens"] < 2000
    assert (await engine.record())["running"] == 0
    writer.close()


async def test_merged_tokens_share_a_chunk_and_usage_still_counts_each(engine: FakeEngine) -> None:
    await engine.knobs(merge=4)
    answer = await captures.exchange(engine.port, chat(max_tokens=10, ignore_eos=True))
    assert len(answer.events) == 1 + 3 + 2
    assert b'"completion_tokens":10' in answer.events[-2]


async def test_merge_does_not_wait_past_the_last_token(engine: FakeEngine) -> None:
    await engine.knobs(merge=4, pace_ms=1)
    answer = await captures.exchange(engine.port, chat(max_tokens=10, ignore_eos=True))
    assert len(answer.events) == 1 + 3 + 2


async def test_keep_alive_comments_precede_the_first_event(engine: FakeEngine) -> None:
    await engine.knobs(paused=True, sse_keep_alive_ms=5)
    reader, writer = await asyncio.open_connection("127.0.0.1", engine.port)
    writer.write(chat())
    head = await reader.readuntil(b": keep-alive\n\n")
    await engine.knobs(paused=False)
    rest = await reader.readuntil(b"0\r\n\r\n")
    writer.close()
    assert b"data: " not in head
    assert b"data: [DONE]" in rest


async def test_slots_are_limited_and_the_queue_keeps_its_order(engine: FakeEngine) -> None:
    await engine.knobs(max_num_seqs=2, paused=True)
    tasks = [asyncio.create_task(captures.exchange(engine.port, chat())) for _ in range(6)]
    await engine.until(lambda record: record["waiting"] == 6)
    await engine.knobs(paused=False)
    assert all(answer.is_whole for answer in await asyncio.gather(*tasks))
    record = await engine.record()
    assert (record["max_running"], record["served"]) == (
        1,
        6,
    )  # without a pace each ends before the next starts


async def test_draining_engine_finishes_what_it_has_and_looks_healthy(engine: FakeEngine) -> None:
    await engine.knobs(pace_ms=5)
    stream = asyncio.create_task(captures.exchange(engine.port, chat(max_tokens=40, ignore_eos=True)))
    await engine.until(lambda record: record["running"] == 1)
    await engine.knobs(draining=True)
    refused = await captures.exchange(engine.port, chat())
    assert refused.status == b"HTTP/1.1 500 Internal Server Error"
    assert b"cannot schedule new futures after shutdown" in refused.body
    assert (await engine.ask("GET", "/health"))[0] == 200
    assert (await stream).is_whole


async def test_mute_engine_accepts_and_never_answers(engine: FakeEngine) -> None:
    await engine.knobs(mute=True)
    reader, writer = await asyncio.open_connection("127.0.0.1", engine.port)
    writer.write(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
    await engine.until(lambda record: record["connections"] >= 2)
    writer.close()
    assert await reader.read() == b""


async def test_idle_connection_is_closed_and_the_default_is_uvicorns(engine: FakeEngine) -> None:
    assert (await engine.knobs())["keep_alive_ms"] == 5000
    await engine.knobs(keep_alive_ms=20)
    received = await raw(engine, b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
    assert received.startswith(b"HTTP/1.1 200 OK")


async def test_pipelined_requests_are_answered_in_order(engine: FakeEngine) -> None:
    await engine.knobs(keep_alive_ms=20)
    version, health = (b"GET /%b HTTP/1.1\r\nHost: a\r\n\r\n" % path for path in (b"version", b"health"))
    received = await raw(engine, version + health + version)
    assert received.count(b"HTTP/1.1 200 OK") == 3
    assert received.endswith(b'{"version":"0.32.0"}')


async def test_cached_prefix_is_reported_and_shortens_nothing_else(engines: Any) -> None:
    engine = await engines("--prompt-tokens-details", "--block-size", "32")
    request = chat(stream=False, messages=[{"role": "user", "content": "word " * 200}])
    cold, warm = [json.loads((await captures.exchange(engine.port, request)).body)["usage"] for _ in range(2)]
    assert cold["prompt_tokens_details"]["cached_tokens"] == 0
    assert warm["prompt_tokens_details"]["cached_tokens"] == 32 * ((warm["prompt_tokens"] - 1) // 32)
    assert warm["prompt_tokens"] == cold["prompt_tokens"]


@pytest.mark.parametrize("split", ["whole", "chunk"])
async def test_replay_answers_with_the_captures_bytes(engine: FakeEngine, split: str) -> None:
    await engine.knobs(replay="burst__burst_stream_05", replay_split=split, replay_times=1)
    answer = await captures.exchange(engine.port, chat())
    assert answer == captures.response("burst__burst_stream_05")
    assert (await captures.exchange(engine.port, chat())).events[0].startswith(b'data: {"id":"chatcmpl-t-1"')


async def test_replay_can_be_bound_to_a_path(engine: FakeEngine) -> None:
    await engine.knobs(replay={"/v1/models": "lora__models"})
    assert len((await engine.ask("GET", "/v1/models"))[1]["data"]) == 2


@pytest.mark.parametrize(("how", "ends"), [("exit", False), ("error", True), ("drain", True)])
async def test_termination_goes_as_the_knob_says(engine: FakeEngine, how: str, ends: bool) -> None:
    await engine.knobs(sigterm=how, pace_ms=5)
    stream = asyncio.create_task(raw(engine, chat(max_tokens=40, ignore_eos=True), until=b"0\r\n\r\n"))
    await engine.until(lambda record: record["generation_tokens"] > 1)
    engine.terminate()
    answer = captures.parse(await stream)
    assert answer.is_whole == ends
    assert (b'"usage"' in answer.body) == (how == "drain")
    assert await engine.wait() == 0


async def test_stalled_termination_waits_for_the_client(engine: FakeEngine) -> None:
    await engine.knobs(sigterm="stall", pace_ms=5)
    reader, writer = await asyncio.open_connection("127.0.0.1", engine.port)
    writer.write(chat(max_tokens=2000, ignore_eos=True))
    await reader.readuntil(b"content")
    engine.terminate()
    while not await _is_refused(engine.port):  # noqa: ASYNC110 - the state is in another process
        await asyncio.sleep(0.01)
    assert engine.is_alive
    writer.close()
    assert await engine.wait() == 0


async def test_engine_ends_with_the_process_that_started_it() -> None:
    read, write = os.pipe()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "bench.fake_engine", "--parent-stdin",
        cwd=ROOT, stdin=read, stdout=subprocess.PIPE,
    )  # fmt: skip
    os.close(read)
    assert process.stdout is not None
    assert json.loads(await process.stdout.readline())["pid"] == process.pid
    os.close(write)
    assert await process.wait() == 0


async def _is_refused(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except ConnectionRefusedError:
        return True
    writer.close()
    return False
