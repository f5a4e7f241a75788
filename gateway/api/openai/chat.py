"""POST /v1/chat/completions and /v1/completions: OpenAI's shapes, streamed or not."""

from functools import partial

from aiohttp import web

from billing.holds import COMPLETION_TOKENS_DEFAULT, text_bytes
from config.defaults import Settings
from gateway.api.inference import infer, stream_options
from gateway.api.openai.decode import Body, decode_chat, decode_completion, prompt_count
from gateway.api.openai.schemas_answers import CHAT_ANSWERS, COMPLETION_ANSWERS
from gateway.api.openai.schemas_requests import ChatRequest, CompletionRequest
from gateway.api.routes import Routes
from gateway.relay.tap_openai import OpenAITap
from gateway.turn import Ask

routes = Routes(surface="openai", tag="Inference")

TURN_ERRORS = (400, 402, 404, 409, 413, 429, 502, 503, 504)


@routes.post(
    "/v1/chat/completions",
    summary="Chat, streamed or not",
    body=ChatRequest,
    answers={200: CHAT_ANSWERS},
    errors=TURN_ERRORS,
)
async def chat_completions(request: web.Request) -> web.StreamResponse:
    """OpenAI's chat completions, with `provider_id` to pin a provider and `cost_halala` in the answer."""
    return await infer(request, chat_ask)


@routes.post(
    "/v1/completions", summary="Text completion, streamed or not", body=CompletionRequest,
    answers={200: COMPLETION_ANSWERS}, errors=TURN_ERRORS,
)  # fmt: skip
async def completions(request: web.Request) -> web.StreamResponse:
    """OpenAI's legacy completions: one prompt or several, text or token ids."""
    return await infer(request, completion_ask)


def chat_ask(raw: bytes, _: Settings) -> Ask:
    """What a chat request asks. Raises BadRequest."""
    body = decode_chat(raw)
    return openai_ask("/v1/chat/completions", body, text_bytes(raw), choices=body.get("n", 1))


def completion_ask(raw: bytes, _: Settings) -> Ask:
    """What a completion request asks. Raises BadRequest."""
    body = decode_completion(raw)
    prompts = prompt_count(body)
    body.setdefault("max_tokens", COMPLETION_TOKENS_DEFAULT)
    return openai_ask(
        "/v1/completions", body, text_bytes(raw), choices=body.get("n", 1) * prompts, prompts=prompts
    )


def openai_ask(route: str, body: Body, body_bytes: int, *, choices: int, prompts: int = 1) -> Ask:
    """The Ask of a chat or completion body; its path is the engine's path too."""
    is_stream = bool(body.get("stream"))
    tap = None
    if is_stream:
        wants_usage, wants_every = stream_options(body)
        tap = partial(
            OpenAITap, wants_usage=wants_usage, wants_every=wants_every, choices=choices, prompts=prompts,
            asked=body.get("messages") or body.get("prompt"),
        )  # fmt: skip
    return Ask(
        route=route,
        engine_path=route,
        kind="generate",
        provider_id=body.pop("provider_id", None),
        body=body,
        body_bytes=body_bytes,
        is_stream=is_stream,
        limit_field="max_tokens",
        tap=tap,
    )
