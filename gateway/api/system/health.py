"""/health, /api/health, /ready and /metrics: answered from memory, quick under load."""

from datetime import UTC, datetime
from typing import Any, Literal

from aiohttp import web
from pydantic import BaseModel

from config.metrics import CONTENT_TYPE
from gateway.api.routes import Media, Routes
from gateway.api.services import HEALTH, METRICS
from gateway.api.system.answers import json_answer
from gateway.health import overall

routes = Routes(surface="plain", tag="System")


class ComponentStatus(BaseModel):
    """One part of the service."""

    name: str
    status: Literal["healthy", "degraded", "unhealthy"]
    message: str | None
    details: dict[str, Any] | None


class ServiceHealth(BaseModel):
    """The whole service, and each part."""

    overall_status: Literal["healthy", "degraded", "unhealthy"]
    components: list[ComponentStatus]


class Liveness(BaseModel):
    """The union of both contracts' answers (decision 1)."""

    status: str
    service: str
    mode: str
    timestamp: str
    uptime_seconds: float


class Readiness(BaseModel):
    """Whether a balancer may send requests here."""

    ready: bool


@routes.get(
    "/health",
    summary="Health of the service and its parts",
    auth="open",
    answers={200: ServiceHealth, 503: ServiceHealth},
)
async def service_health(request: web.Request) -> web.StreamResponse:
    """503 only when no turn can be taken."""
    components = request.app[HEALTH].components()
    status = overall(components)
    body = {"overall_status": status, "components": [component.to_json() for component in components]}
    return json_answer(body, status=503 if status == "unhealthy" else 200)


@routes.get("/api/health", summary="Liveness", auth="open", answers={200: Liveness})
async def liveness(request: web.Request) -> web.StreamResponse:
    """This process answers."""
    body = {
        "status": "ok",
        "service": "poolgate",
        "mode": "headless",
        "timestamp": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "uptime_seconds": round(request.app[HEALTH].uptime_s, 3),
    }
    return json_answer(body)


@routes.get("/ready", summary="Readiness", auth="open", answers={200: Readiness, 503: Readiness})
async def readiness(request: web.Request) -> web.StreamResponse:
    """503 while starting and while draining."""
    is_ready = request.app[HEALTH].is_ready
    return json_answer({"ready": is_ready}, status=200 if is_ready else 503)


@routes.get(
    "/metrics",
    summary="Prometheus metrics over all workers",
    auth="open",
    answers={200: Media("text/plain", str)},
)
async def prometheus(request: web.Request) -> web.StreamResponse:
    """Prometheus' text format."""
    return web.Response(body=await request.app[METRICS].rendered(), headers={"content-type": CONTENT_TYPE})
