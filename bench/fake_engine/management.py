"""The paths around inference: health, models, load, metrics, tokens, adapters and the development routes.

Bodies follow tests/captures/get_*.resp, full__*.resp and lora__*.resp.
"""

from random import getrandbits
from typing import TYPE_CHECKING, Any

import orjson

from bench.fake_engine import checks, prompts
from bench.fake_engine import metrics as prometheus
from bench.fake_engine.answers import split_tokens
from bench.fake_engine.wire import refusal

if TYPE_CHECKING:
    from bench.fake_engine.engine import Engine
    from bench.fake_engine.protocol import Connection, Request


def health(engine: "Engine", client: "Connection", request: "Request") -> None:
    client.answer(engine.knobs.health_status, b"", content_type=None)


def empty(engine: "Engine", client: "Connection", request: "Request") -> None:
    client.answer(200, b"", content_type=None)


def version(engine: "Engine", client: "Connection", request: "Request") -> None:
    client.answer(200, b'{"version":"0.32.0"}')


def load(engine: "Engine", client: "Connection", request: "Request") -> None:
    client.answer(200, b'{"server_load":%d}' % (engine.in_flight if engine.config.load_tracking else 0))


def metrics(engine: "Engine", client: "Connection", request: "Request") -> None:
    text = prometheus.render(engine).encode()
    client.answer(200, text, content_type=b"text/plain; version=1.0.0; charset=utf-8")


def no_sources(engine: "Engine", client: "Connection", request: "Request") -> None:
    client.answer(200, b"{}")


def models(engine: "Engine", client: "Connection", request: "Request") -> None:
    config, now = engine.config, engine.stamp.now()
    base = [_model(name, now, config.root, None, config.max_model_len) for name in config.models]
    extra = [_model(name, now, root, config.models[0], None) for name, root in engine.adapters.items()]
    client.answer(200, orjson.dumps({"object": "list", "data": base + extra}))


def tokenize(engine: "Engine", client: "Connection", request: "Request") -> None:
    body = orjson.loads(request.body or b"{}")
    text = prompts.chat_text(body["messages"]) if "messages" in body else str(body.get("prompt", ""))
    pieces = split_tokens(text)
    count = engine.knobs.prompt_tokens
    if count is None:
        count = prompts.count_tokens(text.encode(), template="messages" in body)
    fields = {
        "count": count,
        "max_model_len": engine.config.max_model_len,
        "tokens": [1000 + index for index in range(count)],
        "token_strs": [pieces[index] if index < len(pieces) else "" for index in range(count)]
        if body.get("return_token_strs")
        else None,
    }
    client.answer(200, orjson.dumps(fields))


def detokenize(engine: "Engine", client: "Connection", request: "Request") -> None:
    body = orjson.loads(request.body or b"{}")
    client.answer(200, orjson.dumps({"prompt": " ".join("word" for _ in body.get("tokens", []))}))


def render(engine: "Engine", client: "Connection", request: "Request") -> None:
    """A chat's prompt as token ids, which routers ask for; off by default, as in vLLM. A token is known by its bytes."""
    if engine.config.scale_out:
        body = checks.read_body(request.header(b"content-type"), request.body, "messages")
        client.answer(
            200, orjson.dumps({"request_id": "render", "token_ids": prompts.token_ids(body["messages"])})
        )
        return
    text = "Scale-out endpoints are disabled. Restart vllm serve with --enable-scale-out to enable them."
    raise refusal(403, text, "PermissionDeniedError")


def load_adapter(engine: "Engine", client: "Connection", request: "Request") -> None:
    """Adapters whose path says "nope" are missing; any other path is one."""
    body = orjson.loads(request.body or b"{}")
    name, path = str(body.get("lora_name")), str(body.get("lora_path"))
    if not engine.config.enable_lora:
        text = (
            "Call to add_lora method failed: Worker failed with error 'LoRA is not enabled. Use "
            "--enable-lora to enable LoRA.', please check the stack trace above for the root cause"
        )
        raise refusal(500, text, "InternalServerError")
    if name in engine.adapters:
        text = (
            f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in place, "
            "set 'load_inplace' to True."
        )
        raise refusal(400, text, "InvalidUserInput")
    if "nope" in path:
        raise refusal(404, f"Loading lora {name} failed: No adapter found for {path}", "NotFoundError")
    engine.adapters[name] = path
    client.answer(200, f"Success: LoRA adapter '{name}' added successfully.".encode(), content_type=None)


def unload_adapter(engine: "Engine", client: "Connection", request: "Request") -> None:
    name = str(orjson.loads(request.body or b"{}").get("lora_name"))
    if engine.adapters.pop(name, None) is None:
        raise refusal(404, f"The lora adapter '{name}' cannot be found.", "NotFoundError")
    client.answer(200, f"Success: LoRA adapter '{name}' removed successfully.".encode(), content_type=None)


def sleep(engine: "Engine", client: "Connection", request: "Request") -> None:
    engine.knobs.sleeping = True
    level = int(request.query.rpartition(b"level=")[2] or 1)
    client.answer(200, b'{"status":"sleeping","level":%d}' % level)


def wake_up(engine: "Engine", client: "Connection", request: "Request") -> None:
    engine.knobs.sleeping = False
    engine.thaw()
    client.answer(200, b'{"status":"awake","tags":null}')


def is_sleeping(engine: "Engine", client: "Connection", request: "Request") -> None:
    client.answer(200, orjson.dumps({"is_sleeping": engine.knobs.sleeping}))


def pause(engine: "Engine", client: "Connection", request: "Request") -> None:
    if b"mode=abort" in request.query:
        engine.abort(None)
    engine.knobs.paused = True
    client.answer(200, b'{"status":"paused"}')


def resume(engine: "Engine", client: "Connection", request: "Request") -> None:
    engine.knobs.paused = False
    engine.thaw()
    client.answer(200, b'{"status":"resumed"}')


def is_paused(engine: "Engine", client: "Connection", request: "Request") -> None:
    client.answer(200, orjson.dumps({"is_paused": engine.knobs.paused}))


def abort_requests(engine: "Engine", client: "Connection", request: "Request") -> None:
    ids = orjson.loads(request.body or b"{}").get("request_ids", [])
    client.answer(200, b'{"status":"aborted","aborted":%d}' % engine.abort(ids))


def reset_prefix_cache(engine: "Engine", client: "Connection", request: "Request") -> None:
    engine.cache.clear()
    client.answer(200, b'{"success":true}')


def collective_rpc(engine: "Engine", client: "Connection", request: "Request") -> None:
    if "method" not in orjson.loads(request.body or b"{}"):
        raise refusal(400, "Missing 'method' in request body", "Bad Request")
    client.answer(200, b'{"results":[null]}')


def weight_info(engine: "Engine", client: "Connection", request: "Request") -> None:
    client.answer(200, b'{"weight_version":"default"}')


def world_size(engine: "Engine", client: "Connection", request: "Request") -> None:
    client.answer(200, b'{"world_size":1}')


def _model(name: str, now: int, root: str, parent: str | None, max_model_len: int | None) -> dict[str, Any]:
    permission = {
        "id": f"modelperm-{getrandbits(64):016x}",
        "object": "model_permission",
        "created": now,
        "allow_create_engine": False,
        "allow_sampling": True,
        "allow_logprobs": True,
        "allow_search_indices": False,
        "allow_view": True,
        "allow_fine_tuning": False,
        "organization": "*",
        "group": None,
        "is_blocking": False,
    }
    return {
        "id": name,
        "object": "model",
        "created": now,
        "owned_by": "vllm",
        "root": root,
        "parent": parent,
        "max_model_len": max_model_len,
        "permission": [permission],
    }
