"""The stand-in's own paths: knobs, record, reset; and replaying a captured answer."""

import re
from dataclasses import asdict
from typing import TYPE_CHECKING

import orjson

from bench.fake_engine.wire import END

if TYPE_CHECKING:
    from bench.fake_engine.engine import Engine
    from bench.fake_engine.protocol import Connection, Request

SPLIT_GAP_S = 0.002


def show_knobs(engine: "Engine", client: "Connection", request: "Request") -> None:
    client.answer(200, orjson.dumps(asdict(engine.knobs)))


def turn_knobs(engine: "Engine", client: "Connection", request: "Request") -> None:
    try:
        engine.knobs.turn(orjson.loads(request.body))
    except (ValueError, TypeError) as error:
        client.answer(400, orjson.dumps({"error": str(error)}))
        return
    engine.record.keeps_bodies = engine.config.record_bodies or engine.knobs.record_bodies
    engine.thaw()
    show_knobs(engine, client, request)


def show_record(engine: "Engine", client: "Connection", request: "Request") -> None:
    counts = {
        "running": len(engine.running),
        "waiting": len(engine.waiting),
        "max_running": engine.max_running,
        "served": engine.served,
        "rejected": engine.rejected,
        "connections": engine.connections,
        "prompt_tokens": engine.prompt_tokens,
        "generation_tokens": engine.generation_tokens,
        "cache_queries": engine.cache.queries,
        "cache_hits": engine.cache.hits,
        "cached_blocks": len(engine.cache),
    }
    client.answer(200, orjson.dumps({**counts, "requests": engine.record.rows()}))


def go_on(engine: "Engine", client: "Connection", request: "Request") -> None:
    """In lockstep: `events` (1) more of the stream of `request_id`, or of every one. Answers how many were told."""
    asked = orjson.loads(request.body or b"{}")
    name, events = asked.get("request_id"), int(asked.get("events", 1))
    told = [
        turn
        for turn in [*engine.running, *engine.waiting]
        if turn.is_in_lockstep
        and (name is None or (turn.entry is not None and turn.entry.request_id == name))
    ]
    for turn in told:
        turn.go_on(events)
    client.answer(200, orjson.dumps({"told": len(told)}))


def reset(engine: "Engine", client: "Connection", request: "Request") -> None:
    engine.reset()
    client.answer(200, b'{"success":true}')


def replay(engine: "Engine", client: "Connection", data: bytes, *, split: bool) -> None:
    """Write a captured answer, whole or one HTTP chunk at a time."""
    head, _, body = data.partition(b"\r\n\r\n")
    is_chunked = b"transfer-encoding: chunked" in head.lower()
    is_whole = not is_chunked or body.endswith(END)
    parts = [data] if not (split and is_chunked) else [head + b"\r\n\r\n", *_chunks(body)]
    _write_next(engine, client, parts, 0, is_whole=is_whole)


def _write_next(
    engine: "Engine", client: "Connection", parts: list[bytes], index: int, *, is_whole: bool
) -> None:
    client.write(parts[index])
    if index + 1 < len(parts):
        engine.wheel.at(
            engine.loop.time() + SPLIT_GAP_S,
            lambda _: _write_next(engine, client, parts, index + 1, is_whole=is_whole),
        )
    elif is_whole:
        client.done()


def _chunks(body: bytes) -> list[bytes]:
    parts: list[bytes] = []
    place = 0
    while place < len(body):
        size = re.compile(rb"([0-9a-fA-F]+)\r\n").match(body, place)
        end = len(body) if size is None else size.end() + int(size.group(1), 16) + 2
        parts.append(body[place:end])
        place = end
    return parts
