"""GET /v1/models: what can be asked for, from the price book and the nodes.

Never an engine's own list: it leaks paths.
"""

from typing import Any

from aiohttp import web

from gateway.api.credentials import authenticate, presented_key
from gateway.api.openai.schemas_answers import ModelEntry, ModelList
from gateway.api.routes import Routes
from gateway.api.services import PRICES, REGISTRY
from gateway.api.system.answers import json_answer
from gateway.errors import ModelNotFound

routes = Routes(surface="openai", tag="Models")


@routes.get("/v1/models", summary="List models", answers={200: ModelList}, errors=(401,), auth="optional")
async def list_models(request: web.Request) -> web.StreamResponse:
    """Open without a key; with one, only the models that the key may use (contracts decision 3)."""
    entries = await _entries(request)
    return json_answer({"object": "list", "data": entries, "models": entries})


@routes.get(
    "/v1/models/{model:.+}",
    summary="One model",
    answers={200: ModelEntry},
    errors=(401, 404),
    auth="optional",
)
async def one_model(request: web.Request) -> web.StreamResponse:
    """One entry of the list; a model that the key may not use does not exist for it."""
    wanted = request.match_info["model"]
    for entry in await _entries(request):
        if entry["id"] == wanted:
            return json_answer(entry)
    raise ModelNotFound(param="model")


async def _entries(request: web.Request) -> list[dict[str, Any]]:
    allowed = None
    if presented_key(request) is not None:
        allowed = (await authenticate(request, "inference")).models
    prices, served = request.app[PRICES], request.app[REGISTRY].snapshot.models()
    entries = []
    for name in sorted(served.keys() | set(prices.models())):
        if allowed is not None and name not in allowed:
            continue
        price, model = prices.price(name, 0.0), served.get(name)
        context_length = (
            model.context_length if model is not None and model.context_length else price.context_length
        )
        entries.append(
            {
                "id": name,
                "object": "model",
                "created": int(price.effective_from),
                "owned_by": "poolgate",
                "context_length": context_length,
                "max_tokens": price.max_tokens or context_length,
                "vram_required_gb": price.vram_required_gb,
                "available": model is not None,
            }
        )
    return entries
