"""POST /api/providers/heartbeat: agents report their node; the reply says how long that lasts."""

import logging
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
from gateway.api.provider.asking import node_of_account
from gateway.api.routes import Routes
from gateway.api.services import (
    KEYRING,
    LISTENER_CHECKS,
    LOAD,
    NETWORKS,
    NODES,
    REQUEST_LIMITS,
    SETTINGS,
)
from gateway.api.system.answers import json_answer
from gateway.errors import BadRequest, Conflict, Forbidden, InvalidApiKey, Unavailable
from gateway.identity.keyring import Principal
from gateway.identity.providers import SCOPE
from nodes.control_messages import Progress
from nodes.networks import EngineUrlRefused
from nodes.protocol import (
    AGENT_VERSION,
    READY,
    BadMessage,
    EngineReport,
    Heartbeat,
    HeartbeatReply,
    ReachReply,
)
from nodes.providers import UnknownProvider
from nodes.reach import DIRECT, ENGINE_ID
from nodes.reaching import NodeReach
from nodes.reports import AddressOfAnother, NodeFenced, NodeLease, NodeOfAnother, NotApproved, TooManyNodes
from nodes.versions import is_older

log = logging.getLogger("poolgate.nodes")

routes = Routes(surface="plain", tag="Providers")

HEARTBEAT_BYTES_MAX = 2**20
"""A node with 64 engines of hundreds of adapters each stays below half of this."""


class HeartbeatBody(BaseModel):
    """The contract's heartbeat; `node_id`, `epoch`, `engines`, `load`, `reach` are ours (nodes/protocol.py checks them)."""

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
    reach: dict[str, str] | None = Field(
        None, description="How its engines are reached: mode, advertise, fingerprint"
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
    state: str
    reach: dict[str, str]


@routes.post(
    "/api/providers/heartbeat", summary="A node's agent reports", body=HeartbeatBody, answers={200: HeartbeatAnswer},
    errors=(400, 401, 403, 409, 413, 429, 503), auth="node",
)  # fmt: skip
async def heartbeat(request: web.Request) -> web.StreamResponse:
    """Sent every 30 s, and at once when an engine changes state. Its node is made at the first one."""
    limits = request.app[REQUEST_LIMITS]
    beat = _decode(await read_body(request, HEARTBEAT_BYTES_MAX), presented_key(request))
    try:
        principal = await principal_of(request.app[KEYRING], beat.api_key, SCOPE)
    except InvalidApiKey:
        await limits.admit_bad_beat(request)
        raise
    if not beat.node_id:
        beat = replace(beat, node_id=node_of_account(principal.account_id))
    await limits.admit_beat(beat.node_id, is_ours=bool(beat.agent_version))
    try:
        reply = await _record(request, beat, principal)
    except BadMessage as error:
        raise BadRequest(str(error)) from None
    except (asyncpg.DataError, orjson.JSONEncodeError):
        raise BadRequest(
            "The heartbeat has a text or a number that can't be kept, as one with a NUL, or a hundred levels."
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
    settings = request.app[SETTINGS]
    progress = [Progress.from_json(report) for report in beat.progress]
    try:
        lease = await request.app[NODES].record(
            principal.account_id, beat, _reachable_engines(request, beat), progress
        )
    except UnknownProvider:
        raise Forbidden("This key's account is no provider.") from None
    except NotApproved:
        raise Forbidden("Provider not approved yet.") from None
    except EngineUrlRefused as error:
        raise BadRequest(f"engines[].url: {error}") from None
    except AddressOfAnother:
        raise BadRequest("engines[].url: this address is another provider's engine.") from None
    except NodeOfAnother:
        raise BadRequest(
            "node_id is not valid for this key; remove the agent's file `node_id` to get another one."
        ) from None
    except NodeFenced:
        raise Conflict("Another agent has taken this node since.") from None
    except TooManyNodes:
        raise BadRequest(
            f"This provider has {settings.provider_nodes_max} nodes, and may have no more."
        ) from None
    request.app[LOAD].report(
        {f"{beat.node_id}/{engine}": load.to_json() for engine, load in beat.load.items()}
    )
    return HeartbeatReply(
        timestamp=datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        **_versions(beat, settings.agent_version_min),
        preload_model=_preload(lease, beat),
        wanted=lease.wanted,
        commands=tuple(command.to_json() for command in lease.commands),
        node_id=beat.node_id,
        epoch=lease.epoch,
        lease_s=settings.heartbeat_grace_s,
        heartbeat_interval_s=settings.heartbeat_interval_s,
        state=lease.state,
        preferences=lease.preferences.to_json(),
        reach=_reach(request, beat, principal, lease.reach),
    )


def _reachable_engines(request: web.Request, beat: Heartbeat) -> list[EngineReport]:
    """Each with its address in one spelling. Behind an agent it is of no concern here, but the engine's name stands in
    headers. Raises EngineUrlRefused and BadRequest."""
    if beat.reach.mode == "direct":
        networks = request.app[NETWORKS]
        return [replace(engine, url=networks.address(engine.url).url) for engine in beat.engines]
    if not all(ENGINE_ID.fullmatch(engine.engine_id) for engine in beat.engines):
        raise BadRequest(f"engines[].engine_id of a node behind its agent must match {ENGINE_ID.pattern}")
    return list(beat.engines)


def _reach(request: web.Request, beat: Heartbeat, principal: Principal, known: NodeReach) -> ReachReply:
    """What the agent is to know of the way to its node, and a check of its listener begun if one is due."""
    if beat.reach.mode == "direct":
        return ReachReply(way=DIRECT)
    checks = request.app[LISTENER_CHECKS]
    checks.consider(beat.node_id, principal.account_id, beat.reach, known)
    token = checks.token(principal.account_id, beat.node_id)
    return ReachReply(way=known.way, problem=known.problem, token=token)


def _versions(beat: Heartbeat, least: str) -> dict[str, Any]:
    """The contract's own daemon tells its version elsewhere; one that tells none is another than ours, which this gateway
    can't update."""
    told = beat.agent_version or beat.gpu_status.get("daemon_version")
    agent = told if isinstance(told, str) else ""
    return {
        "min_version": least,
        "needs_update": bool(agent) and is_older(agent, least),
        "update_available": bool(agent) and is_older(agent, AGENT_VERSION),
    }


def _preload(lease: NodeLease, beat: Heartbeat) -> dict[str, Any] | None:
    """The first model to load that the node does not serve, once more: for agents that know no commands."""
    served = {model.id for engine in beat.engines if engine.state == READY for model in engine.models}
    wished = [each.arguments["model_name"] for each in lease.commands if each.name == "preload_model"]
    model = next((model for model in wished if model not in served), None)
    return None if model is None else {"model_name": model, "status": "downloading"}


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
