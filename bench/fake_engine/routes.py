"""Which path is what, and which answer it gets; FastAPI's 404 and 405 for the rest.

Inference goes through `inference`, the engine's own knobs and records through `control`.
"""

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from bench.fake_engine import control, inference, management
from bench.fake_engine.wire import Refusal

if TYPE_CHECKING:
    from bench.fake_engine.engine import Engine
    from bench.fake_engine.protocol import Connection, Request

Handler = Callable[["Engine", "Connection", "Request"], None]

_ALWAYS: dict[str, dict[str, Handler]] = {
    "/health": {"GET": management.health},
    "/ping": {"GET": management.empty, "POST": management.empty},
    "/version": {"GET": management.version},
    "/load": {"GET": management.load},
    "/metrics": {"GET": management.metrics},
    "/v1/models": {"GET": management.models},
    "/tokenize": {"POST": management.tokenize},
    "/detokenize": {"POST": management.detokenize},
    "/kv_event_sources": {"GET": management.no_sources},
    "/v1/load_lora_adapter": {"POST": management.load_adapter},
    "/v1/unload_lora_adapter": {"POST": management.unload_adapter},
    "/_fake/knobs": {"GET": control.show_knobs, "POST": control.turn_knobs},
    "/_fake/record": {"GET": control.show_record},
    "/_fake/go": {"POST": control.go_on},
    "/_fake/reset": {"POST": control.reset},
}
_GENERATE: dict[str, dict[str, Handler]] = {
    "/v1/chat/completions": {"POST": inference.chat},
    "/v1/completions": {"POST": inference.completions},
    "/v1/responses": {"POST": inference.responses},
    "/v1/messages": {"POST": inference.messages},
    "/v1/messages/count_tokens": {"POST": inference.count_message_tokens},
    "/v1/chat/completions/render": {"POST": management.render},
}
_POOLING: dict[str, dict[str, Handler]] = {"/v1/embeddings": {"POST": inference.embeddings}}
_DEVELOPMENT: dict[str, dict[str, Handler]] = {
    "/sleep": {"POST": management.sleep},
    "/wake_up": {"POST": management.wake_up},
    "/is_sleeping": {"GET": management.is_sleeping},
    "/pause": {"POST": management.pause},
    "/resume": {"POST": management.resume},
    "/is_paused": {"GET": management.is_paused},
    "/abort_requests": {"POST": management.abort_requests},
    "/reset_prefix_cache": {"POST": management.reset_prefix_cache},
    "/collective_rpc": {"POST": management.collective_rpc},
    "/weight_info": {"GET": management.weight_info},
    "/get_world_size": {"GET": management.world_size},
}


def handle(engine: "Engine", client: "Connection", request: "Request") -> None:
    is_control = request.path.startswith("/_fake/")
    if engine.knobs.mute and not is_control:
        return
    if engine.knobs.replay is not None and not is_control and _replay(engine, client, request):
        return
    try:
        _dispatch(engine, client, request)
    except Refusal as refused:
        client.answer(refused.status, refused.body)
    except Exception:  # noqa: BLE001 - a bug of the stand-in, or a body that nobody foresaw: seen, not fatal
        traceback.print_exc()
        client.answer(500, b"Internal Server Error", content_type=b"text/plain; charset=utf-8")


def _dispatch(engine: "Engine", client: "Connection", request: "Request") -> None:
    methods = _methods(engine, request.path)
    if methods is None:
        client.answer(404, b'{"detail":"Not Found"}')
        return
    handler = methods.get(request.method)
    if handler is None:
        allow = b"allow: %b\r\n" % ", ".join(methods).encode()
        client.answer(405, b'{"detail":"Method Not Allowed"}', first=allow)
        return
    handler(engine, client, request)


def _methods(engine: "Engine", path: str) -> dict[str, Handler] | None:
    config = engine.config
    found = (_POOLING if config.pooling else _GENERATE).get(path) or _ALWAYS.get(path)
    if found is None and config.dev_mode:
        found = _DEVELOPMENT.get(path)
    return found


def _replay(engine: "Engine", client: "Connection", request: "Request") -> bool:
    """Answer with a capture's bytes. One that ends early leaves the client waiting, as the engine did."""
    name = engine.knobs.take_replay(request.method, request.path)
    if name is None:
        return False
    assert engine.config.replay_dir is not None, "start with --replay DIR"
    data = (Path(engine.config.replay_dir) / f"{name}.resp").read_bytes()
    control.replay(engine, client, data, split=engine.knobs.replay_split == "chunk")
    return True
