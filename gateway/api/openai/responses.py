"""POST /v1/responses: OpenAI's newer API, stateless: nothing is stored, so nothing can be continued or polled."""

from functools import partial

from aiohttp import web

from billing.holds import text_bytes
from config.defaults import Settings
from gateway.api.inference import infer
from gateway.api.openai.chat import TURN_ERRORS
from gateway.api.openai.decode import decode_responses
from gateway.api.openai.schemas_answers import RESPONSES_ANSWERS
from gateway.api.openai.schemas_responses import ResponsesRequest
from gateway.api.routes import Routes
from gateway.relay.tap_responses import ResponsesTap
from gateway.turn import Ask

routes = Routes(surface="openai", tag="Inference")

PROMPT_FIELDS = ("instructions", "input", "tools")
"""What engines make the prompt of: it is estimated from these if the stream is cut."""


@routes.post(
    "/v1/responses", summary="Responses, streamed or not", body=ResponsesRequest, answers={200: RESPONSES_ANSWERS},
    errors=TURN_ERRORS,
)  # fmt: skip
async def responses(request: web.Request) -> web.StreamResponse:
    """OpenAI's responses without state: `background` and `previous_response_id` are 400."""
    return await infer(request, responses_ask)


def responses_ask(raw: bytes, _: Settings) -> Ask:
    """What a request for a response asks. Raises BadRequest."""
    body = decode_responses(raw)
    is_stream = bool(body.get("stream"))
    return Ask(
        route="/v1/responses",
        engine_path="/v1/responses",
        kind="generate",
        provider_id=body.pop("provider_id", None),
        body=body,
        body_bytes=text_bytes(raw),
        is_stream=is_stream,
        limit_field="max_output_tokens",
        tap=partial(ResponsesTap, [body.get(name) for name in PROMPT_FIELDS]) if is_stream else None,
    )
