"""The public lists of providers: available, marketplace, public, and the renters' own; no key is needed for any."""

import time
from typing import Any, Literal

from aiohttp import web
from pydantic import BaseModel

from billing.money import format_amount, to_minor_up
from billing.prices import NoJobPrice
from gateway.api.provider.asking import stored
from gateway.api.provider.rendering import is_live, moment
from gateway.api.routes import Routes
from gateway.api.services import MARKETPLACE, PRICES, SETTINGS
from gateway.api.system.answers import json_answer
from nodes.providers import Provider
from nodes.telemetry import vram_gb

routes = Routes(surface="plain", tag="Providers")
renter_routes = Routes(surface="plain", tag="Renters")

JOB_TYPE = "custom"
"""The type of job that has a GPU to itself, whatever it does: its minutes are the indicative price."""


class Card(BaseModel):
    """A provider in the marketplace."""

    id: int
    gpu_model: str
    vram_gb: float | None
    price_per_min_halala: int
    uptime_pct: float
    jobs_completed: int
    reliability_score: float | None


class PublicProvider(BaseModel):
    """A provider on the public page."""

    id: int
    gpu_model: str
    vram_gb: float
    gpu_count: int
    location: str
    price_per_min_halala: int
    uptime_pct: float
    jobs_completed: int
    is_live: bool
    cached_models: list[str]
    reliability_score: float | None


class PublicList(BaseModel):
    """The public page."""

    providers: list[PublicProvider]
    total: int


class OfferedProvider(PublicProvider):
    """A provider with what it costs."""

    name: str
    status: str
    price_per_min_sar: str
    price_per_hour_sar: str


class OfferedList(BaseModel):
    """Providers with indicative rates."""

    providers: list[OfferedProvider]
    total: int


class AvailableProvider(BaseModel):
    """A provider as renters see it."""

    id: int
    name: str
    gpu_model: str
    vram_gb: int
    vram_mib: int
    gpu_count: int
    driver_version: str
    compute_capability: str
    cuda_version: str
    status: str
    is_live: bool
    location: str | None
    reliability_score: float | None
    cached_models: list[str]
    discovery_source: Literal["sqlite"]
    discovered_at: str | None
    addrs: list[str]
    stale: bool


class DiscoveryHealth(BaseModel):
    """How providers are found: they register, so nothing is announced."""

    mode: str
    enabled: bool
    announcement_enabled: bool
    bootstrap_configured: bool


class AvailableList(BaseModel):
    """Providers as renters see them."""

    providers: list[AvailableProvider]
    total: int
    discovery_mode: Literal["sqlite"]
    discovery_health: DiscoveryHealth


@routes.get(
    "/api/providers/available", summary="Public marketplace list of live online providers", auth="open",
    answers={200: OfferedList}, errors=(429, 503),
)  # fmt: skip
@stored
async def available(request: web.Request) -> web.StreamResponse:
    """Online, unpaused providers with GPU specs and indicative rates; the largest first."""
    price_nano = _price_nano(request)
    money = {
        "price_per_min_sar": format_amount(price_nano, "").strip(),
        "price_per_hour_sar": format_amount(60 * price_nano, "").strip(),
    }
    found = [
        {**_public(request, each), "name": each.name, "status": each.status, **money}
        for each in await request.app[MARKETPLACE].providers()
    ]
    return json_answer({"providers": found, "total": len(found)})


@routes.get(
    "/api/providers/marketplace", summary="Public lightweight online-provider marketplace list", auth="open",
    answers={200: list[Card]}, errors=(429, 503),
)  # fmt: skip
@stored
async def marketplace(request: web.Request) -> web.StreamResponse:
    """Online providers for public cards; the largest first."""
    names = Card.model_fields
    found = [_public(request, each) for each in await request.app[MARKETPLACE].providers()]
    return json_answer([{name: each[name] for name in names} for each in found])


@routes.get(
    "/api/providers/public", summary="Public GPU marketplace: live providers", auth="open",
    answers={200: PublicList}, errors=(429, 503),
)  # fmt: skip
@stored
async def public(request: web.Request) -> web.StreamResponse:
    """Online, unpaused providers with specs and indicative pricing; the largest first."""
    found = [_public(request, each) for each in await request.app[MARKETPLACE].providers()]
    return json_answer({"providers": found, "total": len(found)})


@renter_routes.get(
    "/api/renters/available-providers", summary="Browse online GPU providers", auth="open",
    answers={200: AvailableList}, errors=(429, 503),
)  # fmt: skip
@stored
async def available_providers(request: web.Request) -> web.StreamResponse:
    """Online, unpaused providers, the one with the most VRAM first. `discovery_*` say that they registered here."""
    found = [_offered(each) for each in await request.app[MARKETPLACE].providers()]
    health = {
        "mode": "sqlite", "enabled": False, "announcement_enabled": False, "bootstrap_configured": False,
    }  # fmt: skip
    return json_answer(
        {"providers": found, "total": len(found), "discovery_mode": "sqlite", "discovery_health": health}
    )


def _public(request: web.Request, provider: Provider) -> dict[str, Any]:
    price_nano, minor = _price_nano(request), request.app[SETTINGS].minor_per_major
    return {
        "id": provider.id,
        "gpu_model": provider.gpu_model,
        "vram_gb": vram_gb(provider.vram_mib),
        "gpu_count": provider.gpu_count,
        "location": provider.location,
        "price_per_min_halala": to_minor_up(price_nano, minor),
        "uptime_pct": provider.uptime_percent or 0.0,
        "jobs_completed": provider.jobs_completed,
        "is_live": is_live(provider),
        "cached_models": provider.cached_models,
        "reliability_score": provider.reliability_score,
    }


def _offered(provider: Provider) -> dict[str, Any]:
    return {
        "id": provider.id,
        "name": provider.name,
        "gpu_model": provider.gpu_model,
        "vram_gb": vram_gb(provider.vram_mib),
        "vram_mib": provider.vram_mib,
        "gpu_count": provider.gpu_count,
        "driver_version": provider.driver_version,
        "compute_capability": provider.compute_capability,
        "cuda_version": provider.cuda_version,
        "status": provider.status,
        "is_live": is_live(provider),
        "location": provider.location or None,
        "reliability_score": provider.reliability_score,
        "cached_models": provider.cached_models,
        "discovery_source": "sqlite",
        "discovered_at": moment(provider.last_heartbeat_at),
        "addrs": [],  # nodes are reached through the gateway alone
        "stale": not is_live(provider),
    }


def _price_nano(request: web.Request) -> int:
    """Of a minute; 0 where the price book has none."""
    try:
        return request.app[PRICES].job_price(JOB_TYPE, time.time()).minute_nano
    except NoJobPrice:
        return 0
