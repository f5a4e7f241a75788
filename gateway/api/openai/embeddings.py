"""POST /v1/embeddings: for engines that serve a pooling model."""

from aiohttp import web

from billing.holds import text_bytes
from config.defaults import Settings
from gateway.api.inference import infer
from gateway.api.openai.chat import TURN_ERRORS
from gateway.api.openai.decode import decode_embeddings
from gateway.api.openai.schemas_answers import EmbeddingsAnswer
from gateway.api.openai.schemas_requests import EmbeddingsRequest
from gateway.api.routes import Routes
from gateway.turn import Ask

routes = Routes(surface="openai", tag="Inference")


@routes.post(
    "/v1/embeddings",
    summary="Embeddings",
    body=EmbeddingsRequest,
    answers={200: EmbeddingsAnswer},
    errors=TURN_ERRORS,
)
async def embeddings(request: web.Request) -> web.StreamResponse:
    """OpenAI's embeddings; a model that only generates text answers 404."""
    return await infer(request, embeddings_ask)


def embeddings_ask(raw: bytes, _: Settings) -> Ask:
    """What an embeddings request asks. Raises BadRequest."""
    body = decode_embeddings(raw)
    return Ask(
        route="/v1/embeddings",
        engine_path="/v1/embeddings",
        kind="pooling",
        provider_id=body.pop("provider_id", None),
        body=body,
        body_bytes=text_bytes(raw, "NFKC"),
        is_stream=False,
    )
