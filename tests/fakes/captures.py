"""What a real vLLM sent (tests/captures/NAME.req, NAME.resp), taken apart for comparison.

It parses, masks what differs from run to run, and derives the knobs with which the stand-in engine says the
same thing. What is compared with what is in tests/integration/test_fake_engine_captures.py.
"""

import asyncio
import json
import re
from dataclasses import dataclass
from typing import Any

from tests.fakes.engine import CAPTURES

_MASKS = (
    (
        rb'"(id|item_id)":"(chatcmpl-tool|chatcmpl|cmpl|embd|resp|msg|modelperm)([-_])[0-9a-f]{16}"',
        rb'"\1":"\2\3ID"',
    ),
    (rb'"(created|created_at)":\d+', rb'"\1":0'),
    (rb'"system_fingerprint":"vllm-0.32.0-[0-9a-f]{8}"', b'"system_fingerprint":"PRINT"'),
    (rb'"(\w+_ms|tokens_per_second)":[\d.e+-]+', rb'"\1":0'),
)
_USAGE = (rb'"(total_tokens|completion_tokens)":\d+', rb'"\1":0')


@dataclass(frozen=True)
class Answer:
    """An answer as bytes: status line and headers, HTTP chunks (of a stream) or the body."""

    status: bytes
    headers: list[tuple[bytes, bytes]]
    chunks: list[bytes] | None
    body: bytes
    is_whole: bool

    def header(self, name: bytes) -> bytes | None:
        return dict(self.headers).get(name)

    @property
    def events(self) -> list[bytes]:
        assert self.chunks is not None
        return [chunk for chunk in self.chunks if not chunk.startswith(b":")]


def names() -> set[str]:
    return {path.stem for path in CAPTURES.iterdir() if path.suffix in (".req", ".resp")}


def request(name: str) -> bytes:
    """The request's bytes. Paths inside some bodies were replaced after the capture: the length is made to fit."""
    head, mark, body = (CAPTURES / f"{name}.req").read_bytes().partition(b"\r\n\r\n")
    return re.sub(rb"(?<=Content-Length: )\d+", b"%d" % len(body), head) + mark + body


def response(name: str) -> Answer:
    return parse((CAPTURES / f"{name}.resp").read_bytes())


def parse(raw: bytes) -> Answer:
    """Take an answer apart; `is_whole` tells if nothing is missing at its end."""
    head, _, body = raw.partition(b"\r\n\r\n")
    status, *lines = head.split(b"\r\n")
    headers = [(name, value) for name, _, value in (line.partition(b": ") for line in lines)]
    named = dict(headers)
    if named.get(b"transfer-encoding") != b"chunked":
        return Answer(status, headers, None, body, len(body) == int(named.get(b"content-length", b"-1")))
    chunks: list[bytes] = []
    place = 0
    while (size := re.compile(rb"([0-9a-f]+)\r\n").match(body, place)) is not None:
        length = int(size.group(1), 16)
        data = body[size.end() : size.end() + length]
        if len(data) < length:
            break
        assert body[size.end() + length : size.end() + length + 2] in (b"\r\n", b"\r", b""), (
            "chunk without its end"
        )
        place = size.end() + length + 2
        if length == 0:
            return Answer(status, headers, chunks, body, is_whole=True)
        chunks.append(data)
    return Answer(status, headers, chunks, body, is_whole=False)


async def exchange(port: int, raw: bytes, *, chunks: int | None = None) -> Answer:
    """Send a request and read its answer: to its end, to the connection's end, or to so many chunks."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    received = b""
    try:
        writer.write(raw)
        while data := await reader.read(1 << 16):
            received += data
            if b"\r\n\r\n" not in received:
                continue
            answer = parse(received)
            if answer.is_whole or (chunks is not None and len(answer.chunks or ()) >= chunks):
                break
        return parse(received)
    finally:
        writer.close()
        await writer.wait_closed()


def headers_seen(answer: Answer, *, given_id: bool) -> list[tuple[bytes, bytes]]:
    """Headers in order, without what differs from run to run."""
    masked = {b"date", b"content-length"} | (set() if given_id else {b"x-request-id"})
    return [(name, b"*" if name in masked else value) for name, value in answer.headers]


def mask(data: bytes, *, usage: bool = False) -> bytes:
    for pattern, put in (*_MASKS, *([_USAGE] if usage else [])):
        data = re.sub(pattern, put, data)
    return data


def skeleton(data: bytes) -> Any:
    """Keys in order with nulls, booleans and short words kept; numbers, texts and lists reduced to kinds."""
    lines = data.decode().rstrip("\n").split("\n")
    if len(lines) == 1 and not lines[0].startswith("data: "):
        return _shape(json.loads(lines[0])) if lines[0] else ""
    return [line if not line.startswith("data: {") else _shape(json.loads(line[6:])) for line in lines]


def story(answer: Answer) -> list[Any]:
    """The skeletons of a stream's events in order, each run of equal ones once."""
    told: list[Any] = []
    for event in answer.events:
        shape = skeleton(event)
        if not told or told[-1] != shape:
            told.append(shape)
    return told


def script(name: str) -> dict[str, Any]:
    """Knobs with which the stand-in says what the capture says: tokens, prompt size, tool arguments."""
    answer = response(name)
    if not answer.status.startswith(b"HTTP/1.1 200") or b'"max_model_len"' in answer.body:
        found = re.search(rb'"count":(\d+)', answer.body)
        return {"prompt_tokens": int(found.group(1))} if found else {}
    body = (
        json.loads(request(name).partition(b"\r\n\r\n")[2] or b"{}")
        if (CAPTURES / f"{name}.req").exists()
        else {}
    )
    knobs: dict[str, Any] = {}
    prompt = re.search(rb'"(?:prompt_tokens|input_tokens)":(\d+)', answer.body)
    if prompt:
        knobs["prompt_tokens"] = int(prompt.group(1)) // _prompts(body)
    texts = _streamed(answer) if answer.chunks is not None else _whole(answer, body)
    if texts:
        knobs["answer"] = texts
    arguments = re.findall(rb'"arguments":"((?:\\.|[^"])*)"', answer.body)
    if arguments:
        knobs = {"prompt_tokens": knobs["prompt_tokens"]}
        knobs["tool_arguments"] = [json.loads(b'"%b"' % piece) for piece in arguments]
    for stop in [body["stop"]] if isinstance(body.get("stop"), str) else body.get("stop", []):
        knobs["answer"] = [[*[piece.removesuffix(stop) for piece in pieces], stop] for pieces in texts]
    return knobs


def cached_tokens(name: str) -> int:
    found = re.search(rb'"cached_tokens":(\d+),"created', response(name).body)
    return int(found.group(1)) if found else 0


def _prompts(body: dict[str, Any]) -> int:
    prompt = body.get("prompt")
    return len(prompt) if isinstance(prompt, list) and isinstance(prompt[0], str) else 1


def _streamed(answer: Answer) -> list[list[str]]:
    """The text of each token of each choice, without the empty one that ends a stopped answer."""
    said: dict[int, list[str]] = {}
    for event in answer.events:
        fields = _fields(event)
        if fields.get("type") == "response.output_text.delta":
            said.setdefault(0, []).append(fields["delta"])
        elif fields.get("type") == "content_block_delta":
            said.setdefault(0, []).append(fields["delta"]["text"])
        for choice in fields.get("choices", ()):
            text = choice.get("text", choice.get("delta", {}).get("content"))
            if text and "role" not in choice.get("delta", {}):
                said.setdefault(choice["index"], []).append(text)
    return [said[index] for index in sorted(said)]


def _whole(answer: Answer, body: dict[str, Any]) -> list[list[str]]:
    """The text as one token, then as many without text as the usage counts."""
    fields = json.loads(answer.body) if answer.body.startswith(b"{") else {}
    usage = fields.get("usage") or {}
    count = usage.get("completion_tokens", usage.get("output_tokens"))
    if not count:
        return []
    if "choices" not in fields:
        content = fields["content"] if "content" in fields else fields["output"][0]["content"]
        return [[content[0]["text"], *[""] * (count - 1)]]
    said: list[list[str]] = []
    for choice in fields["choices"]:
        text = choice["text"] if "text" in choice else choice["message"]["content"]
        stopped = 1 + bool(choice["stop_reason"]) * 1 if choice["finish_reason"] == "stop" else 0
        size = count // len(fields["choices"]) - (1 if stopped else 0)
        said.append([text, *[""] * (size - 1)])
    return said


def _fields(event: bytes) -> dict[str, Any]:
    line = event.decode().rstrip("\n").rpartition("data: ")[2]
    return json.loads(line) if line.startswith("{") else {}


def _shape(value: Any) -> Any:
    if isinstance(value, dict):
        by_token = all(isinstance(part, float) or "decoded_token" in str(part) for part in value.values())
        return [("token" if by_token else key, _shape(part)) for key, part in value.items()]
    if isinstance(value, list):
        kinds: list[Any] = []
        for part in value:
            shape = _shape(part)
            if shape not in kinds:
                kinds.append(shape)
        return ["list", *kinds]
    if isinstance(value, bool) or value is None:
        return value
    return "number" if isinstance(value, (int, float)) else "text"
