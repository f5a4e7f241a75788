"""GET /api/providers/control: the agents' websocket. What goes through it is `nodes/control_messages.py`'s."""

from functools import partial
from uuid import UUID

from aiohttp import web

from config.postgres import AWAY
from gateway.api.credentials import authenticate, is_good, presented_key
from gateway.api.routes import Routes
from gateway.api.services import COMMANDS, CONTROL, KEYRING
from gateway.control import Session
from gateway.errors import BadRequest, Conflict, Forbidden, NotFound, Unavailable
from nodes.control_messages import CONTROL_PATH, INSTANCE_HEADER, MESSAGE_BYTES_MAX, NODE_HEADER

routes = Routes(surface="plain", tag="Providers")

PING_S = 15.0
"""A connection whose other end vanished is noticed after half as much again."""


@routes.get(
    CONTROL_PATH, summary="The agent's control websocket", answers={101: None},
    errors=(400, 401, 403, 404, 409, 503), auth="node",
)  # fmt: skip
async def control(request: web.Request) -> web.StreamResponse:
    """A websocket for one node: load goes up each second, commands come down.

    The headers `x-poolgate-node` and `x-poolgate-instance` name the node, which a heartbeat has made, and the agent's
    process.
    """
    node_id, instance = _uuid(request, NODE_HEADER), _uuid(request, INSTANCE_HEADER)
    principal = await authenticate(request, "node")
    key = presented_key(request)
    assert key is not None
    try:
        briefing = await request.app[COMMANDS].briefing(node_id)
    except AWAY:
        raise Unavailable("Nodes can't be read right now. Try again shortly.", retry_after_s=2) from None
    if briefing is None or briefing.account_id != principal.account_id:
        raise NotFound("There is no such node: a heartbeat makes it.")
    if not briefing.is_approved:
        raise Forbidden("Provider not approved yet.")
    if briefing.instance not in ("", instance):
        raise Conflict("Another agent has taken this node.")
    socket = web.WebSocketResponse(heartbeat=PING_S, max_msg_size=MESSAGE_BYTES_MAX, compress=False)
    if not socket.can_prepare(request):
        raise BadRequest("This path is a websocket: connect with an Upgrade.")
    await socket.prepare(request)
    key_is_good = partial(is_good, request.app[KEYRING], key, "node")
    await request.app[CONTROL].serve(Session(socket, node_id, instance, principal.account_id, key_is_good))
    return socket


def _uuid(request: web.Request, header: str) -> str:
    try:
        return str(UUID(request.headers.get(header, "")))
    except ValueError:
        raise BadRequest(f"The header {header} must be a UUID.") from None
