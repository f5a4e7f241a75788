"""POST /v1/chat/completions and /v1/completions: OpenAI's shapes, streamed or not."""

from aiohttp import web

from gateway.api.inference import infer
from gateway.api.openai.asks import chat_ask, completion_ask
from gateway.api.openai.schemas_answers import CHAT_ANSWERS, COMPLETION_ANSWERS
from gateway.api.openai.schemas_requests import ChatRequest, CompletionRequest
from gateway.api.routes import Routes

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
