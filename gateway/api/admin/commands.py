"""What an admin tells a node: pause, drain, resume, and commands to its agent. Doing it is the agent's."""

import json
from typing import Any, Literal
from uuid import UUID

from aiohttp import web
from pydantic import BaseModel, Field

from config.changes import wake_feeds
from config.postgres import AWAY
from gateway.api.credentials import admin_of
from gateway.api.inference import read_body
from gateway.api.routes import Routes
from gateway.api.services import COMMANDS, VALKEY
from gateway.api.system.answers import json_answer
from gateway.errors import BadRequest, Conflict, NotFound, Unavailable
from nodes.commands import TooManyCommands, UnknownNode
from nodes.control_messages import DRAIN, PAUSE, SERVE, Command
from nodes.protocol import BadMessage

routes = Routes(surface="plain", tag="Admin")

PATH = "/api/admin/nodes/{node_id}/commands"
BODY_BYTES_MAX = 16 * 1024
STATES = {"pause": PAUSE, "drain": DRAIN, "resume": SERVE}
"""These set what is wanted of a node, until another one does; all others are done once."""


class CommandBody(BaseModel):
    """A command and its arguments."""

    command: Literal[
        "pause", "drain", "resume", "preload_model", "start_engine", "stop_engine", "restart_engine",
        "sleep_engine", "wake_engine", "load_lora", "unload_lora", "update",
    ]  # fmt: skip
    arguments: dict[str, str] = Field(
        default_factory=dict,
        description="preload_model: model_name; *_engine: engine_id; load_lora, unload_lora: engine_id, adapter",
    )


class CommandTaken(BaseModel):
    """`id` is 0 for pause, drain and resume."""

    success: bool
    id: int


class NodeCommand(BaseModel):
    """A command and how far it is."""

    id: int
    name: str
    arguments: dict[str, str]
    status: Literal["queued", "downloading", "loading", "done", "failed"]
    percent: int
    detail: str
    created_at: str
    updated_at: str


class NodeCommands(BaseModel):
    """The newest first."""

    commands: list[NodeCommand]


@routes.post(
    PATH, summary="Tell a node what to do", body=CommandBody, answers={202: CommandTaken},
    errors=(400, 403, 404, 409, 503), auth="admin",
)  # fmt: skip
async def send_command(request: web.Request) -> web.StreamResponse:
    """Reaches the agent at once over its control websocket, whichever worker that ends in, or with its next heartbeat."""
    await admin_of(request)
    node_id, (name, arguments) = _node_id(request), _read(await read_body(request, BODY_BYTES_MAX))
    commands = request.app[COMMANDS]
    try:
        if name in STATES:
            await commands.want(node_id, STATES[name])
            command_id = 0
        else:
            command_id = await commands.send(node_id, name, arguments)
    except UnknownNode:
        raise NotFound("There is no such node.") from None
    except TooManyCommands:
        raise Conflict("This node has too many commands that it has not done yet.") from None
    except AWAY:
        raise Unavailable(
            "Commands can't be written right now. Try again shortly.", retry_after_s=2
        ) from None
    await wake_feeds(request.app[VALKEY])
    return json_answer({"success": True, "id": command_id}, status=202)


@routes.get(
    PATH, summary="What a node was told to do, and how far it is", answers={200: NodeCommands},
    errors=(400, 403, 503), auth="admin",
)  # fmt: skip
async def list_commands(request: web.Request) -> web.StreamResponse:
    """Those that have ended are shown for a week."""
    await admin_of(request)
    try:
        rows = await request.app[COMMANDS].recent(_node_id(request))
    except AWAY:
        raise Unavailable("Commands can't be read right now. Try again shortly.", retry_after_s=2) from None
    times = ("created_at", "updated_at")
    return json_answer({"commands": [row | {name: row[name].isoformat() for name in times} for row in rows]})


def _read(body: bytes) -> tuple[str, dict[str, str]]:
    """The command and its arguments. Raises BadRequest."""
    try:
        given: Any = json.loads(body)
        name, arguments = given["command"], given.get("arguments", {})
        if name in STATES and not arguments:
            return name, {}
        command = Command.from_json({"name": name, "arguments": arguments})
    except BadMessage as error:
        raise BadRequest(f"{error}.") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise BadRequest("Send JSON: a `command`, and its `arguments`.") from None
    if any("\x00" in value for value in command.arguments.values()):
        raise BadRequest("An argument has a NUL.")
    return command.name, dict(command.arguments)


def _node_id(request: web.Request) -> str:
    try:
        return str(UUID(request.match_info["node_id"]))
    except ValueError:
        raise BadRequest("node_id must be a UUID.") from None
