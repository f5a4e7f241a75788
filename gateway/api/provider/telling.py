"""What agents tell beside heartbeats: whether their host is ready, and events. Where it is read is `history`."""

import uuid
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from aiohttp import web
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from typing_extensions import TypedDict

from gateway.api.provider.asking import (
    KeyBody,
    Moment,
    Named,
    Text,
    body_of,
    caller_of,
    node_of_account,
    storable,
    stored,
)
from gateway.api.provider.rendering import moment
from gateway.api.routes import Routes
from gateway.api.services import EVENTS, NODES, PROVIDERS
from gateway.api.system.answers import json_answer
from gateway.errors import BadRequest
from nodes.events import Event
from nodes.reports import NodeOfAnother, TooManyNodes

routes = Routes(surface="plain", tag="Providers")

DETAILS_MAX = 5000

NEEDED = ("cuda", "pytorch")
"""Checks of which one that failed makes the host not ready (contract); one that was not made says nothing."""


class Checks(TypedDict, total=False):
    """What the agent found on its host; others than these are kept as they are."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]

    cuda: bool | None
    pytorch: bool | None
    vram_gb: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None
    driver: Text | None


class ReadinessBody(KeyBody):
    """Told once when an agent starts."""

    daemon_version: Text | None = None
    checks: Annotated[Checks, AfterValidator(storable)] | None = None
    node_id: uuid.UUID | None = Field(None, description="As in heartbeats; without it a key has one node")
    provider_hostname: Text | None = None


class Readiness(BaseModel):
    """What follows from the checks."""

    success: bool
    readiness_status: Literal["ready", "failed"]
    checks: dict[str, Any]


class EventBody(KeyBody):
    """Something that happened on a host."""

    event_type: Named
    severity: Literal["info", "warning", "error", "critical"] | None = "info"
    daemon_version: Text | None = None
    timestamp: Moment | None = None
    hostname: Text | None = None
    os_info: Text | None = None
    python_version: Text | None = None
    details: str | None = Field(None, max_length=DETAILS_MAX)
    job_id: Text | None = None
    node_id: uuid.UUID | None = None


class Logged(BaseModel):
    """It is kept."""

    success: bool
    event_type: str
    provider_id: int


@routes.post(
    "/api/providers/readiness", summary="Daemon reports system readiness check", auth="provider",
    body=ReadinessBody, answers={200: Readiness}, errors=(400, 413, 503),
)  # fmt: skip
@stored
async def readiness(request: web.Request) -> web.StreamResponse:
    """Its node is made if it is new, as `connected`: it takes turns from its first heartbeat on."""
    told = await body_of(request, ReadinessBody)
    principal = await caller_of(request, told)
    await request.app[PROVIDERS].standing(principal.account_id)  # only a provider has nodes
    checks: dict[str, Any] = {**(told.checks or {})}
    status = "failed" if any(checks.get(name) is False for name in NEEDED) else "ready"
    kept = {
        "status": status,
        "checks": checks,
        "daemon_version": told.daemon_version or "",
        "at": moment(datetime.now(UTC)),
    }
    node_id = str(told.node_id or node_of_account(principal.account_id))
    try:
        await request.app[NODES].connect(principal.account_id, node_id, kept, told.provider_hostname or "")
    except (NodeOfAnother, TooManyNodes):
        raise BadRequest("node_id is not valid for this key.", param="node_id") from None
    return json_answer({"success": True, "readiness_status": status, "checks": checks})


@routes.post(
    "/api/providers/daemon-event", summary="Log daemon events (crashes, errors, job lifecycle)", auth="provider",
    body=EventBody, answers={200: Logged}, errors=(400, 413, 503),
)  # fmt: skip
@stored
async def daemon_event(request: web.Request) -> web.StreamResponse:
    """Kept for its owner to read: the newest of 30 days."""
    told = await body_of(request, EventBody)
    principal = await caller_of(request, told)
    event = Event(
        event_type=told.event_type, severity=told.severity or "info", daemon_version=told.daemon_version or "",
        hostname=told.hostname or "", os_info=told.os_info or "", python_version=told.python_version or "",
        details=told.details or "", job_id=told.job_id or "", happened_at=told.timestamp,
    )  # fmt: skip
    await request.app[EVENTS].add(principal.account_id, event, str(told.node_id) if told.node_id else None)
    return json_answer({"success": True, "event_type": told.event_type, "provider_id": principal.account_id})
