"""What a provider wants of its nodes: pause, resume, preferences, and what it says of its GPUs."""

from typing import Annotated, Any, Literal

from aiohttp import web
from pydantic import BaseModel, Field, StringConstraints

from gateway.api.provider.asking import KeyBody, Text, body_of, caller_of, stored
from gateway.api.routes import Routes
from gateway.api.services import PROVIDERS, SETTINGS
from gateway.api.system.answers import json_answer
from nodes.providers import GPU_PROFILE, PREFERENCES
from nodes.telemetry import MIB_PER_GIB

routes = Routes(surface="plain", tag="Providers")

HourMinute = Annotated[str, StringConstraints(pattern=r"^([01][0-9]|2[0-3]):[0-5][0-9]$")]

VRAM_GB_MAX = 16384
GPUS_MAX = 1024


class Preferring(KeyBody):
    """What is named is changed, the rest stays."""

    run_mode: Literal["always-on", "manual", "scheduled"] | None = None
    scheduled_start: HourMinute | None = Field(None, description="HH:MM by the account's time zone")
    scheduled_end: HourMinute | None = None
    gpu_usage_cap_pct: int | None = Field(None, ge=0, le=100)
    vram_reserve_gb: float | None = Field(None, ge=0, le=16, allow_inf_nan=False)
    temp_limit_c: int | None = Field(None, ge=50, le=100)


class GpuProfile(KeyBody):
    """What is named is changed. What a node reports of its GPUs stands before it."""

    gpu_model: Text | None = None
    vram_gb: float | None = Field(None, ge=0, le=VRAM_GB_MAX, allow_inf_nan=False, description="Of one GPU")
    gpu_count: int | None = Field(None, ge=0, le=GPUS_MAX)
    compute_capability: Text | None = None
    cuda_version: Text | None = None
    driver_version: Text | None = None
    location: Text | None = None


class Paused(BaseModel):
    """No new turns from now on; begun ones end."""

    success: bool
    status: Literal["paused"]


class Resumed(BaseModel):
    """`connected` while no node is online."""

    success: bool
    status: Literal["online", "connected"]


class Preferred(BaseModel):
    """All preferences as they are now; agents hear of them in their next heartbeat's reply."""

    success: bool
    preferences: dict[str, Any]


class Described(BaseModel):
    """What was changed."""

    success: bool
    provider_id: int
    updated_fields: list[str]


@routes.post(
    "/api/providers/pause", summary="Pause provider (stop accepting new jobs)", auth="provider", body=KeyBody,
    answers={200: Paused}, errors=(400, 413, 503),
)  # fmt: skip
@stored
async def pause(request: web.Request) -> web.StreamResponse:
    """All its nodes leave routing within a second; what they have begun they finish."""
    principal = await caller_of(request, await body_of(request, KeyBody))
    await request.app[PROVIDERS].pause(principal.account_id)
    return json_answer({"success": True, "status": "paused"})


@routes.post(
    "/api/providers/resume", summary="Resume provider (accept jobs again)", auth="provider", body=KeyBody,
    answers={200: Resumed}, errors=(400, 413, 503),
)  # fmt: skip
@stored
async def resume(request: web.Request) -> web.StreamResponse:
    """Its nodes are routed to again; those that were not heard of meanwhile, when they are."""
    principal = await caller_of(request, await body_of(request, KeyBody))
    grace_s = request.app[SETTINGS].heartbeat_grace_s
    status = await request.app[PROVIDERS].resume(principal.account_id, grace_s)
    return json_answer({"success": True, "status": status})


@routes.post(
    "/api/providers/preferences", summary="Update provider preferences", auth="provider", body=Preferring,
    answers={200: Preferred}, errors=(400, 413, 503),
)  # fmt: skip
@stored
async def preferences(request: web.Request) -> web.StreamResponse:
    """Stored, and told to each agent in its next heartbeat's reply."""
    asked = await body_of(request, Preferring)
    principal = await caller_of(request, asked)
    changes = {name: value for name in PREFERENCES if (value := getattr(asked, name)) is not None}
    now = await request.app[PROVIDERS].prefer(principal.account_id, changes)
    return json_answer({"success": True, "preferences": now.to_json()})


@routes.declare(
    "PATCH", "/api/providers/me/gpu-profile", summary="Update provider GPU capabilities", auth="provider",
    body=GpuProfile, answers={200: Described}, errors=(400, 413, 503),
)  # fmt: skip
@stored
async def gpu_profile(request: web.Request) -> web.StreamResponse:
    """For hardware that no agent reports yet; what a node reports of its GPUs is shown before it."""
    asked = await body_of(request, GpuProfile)
    principal = await caller_of(request, asked)
    told = [name for name in GpuProfile.model_fields if getattr(asked, name) is not None and name in FIELDS]
    changes = {FIELDS[name]: getattr(asked, name) for name in told}
    if asked.vram_gb is not None:
        changes["vram_mib"] = round(asked.vram_gb * MIB_PER_GIB)
    await request.app[PROVIDERS].describe(principal.account_id, changes)
    return json_answer({"success": True, "provider_id": principal.account_id, "updated_fields": told})


FIELDS = {"vram_gb": "vram_mib"} | {name: name for name in GPU_PROFILE if name != "vram_mib"}
"""Columns by the contract's names."""
