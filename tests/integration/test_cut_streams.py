"""Streams that are cut, by whomever: charged is what was delivered. The long form is in `make soak`."""

import asyncio
import json

import pytest

from tests.fakes import captures
from tests.fakes.cutting import counted, go_on, written
from tests.soak import cuts

CHAT = {"messages": [{"role": "user", "content": "Hello"}]}
USAGE = {"include_usage": True, "continuous_usage_stats": True}


@pytest.mark.timeout(180)
async def test_a_cut_stream_costs_exactly_what_was_delivered(settings, pool, tmp_path):
    numbers = await cuts.streams_cut(settings, pool, tmp_path, cuts.SHORT)
    assert numbers["cuts"] >= cuts.SHORT.cuts_min


# --- what the proof stands on: the stand-in ------------------------------------------------------------------------


def asked(path: str = "/v1/chat/completions", name: str = "req_1", **body: object) -> bytes:
    data = json.dumps(
        {"stream": True, "stream_options": USAGE, "max_tokens": 4, "ignore_eos": True} | (body or CHAT)
    ).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nhost: fake\r\nx-request-id: {name}\r\nconnection: close\r\n"
        f"content-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data


async def test_a_stream_in_lockstep_is_the_same_events_one_for_each_receipt(engine):
    request = asked(**CHAT, n=2)
    at_once = await captures.exchange(engine.port, request)
    await engine.knobs(lockstep=2, record_events=True)
    await engine.reset()
    asking = asyncio.create_task(captures.exchange(engine.port, request))
    for events in range(2, 10):  # two roles, then four tokens of each
        record = await engine.until(lambda record: bool(record["requests"]))
        assert len(written(record["requests"][0]["events"])) == events
        await go_on(engine, "req_1")
    await go_on(engine)
    stepped = await asking
    assert stepped.is_whole
    assert list(map(captures.mask, stepped.events)) == list(map(captures.mask, at_once.events))


async def test_a_receipt_is_for_the_stream_that_it_names(engine):
    await engine.knobs(lockstep=1, record_events=True)
    asking = [asyncio.create_task(captures.exchange(engine.port, asked(name=name))) for name in ("a", "b")]
    await engine.until(lambda record: record["running"] == 2)
    await go_on(engine, "a", events=3)
    rows = {row["request_id"]: len(row["events"]) for row in await engine.requests()}
    assert rows == {"a": 4, "b": 1}
    await go_on(engine, events=9)
    assert [answer.is_whole for answer in await asyncio.gather(*asking)] == [True, True]


async def test_each_of_several_prompts_is_counted_with_its_own_answers(engine):
    """As vLLM does it: only the last word of a stream sums them."""
    await engine.knobs(record_events=True)
    request = asked("/v1/completions", prompt=["word " * 20, "word " * 40], n=2)
    await captures.exchange(engine.port, request)
    (entry,) = await engine.requests()
    events = written(entry["events"])
    counts = {event["choices"][0]["index"]: event["usage"]["prompt_tokens"] for event in events}
    assert counts == {0: 25, 1: 25, 2: 50, 3: 50}
    assert counted(events, 2).prompt == entry["prompt_tokens"] == 75
