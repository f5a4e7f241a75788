"""Streams that are cut: a client that reads event by event and leaves when it is told to, and what it was given then.

In lockstep it tells the stand-in to go on at each event, so that nothing is under way when it leaves. What was delivered is
read out of the stand-in's own events, as it wrote them down; the gateway's counting is not asked.
"""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from tests.fakes.engine import FakeEngine

Leaving = Literal["abort", "close", "half"]
"""`abort` throws away what it has not read, `close` says goodbye, `half` that nothing more will be asked: it reads on."""

LEAVINGS: tuple[Leaving, ...] = ("abort", "close", "half")

DONE = b"data: [DONE]"


@dataclass(frozen=True, slots=True)
class Stream:
    """One request for a stream. `leaves_after`: so many events, and no further (None: it reads to the end). `tells`: the
    stand-in in lockstep that waits for it."""

    path: str
    body: dict[str, Any]
    leaves_after: int | None = None
    leaving: Leaving = "abort"
    tells: FakeEngine | None = None


@dataclass(slots=True)
class Seen:
    """What the client got: every event that came whole, but comments and `[DONE]`."""

    request_id: str = ""
    status: int = 0
    events: list[dict[str, Any]] = field(default_factory=list)
    error: dict[str, Any] | None = None
    is_done: bool = False  # the stream's own end came
    has_left: bool = False


@dataclass(frozen=True, slots=True)
class Counted:
    """Tokens, prompt and completion."""

    prompt: int = 0
    completion: int = 0

    def __le__(self, other: "Counted") -> bool:
        return self.prompt <= other.prompt and self.completion <= other.completion


async def read(url: str, key: str, stream: Stream) -> Seen:
    """Ask, and read until the end or until it is time to leave."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        body = json.dumps(stream.body).encode()
        head = (
            f"POST {stream.path} HTTP/1.1\r\nhost: {host}\r\nauthorization: Bearer {key}\r\nconnection: close\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        writer.write(head.encode() + body)
        seen = await _head(reader)
        if seen.status == 200:
            await _events(reader, writer, stream, seen)
        else:
            seen.error = json.loads(await reader.read())["error"]
        return seen
    finally:
        writer.transport.abort()


async def _head(reader: asyncio.StreamReader) -> Seen:
    lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}
    return Seen(request_id=headers["x-request-id"], status=int(lines[0].split()[1]))


async def _events(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, stream: Stream, seen: Seen
) -> None:
    buffered = b""
    while (piece := await _chunk(reader)) is not None:
        *events, buffered = (buffered + piece).split(b"\n\n")
        for event in events:
            if event.startswith(DONE):
                seen.is_done = True
            elif event.startswith(b"data: "):
                await _take(json.loads(event[6:]), writer, stream, seen)
            if seen.has_left and stream.leaving != "half":
                return


async def _take(event: dict[str, Any], writer: asyncio.StreamWriter, stream: Stream, seen: Seen) -> None:
    if "error" in event:
        seen.error = event["error"]
        return
    seen.events.append(event)
    if len(seen.events) == stream.leaves_after:
        seen.has_left = True
        await _leave(writer, stream.leaving)
    elif stream.tells is not None and not seen.has_left:
        await go_on(stream.tells, seen.request_id)


async def _leave(writer: asyncio.StreamWriter, leaving: Leaving) -> None:
    if leaving == "abort":
        writer.transport.abort()
    elif leaving == "close":
        writer.close()
    else:
        writer.write_eof()


async def _chunk(reader: asyncio.StreamReader) -> bytes | None:
    """The next piece of a chunked body; None when there are no more, however it ended."""
    try:
        size = int(await reader.readuntil(b"\r\n"), 16)
        data = await reader.readexactly(size + 2)
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    return data[:-2] if size else None


async def go_on(engine: FakeEngine, request_id: str | None = None, events: int = 1) -> None:
    """The receipt: in lockstep the stand-in may write so many more events of this stream, or of all."""
    asked = {"events": events} | ({"request_id": request_id} if request_id else {})
    status, _ = await engine.ask("POST", "/_fake/go", asked)
    assert status == 200


# --- what was delivered -------------------------------------------------------------------------------------------------


def written(lines: Sequence[str]) -> list[dict[str, Any]]:
    """The events of a stand-in's record (knob `record_events`) that carry a part of an answer."""
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    return [event for event in events if event.get("choices")]


def delivered(path: str, events: Sequence[dict[str, Any]], seen: Seen, n: int) -> Counted:
    """What of the engine's `events` the client has, by their own counts. AssertionError if it got other ones."""
    if path.startswith("/v1/complete/"):
        texts = [event["text"] for event in seen.events if "text" in event]
        shown = [at for at, event in enumerate(events) if _text(event)]
        assert texts == [_text(events[at]) for at in shown[: len(texts)]], (texts, events)
        if not texts:
            return counted(events[:1], n)
        return counted(events[: shown[len(texts) - 1] + 1], n)
    got = [event for event in seen.events if event.get("choices")]
    for mine, theirs in zip(got, events[: len(got)], strict=True):
        assert _bare(mine) == _bare(theirs)
    return counted(events[: len(got)], n)


def counted(events: Sequence[dict[str, Any]], n: int) -> Counted:
    """The tokens that these events carry, by vLLM's running counts: each event has those of its own choice, and of the
    prompt which that answers. `n`: answers to each prompt."""
    choices = {event["choices"][0]["index"]: event["usage"] for event in events}
    by_prompt = {index // n: usage["prompt_tokens"] for index, usage in choices.items()}
    return Counted(sum(by_prompt.values()), sum(usage["completion_tokens"] for usage in choices.values()))


def _text(event: dict[str, Any]) -> str:
    return event["choices"][0]["delta"].get("content") or ""


def _bare(event: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in event.items() if name != "usage"}
