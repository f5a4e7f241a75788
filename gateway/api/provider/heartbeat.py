"""POST /api/providers/heartbeat: agents report their node; the reply says how long that lasts."""

import logging
import uuid
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import asyncpg
import orjson
from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field

from config.postgres import AWAY
from gateway.api.credentials import presented_key, principal_of
from gateway.api.inference import read_body
from gateway.api.routes import Routes
from gateway.api.services import ACCOUNTS, COMMANDS, KEYRING, LOAD, NETWORKS, NODES, SETTINGS
from gateway.api.system.answers import json_answer
from gateway.errors import BadRequest, Conflict, Forbidden, Unavailable
from gateway.identity.keyring import Principal
from nodes.commands import Briefing
from nodes.control_messages import Progress
from nodes.heartbeats import EngineUrlRefused, NodeFenced, NodeOfAnother
from nodes.protocol import AGENT_VERSION, BadMessage, Heartbeat, HeartbeatReply
from nodes.versions import is_older

log = logging.getLogger("poolgate.nodes")

routes = Routes(surface="plain", tag="Providers")

HEARTBEAT_BYTES_MAX = 2**20
"""A node with 64 engines of hundreds of adapters each stays below half of this."""

NODE_OF_KEY = uuid.UUID("6f1d1c0e-6f0a-4d0c-9a57-0f3c5a3a7f10")
"""Namespace of node ids for agents that name none: then a provider has one node."""


class HeartbeatBody(BaseModel):
    """The contract's heartbeat; `node_id`, `epoch`, `engines` and `load` are ours (nodes/protocol.py checks them)."""

    model_config = ConfigDict(extra="allow")

    api_key: str = Field(description="The provider's key; or in the header x-provider-key")
    gpu_status: dict[str, Any] | None = None
    uptime: float | None = Field(None, description="Agent's uptime in seconds")
    provider_ip: str | None = None
    provider_hostname: str | None = None
    cached_models: list[str] | None = None
    resource_spec: dict[str, Any] | None = None
    node_id: str | None = Field(None, description="UUID that the agent keeps; without it a key has one node")
    epoch: int | None = None
    instance: str | None = Field(
        None, description="UUID of the agent's process; a new one with epoch 0 takes the node"
    )
    agent_version: str | None = None
    engines: list[dict[str, Any]] | None = None
    load: dict[str, dict[str, Any]] | None = None
    progress: list[dict[str, Any]] | None = Field(
        None, description="Of commands, where no websocket tells it"
    )


class HeartbeatAnswer(BaseModel):
    """The contract's reply, with the lease."""

    success: bool
    message: str
    timestamp: str
    needs_update: bool
    update_available: bool
    latest_version: str
    min_version: str
    approval_status: str
    approved: bool
    preload_model: dict[str, Any] | None
    wanted: str
    commands: list[dict[str, Any]]
    preferences: dict[str, Any]
    node_id: str
    epoch: int
    lease_s: float
    heartbeat_interval_s: float


@routes.post(
    "/api/providers/heartbeat", summary="A node's agent reports", body=HeartbeatBody, answers={200: HeartbeatAnswer},
    errors=(400, 401, 403, 409, 413, 503), auth="node",
)  # fmt: skip
async def heartbeat(request: web.Request) -> web.StreamResponse:
    """Sent every 30 s, and at once when an engine changes state. Its node is made at the first one."""
    beat = _decode(await read_body(request, HEARTBEAT_BYTES_MAX), presented_key(request))
    principal = await principal_of(request.app[KEYRING], beat.api_key, "node")
    try:
        reply = await _record(request, beat, principal)
    except BadMessage as error:
        raise BadRequest(str(error)) from None
    except asyncpg.DataError:
        raise BadRequest(
            "The heartbeat has a text or a number that can't be kept, as one with a NUL."
        ) from None
    except AWAY as error:
        log.debug(  # that PostgreSQL is away is told once, by the change feed
            "a heartbeat can't be taken: %s",
            error or type(error).__name__,
            extra={"action": "heartbeat_lost", "account_id": principal.account_id},
        )
        raise Unavailable(
            "Heartbeats can't be taken right now. Try again shortly.", retry_after_s=2
        ) from None
    return json_answer(reply.to_json())


async def _record(request: web.Request, beat: Heartbeat, principal: Principal) -> HeartbeatReply:
    account = await request.app[ACCOUNTS].show(principal.account_id)
    if account.approval_status != "approved":
        raise Forbidden("Provider not approved yet.")
    if not beat.node_id:
        beat = replace(beat, node_id=str(uuid.uuid5(NODE_OF_KEY, str(principal.account_id))))
    networks = request.app[NETWORKS]
    progress = [Progress.from_json(report) for report in beat.progress]
    try:
        for engine in beat.engines:
            networks.address(engine.url)
        lease = await request.app[NODES].record(principal.account_id, beat, beat.engines)
    except EngineUrlRefused as error:
        raise BadRequest(f"engines[].url: {error}") from None
    except NodeOfAnother:
        raise BadRequest("node_id is in use; remove the agent's file `node_id` to get another one.") from None
    except NodeFenced:
        raise Conflict("Another agent has taken this node since.") from None
    loads = {f"{beat.node_id}/{engine}": load.to_json() for engine, load in beat.load.items()}
    await request.app[LOAD].report(loads)
    await request.app[COMMANDS].progress(beat.node_id, progress)
    briefing = await request.app[COMMANDS].briefing(beat.node_id)
    settings = request.app[SETTINGS]
    return HeartbeatReply(
        timestamp=datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        approval_status=account.approval_status,
        **_versions(beat.agent_version, settings.agent_version_min),
        **_wishes(briefing),
        node_id=beat.node_id,
        epoch=lease.epoch,
        lease_s=settings.heartbeat_grace_s,
        heartbeat_interval_s=settings.heartbeat_interval_s,
    )


def _versions(agent: str, least: str) -> dict[str, Any]:
    """An agent that names no version is another one than ours, which this gateway can't update."""
    return {
        "min_version": least,
        "needs_update": bool(agent) and is_older(agent, least),
        "update_available": bool(agent) and is_older(agent, AGENT_VERSION),
    }


def _wishes(briefing: Briefing | None) -> dict[str, Any]:
    """What is wanted of the node and the commands that it has not done, the first model to load among them once more."""
    if briefing is None:
        return {}
    models = [each.arguments["model_name"] for each in briefing.commands if each.name == "preload_model"]
    return {
        "wanted": briefing.wanted,
        "commands": tuple(command.to_json() for command in briefing.commands),
        "preload_model": {"model_name": models[0], "status": "downloading"} if models else None,
    }


def _decode(body: bytes, header_key: str | None) -> Heartbeat:
    try:
        fields = orjson.loads(body)
        if isinstance(fields, dict) and not fields.get("api_key") and header_key:
            fields["api_key"] = header_key
        return Heartbeat.from_json(fields)
    except orjson.JSONDecodeError:
        raise BadRequest("The body is not JSON.") from None
    except BadMessage as error:
        raise BadRequest(str(error)) from None
