"""POST /v1/complete and /v1/complete/stream: the marketplace contract's plain prompt in, text out.

The engine always streams, so that a turn which runs into its time limit still answers with the text it has.
"""

from functools import partial
from typing import Any

import orjson
from aiohttp import web

from billing.holds import text_bytes
from config.defaults import Settings
from gateway.api.inference import infer, stream_options
from gateway.api.openai.chat import TURN_ERRORS
from gateway.api.openai.decode import complete_to_chat, decode_complete
from gateway.api.openai.schemas_answers import COMPLETE_STREAM, CompleteAnswer
from gateway.api.openai.schemas_requests import CompleteRequest
from gateway.api.routes import Routes
from gateway.relay.events import usage_dict
from gateway.relay.tap_complete import CompleteTap
from gateway.relay.taps import Tap
from gateway.turn import Ask, Turn

routes = Routes(surface="openai", tag="Inference")


@routes.post(
    "/v1/complete",
    summary="Complete a prompt",
    body=CompleteRequest,
    answers={200: CompleteAnswer},
    errors=TURN_ERRORS,
)
async def complete(request: web.Request) -> web.StreamResponse:
    """The prompt is sent as one user chat message; after 120 s the answer so far comes with finish_reason `timeout`."""
    return await infer(request, complete_ask)


@routes.post(
    "/v1/complete/stream", summary="Complete a prompt, streamed", body=CompleteRequest, answers={200: COMPLETE_STREAM},
    errors=TURN_ERRORS,
)  # fmt: skip
async def complete_stream(request: web.Request) -> web.StreamResponse:
    """Text deltas, a last event with finish_reason, usage and cost_halala, then `[DONE]`."""
    return await infer(request, complete_stream_ask)


def complete_ask(raw: bytes, settings: Settings) -> Ask:
    """What a request to complete a prompt asks. Raises BadRequest."""
    return _ask("/v1/complete", raw, settings, gathers=True)


def complete_stream_ask(raw: bytes, settings: Settings) -> Ask:
    """The same, streamed."""
    return _ask("/v1/complete/stream", raw, settings, gathers=False)


def _ask(route: str, raw: bytes, settings: Settings, *, gathers: bool) -> Ask:
    asked = decode_complete(raw, tokens_max=settings.complete_tokens_max)
    body = complete_to_chat(asked, tokens_default=settings.default_model_tokens)
    body["stream"] = True
    stream_options(body)
    return Ask(
        route=route,
        engine_path="/v1/chat/completions",
        kind="generate",
        provider_id=body.pop("provider_id", None),
        body=body,
        body_bytes=text_bytes(raw),
        is_stream=not gathers,
        limit_field="max_tokens",
        tap=partial(CompleteTap, body["messages"]),
        gathers=gathers,
        render=_answer if gathers else None,
        time_limit_s=settings.complete_timeout_s,
    )


def _answer(turn: Turn, tap: Tap, cost_minor: int) -> bytes:
    assert isinstance(tap, CompleteTap)
    body: dict[str, Any] = {
        "id": turn.request_id,
        "model": turn.model,
        "choices": [{"index": 0, "text": tap.text, "finish_reason": tap.finish_reason}],
        "usage": usage_dict(tap.tokens),
        "cost_halala": cost_minor,
        "latency_ms": turn.duration_ms,
    }
    return orjson.dumps(body)
