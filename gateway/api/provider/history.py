"""Where an owner reads what its agents told: events and what runs, and its GPUs' charts."""

from datetime import datetime
from typing import Annotated, Any, Literal

from aiohttp import web
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from gateway.api.credentials import admin_of, presented_key
from gateway.api.provider.asking import Moment, caller_of, jsonable, stored, whole_number
from gateway.api.provider.rendering import moment
from gateway.api.routes import Query, Routes
from gateway.api.services import EVENTS, PROVIDERS
from gateway.api.system.answers import json_answer
from gateway.errors import BadRequest, Forbidden, InvalidApiKey, NotFound
from nodes.events import SEVERITIES
from nodes.providers import UnknownProvider

routes = Routes(surface="plain", tag="Providers")

SAMPLES_DEFAULT, SAMPLES_MAX = 60, 1440
EVENTS_DEFAULT, EVENTS_MAX = 50, 200


class Sample(BaseModel):
    """One minute of one node's GPUs; null where nothing was told."""

    node_id: str
    at: str
    gpu_util_pct: float | None
    vram_used_mib: int | None
    free_vram_mib: int | None
    temp_c: float | None
    power_w: float | None


class Samples(BaseModel):
    """The oldest first."""

    provider_id: int
    samples: list[Sample]
    total: int


class LoggedEvent(BaseModel):
    """An event; texts are empty where nothing was told."""

    id: int
    node_id: str | None
    event_type: str
    severity: str
    daemon_version: str
    hostname: str
    os_info: str
    python_version: str
    details: str
    job_id: str
    timestamp: str | None
    received_at: str


class Runtime(BaseModel):
    """What runs on one node."""

    node_id: str
    hostname: str
    status: str
    daemon_version: str
    last_heartbeat: str | None
    readiness: dict[str, Any] | None


class Logs(BaseModel):
    """The newest events first, and what runs."""

    provider_id: int
    events: list[LoggedEvent]
    total: int
    runtime: list[Runtime]


@routes.get(
    "/api/providers/daemon-logs", summary="Provider daemon events and runtime info", auth="provider",
    answers={200: Logs}, errors=(400, 503),
    query=[
        Query("limit", Annotated[int, Field(ge=1, le=EVENTS_MAX)], f"Events; {EVENTS_DEFAULT} without it"),
        Query("severity", Literal["info", "warning", "error", "critical"]),
    ],
)  # fmt: skip
@stored
async def daemon_logs(request: web.Request) -> web.StreamResponse:
    """What its agents told and what was told about its nodes, the newest first."""
    limit = whole_number(request, "limit", EVENTS_DEFAULT, EVENTS_MAX)
    severity = request.query.get("severity")
    if severity is not None and severity not in SEVERITIES:
        raise BadRequest(f"'severity' must be one of {', '.join(SEVERITIES)}.", param="severity")
    account_id = (await caller_of(request)).account_id
    events = [_event(row) for row in await request.app[EVENTS].newest(account_id, limit, severity)]
    runtime = [_runtime(row) for row in await request.app[EVENTS].runtime(account_id)]
    return json_answer(
        {"provider_id": account_id, "events": events, "total": len(events), "runtime": runtime}
    )


@routes.get(
    "/api/providers/{id}/gpu-metrics", summary="GPU metrics history for charts", auth="provider",
    answers={200: Samples}, errors=(400, 403, 404, 503),
    query=[
        Query("limit", Annotated[int, Field(ge=1, le=SAMPLES_MAX)], f"Samples; {SAMPLES_DEFAULT} without it"),
        Query("since", datetime, "Only from then on"),
    ],
)  # fmt: skip
@stored
async def gpu_metrics(request: web.Request) -> web.StreamResponse:
    """A sample a minute and node, for a day: of one's own (`me`, or one's id); of any provider for an admin."""
    limit = whole_number(request, "limit", SAMPLES_DEFAULT, SAMPLES_MAX)
    since = _since(request.query.get("since"))
    account_id = await _whose(request)
    samples = [_sample(row) for row in await request.app[EVENTS].samples(account_id, limit, since)]
    return json_answer({"provider_id": account_id, "samples": samples, "total": len(samples)})


async def _whose(request: web.Request) -> int:
    """The provider of the path; another one's does not exist for a provider. Raises NotFound and what keys raise."""
    asked = request.match_info["id"]
    if await _is_admin(request):
        if not asked.isascii() or not asked.isdigit() or len(asked) > 18:
            raise NotFound("Provider not found.")
        try:
            return (await request.app[PROVIDERS].show(int(asked))).id
        except UnknownProvider:
            raise NotFound("Provider not found.") from None
    account_id = (await caller_of(request)).account_id
    if asked not in ("me", str(account_id)):
        raise NotFound("Provider not found.")
    return account_id


async def _is_admin(request: web.Request) -> bool:
    if "x-admin-token" in request.headers:
        await admin_of(request)
        return True
    if presented_key(request) is None:
        return False
    try:
        await admin_of(request)
    except (InvalidApiKey, Forbidden):
        return False
    return True


def _since(text: str | None) -> datetime | None:
    if text is None:
        return None
    try:
        return _MOMENT.validate_python(text)
    except ValidationError:
        raise BadRequest("'since' must be a time such as 2026-01-31T12:00:00Z.", param="since") from None


_MOMENT: TypeAdapter[datetime] = TypeAdapter(Moment)


def _sample(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "node_id": row["node_id"],
        "at": moment(row["minute"]),
        "gpu_util_pct": row["util_pct"],
        "vram_used_mib": row["vram_used_mib"],
        "free_vram_mib": row["vram_free_mib"],
        "temp_c": row["temp_c"],
        "power_w": row["power_w"],
    }


def _event(row: dict[str, Any]) -> dict[str, Any]:
    times = {"timestamp": moment(row.pop("happened_at")), "received_at": moment(row.pop("at"))}
    return row | times


def _runtime(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "node_id": row["node_id"],
        "hostname": row["hostname"],
        "status": "paused" if row["state"] == "draining" else row["state"],
        "daemon_version": row["agent_version"],
        "last_heartbeat": moment(row["last_heartbeat_at"]),
        "readiness": jsonable(row["readiness"]),
    }
