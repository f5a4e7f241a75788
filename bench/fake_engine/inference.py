"""From a request's bytes to a turn: decode, refuse as vLLM refuses, count the prompt, compose the answer."""

import base64
import struct
from random import Random, getrandbits
from typing import TYPE_CHECKING, Any

import orjson

from bench.fake_engine import answers, checks, prompts
from bench.fake_engine.chat import Chat
from bench.fake_engine.completion import Completion
from bench.fake_engine.knobs import Fault
from bench.fake_engine.messages import Messages
from bench.fake_engine.record import Entry
from bench.fake_engine.responses import Responses
from bench.fake_engine.surface import Ask, Surface
from bench.fake_engine.turns import Turn
from bench.fake_engine.wire import DONE, END, Refusal, chunk, error_event

if TYPE_CHECKING:
    from bench.fake_engine.engine import Engine
    from bench.fake_engine.protocol import Connection, Request


def chat(engine: "Engine", client: "Connection", request: "Request") -> None:
    _generate(engine, client, request, "messages", "chatcmpl-", Chat)


def completions(engine: "Engine", client: "Connection", request: "Request") -> None:
    _generate(engine, client, request, "prompt", "cmpl-", Completion)


def responses(engine: "Engine", client: "Connection", request: "Request") -> None:
    _generate(engine, client, request, "input", "resp_", Responses)


def messages(engine: "Engine", client: "Connection", request: "Request") -> None:
    _generate(engine, client, request, "messages", "chatcmpl-", Messages)


def count_message_tokens(engine: "Engine", client: "Connection", request: "Request") -> None:
    body = checks.read_body(request.header(b"content-type"), request.body, "messages")
    count = _count(engine, prompts.chat_text(body["messages"]).encode(), template=True)
    fields = {"input_tokens": count, "context_management": {"original_input_tokens": count}}
    client.answer(200, orjson.dumps(fields))


def embeddings(engine: "Engine", client: "Connection", request: "Request") -> None:
    entry = engine.record.open(request.path, request.headers, request.body)
    body = checks.read_body(request.header(b"content-type"), request.body, "input")
    model = checks.check_model(body, engine.models, engine.config.models[0])
    given = body["input"]
    inputs = given if isinstance(given, list) and given and not isinstance(given[0], int) else [given]
    count = sum(len(item) if isinstance(item, list) else max(1, len(item.encode()) // 4) for item in inputs)
    data = [
        {
            "index": index,
            "object": "embedding",
            "embedding": _vector(engine, item, body.get("encoding_format")),
        }
        for index, item in enumerate(inputs)
    ]
    usage = {
        "prompt_tokens": count,
        "total_tokens": count,
        "completion_tokens": 0,
        "prompt_tokens_details": None,
        "completion_tokens_details": None,
    }
    created = engine.stamp.now()
    fields = {
        "id": f"embd-{_identity(request)}",
        "object": "list",
        "created": created,
        "model": model,
        "data": data,
        "usage": usage,
    }
    if entry is not None:
        entry.model, entry.prompt_tokens, entry.finished, entry.how = model, count, True, "finished"
        engine.record.note(entry)
    client.answer(200, orjson.dumps(fields))


def _generate(
    engine: "Engine",
    client: "Connection",
    request: "Request",
    required: str,
    prefix: str,
    surface: type[Chat | Completion | Responses | Messages],
) -> None:
    entry = engine.record.open(request.path, request.headers, request.body)
    try:
        ask = _understand(engine, request, required, prefix)
        fault = engine.knobs.take_fault(request.path, ask.model, ask.stream, request.body)
        if engine.knobs.burst and ask.stream and engine.is_full:
            _refuse_in_stream(engine, client, entry)
            return
        if fault is None:
            engine.check_open()
    except Refusal as refused:
        if entry is not None:
            entry.how, entry.status = "refused", refused.status
            engine.record.note(entry)
        raise
    if entry is not None:
        _note(entry, ask, fault)
        engine.record.note(entry)
    if fault is not None:
        _prepare(client, ask, fault)
    writer: Surface = surface(ask)
    turn = Turn(engine, client, ask, writer, fault, entry)
    client.turn = turn
    turn.accept()


def _understand(engine: "Engine", request: "Request", required: str, prefix: str) -> Ask:
    """Everything that can be refused is refused here; what is left is what will be said."""
    config, knobs = engine.config, engine.knobs
    body = checks.read_body(request.header(b"content-type"), request.body, required)
    checks.check_options(body)
    model = checks.check_model(body, engine.models, config.models[0])
    is_chat = required != "prompt"
    if required == "messages":
        checks.check_chat(body, model, auto_tools=config.auto_tool_choice)
    checks.check_schema((body.get("response_format") or {}).get("json_schema", {}).get("schema"))
    given = _prompts(body, required)
    data = [_data(prompt) for prompt in given]
    counts = [_count(engine, piece, template=is_chat) for piece in data]
    if not is_chat:
        counts = [len(p) if isinstance(p, list) else n for p, n in zip(given, counts, strict=True)]
    checks.check_prompt(max(counts), config.max_model_len)
    checks.check_sampling(body, config.max_model_len)
    choices = int(body.get("n") or 1)
    said = [
        answers.compose(body, knobs, config.max_model_len - count, index * choices + copy)
        for index, count in enumerate(counts)
        for copy in range(choices)
    ]
    salt = f"{model}\0{body.get('cache_salt') or ''}"
    found = [engine.cache.admit(d, n, salt, template=is_chat) for d, n in zip(data, counts, strict=True)]
    engine.prompt_tokens += sum(counts)
    return Ask(
        path=request.path,
        body=body,
        model=model,
        request_id=prefix + (f"{getrandbits(64):016x}" if prefix == "resp_" else _identity(request)),
        stream=bool(body.get("stream")),
        answers=said,
        prompt_tokens=sum(counts),
        cached_tokens=sum(hit for hit, _ in found),
        created_tokens=sum(new for _, new in found),
        created=engine.stamp.now(),
        fingerprint=engine.fingerprint,
        details=config.prompt_tokens_details,
        metrics=config.per_request_metrics,
        stamped=knobs.stamped,
        prompts=[prompt if isinstance(prompt, str) else "" for prompt in given],
        prompt_counts=counts,
    )


def _prompts(body: dict[str, Any], required: str) -> list[Any]:
    """One prompt a conversation; /v1/completions takes several, as text or as token ids."""
    if required == "messages":
        system = body.get("system")
        known = [{"content": system}, *body["messages"]] if system else body["messages"]
        return [prompts.chat_text(known)]
    given = body[required]
    if required == "input":
        return [given if isinstance(given, str) else prompts.chat_text(given)]
    if isinstance(given, list) and given and not isinstance(given[0], int):
        return given
    return [given]


def _data(prompt: Any) -> bytes:
    if isinstance(prompt, str):
        return prompt.encode("utf-8", "surrogatepass")
    return b"".join([struct.pack("<I", token & 0xFFFFFFFF) for token in prompt])


def _count(engine: "Engine", data: bytes, *, template: bool) -> int:
    if engine.knobs.prompt_tokens is not None:
        return engine.knobs.prompt_tokens
    return prompts.count_tokens(data, template=template)


def _identity(request: "Request") -> str:
    return request.header(b"x-request-id") or f"{getrandbits(64):016x}"


def _note(entry: Entry, ask: Ask, fault: Fault | None) -> None:
    entry.model = ask.model
    entry.stream = ask.stream
    entry.prompt_tokens = ask.prompt_tokens
    entry.cached_tokens = ask.cached_tokens
    is_error = fault is not None and fault.kind == "http_error"
    entry.status = fault.status if fault is not None and is_error else 200


def _prepare(client: "Connection", ask: Ask, fault: Fault) -> None:
    if fault.kind == "drip_wire":
        client.drip_gap_s = fault.gap_ms / 1000
    elif fault.kind == "huge":
        text = b"x" * max(fault.size_bytes, 1)
        last = ask.answers[0]
        ask.answers = [answers.Answer((text, b""), text, "stop", last.stop_reason)]


def _refuse_in_stream(engine: "Engine", client: "Connection", entry: Entry | None) -> None:
    """What a simultaneous burst got: the status was sent before the queue was known to be full."""
    engine.rejected += 1
    if entry is not None:
        entry.how, entry.status = "refused", 200
        engine.record.note(entry)
    client.write(engine.stamp.stream_head(client.last_headers) + chunk(error_event(503)) + chunk(DONE) + END)
    client.done()


def _vector(engine: "Engine", item: Any, encoding: str | None) -> list[float] | str:
    """A unit-like vector that depends on the input only."""
    source = Random(repr(item))
    values = [source.uniform(-0.05, 0.05) for _ in range(engine.config.embedding_size)]
    if encoding == "base64":
        return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()
    return values
