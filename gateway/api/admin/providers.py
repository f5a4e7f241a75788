"""An admin decides whether a provider's nodes may take work."""

import logging
from typing import Literal

from aiohttp import web
from pydantic import BaseModel

from gateway.api.credentials import admin_of
from gateway.api.provider.asking import stored
from gateway.api.routes import Routes
from gateway.api.services import ACCOUNTS, PROVIDERS
from gateway.api.system.answers import json_answer
from gateway.errors import NotFound
from nodes.providers import UnknownProvider

log = logging.getLogger("poolgate.identity")

routes = Routes(surface="plain", tag="Admin")


class Approval(BaseModel):
    """What was decided."""

    success: bool
    provider_id: int
    approval_status: Literal["approved", "rejected"]


@routes.post(
    "/api/admin/providers/{id}/approve", summary="Approve a provider", auth="admin", answers={200: Approval},
    errors=(403, 404, 503),
)  # fmt: skip
@stored
async def approve(request: web.Request) -> web.StreamResponse:
    """Its nodes' heartbeats are taken from now on."""
    return await _decide(request, "approved")


@routes.post(
    "/api/admin/providers/{id}/reject", summary="Refuse a provider, or take its approval back", auth="admin",
    answers={200: Approval}, errors=(403, 404, 503),
)  # fmt: skip
@stored
async def reject(request: web.Request) -> web.StreamResponse:
    """Its nodes leave routing within a second, and their heartbeats are refused."""
    return await _decide(request, "rejected")


async def _decide(request: web.Request, approval: str) -> web.StreamResponse:
    who = await admin_of(request)
    asked = request.match_info["id"]
    if not asked.isascii() or not asked.isdigit() or len(asked) > 18:
        raise NotFound("Provider not found.")
    try:
        provider = await request.app[PROVIDERS].show(int(asked))
    except UnknownProvider:
        raise NotFound("Provider not found.") from None
    await request.app[ACCOUNTS].set_approval(provider.id, approval)
    log.info(
        "provider %d is %s, says %s", provider.id, approval, who,
        extra={"action": f"provider_{approval}", "account_id": provider.id},
    )  # fmt: skip
    return json_answer({"success": True, "provider_id": provider.id, "approval_status": approval})
