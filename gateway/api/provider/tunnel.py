"""GET /api/providers/tunnel: an agent opens its node's tunnel, a websocket; what is in it is nodes/tunnel's."""

import uuid
from functools import partial

from aiohttp import web

from gateway.api.credentials import authenticate, is_good, presented_key
from gateway.api.routes import Routes
from gateway.api.services import KEYRING, TUNNELS
from gateway.errors import BadRequest
from nodes.protocol import NODE_HEADER, TUNNEL_PATH

routes = Routes(surface="plain", tag="Providers")


@routes.get(
    TUNNEL_PATH, summary="An agent's tunnel", answers={101: None}, errors=(400, 401, 403, 503), auth="node",
    is_documented=False,
)  # fmt: skip
async def tunnel(request: web.Request) -> web.StreamResponse:
    """A websocket that lasts as long as both ends like. Its streams are opened by the gateway."""
    principal = await authenticate(request, "node")
    key = presented_key(request)
    assert key is not None
    try:
        node_id = str(uuid.UUID(request.headers.get(NODE_HEADER, "")))
    except ValueError:
        raise BadRequest(f"{NODE_HEADER} must be the node's id, a UUID.") from None
    if request.headers.get("Upgrade", "").lower() != "websocket":
        raise BadRequest("This path takes a websocket.")
    key_is_good = partial(is_good, request.app[KEYRING], key, "node")
    return await request.app[TUNNELS].serve(request, principal.account_id, node_id, key_is_good)
