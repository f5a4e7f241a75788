"""A provider's account: registration, login by e-mail, the dashboard, deletion and the rotation of its key."""

from typing import Any, Literal
from urllib.parse import quote

from aiohttp import web
from pydantic import BaseModel, Field

from gateway.api.credentials import presented_key, principal_of
from gateway.api.provider.asking import (
    Email,
    Facts,
    KeyBody,
    Named,
    Text,
    body_of,
    caller_of,
    counted,
    stored,
)
from gateway.api.provider.rendering import minor, moment, profile
from gateway.api.routes import Routes
from gateway.api.services import KEYRING, LOGINS, PROVIDER_ACCOUNTS, PROVIDERS, SETTINGS
from gateway.api.system.answers import json_answer
from gateway.errors import ApiError, BadRequest, Conflict, InvalidApiKey, NotFound, RateLimited, Unavailable
from gateway.identity.logins import QueueFull, WrongCode
from gateway.identity.providers import SCOPE, EmailTaken, NodesRunning, WithdrawalPending
from nodes.providers import UnknownProvider

routes = Routes(surface="plain", tag="Providers")

CONFIRM = "DELETE_MY_ACCOUNT"
CODE_MAILED = (
    "If this address belongs to a provider, a code is on its way to it. Send the address again with 'code'."
)


class InvalidCode(ApiError):
    """The code is wrong, was used, has expired, or was tried too often. Ask for another one."""

    status, type, code = 401, "invalid_request_error", "invalid_code"


class ProviderNotFound(InvalidApiKey):
    """Provider not found."""

    status, code = 404, "not_found"


class Registration(BaseModel):
    """A new provider."""

    name: Named
    email: Email = Field(json_schema_extra={"format": "email"})
    gpu_model: Named
    os: Literal["windows", "linux", "mac", "darwin"]
    phone: Text | None = None
    resource_spec: Facts | None = None


class Registered(BaseModel):
    """The key is shown this once."""

    success: bool
    provider_id: int
    api_key: str
    installer_url: str
    message: str
    approval_status: str


class LoginBody(BaseModel):
    """First the address alone, then with the code that was mailed to it."""

    email: Email = Field(json_schema_extra={"format": "email"})
    code: str | None = Field(None, max_length=64, description="The code from the mail")


class LoggedInProvider(BaseModel):
    """Whose key it is."""

    id: int
    name: str
    email: str
    gpu_model: str
    status: str


class LoginAnswer(BaseModel):
    """Without a code only `success` and `message`, whether the address is known or not."""

    success: bool
    message: str | None = None
    api_key: str | None = None
    provider: LoggedInProvider | None = None


class Dashboard(BaseModel):
    """A provider as its owner sees it."""

    provider: dict[str, Any]
    recent_jobs: list[dict[str, Any]]


class Deletion(KeyBody):
    """Irreversible."""

    confirm: Literal["DELETE_MY_ACCOUNT"] = Field(description="Must be this very text")
    reason: str | None = Field(None, max_length=5000)


class Deleted(BaseModel):
    """When it was done."""

    success: bool
    message: str
    deleted_at: str


class Rotated(BaseModel):
    """The key is shown this once."""

    success: bool
    api_key: str


@routes.post(
    "/api/providers/register", summary="Register a new GPU provider", auth="open", body=Registration,
    answers={200: Registered}, errors=(400, 409, 413, 429, 503),
)  # fmt: skip
@stored
async def register(request: web.Request) -> web.StreamResponse:
    """Makes an account and its first key. Its nodes take work when it is approved."""
    asked = await body_of(request, Registration)
    try:
        made = await request.app[PROVIDER_ACCOUNTS].register(
            name=asked.name, email=asked.email, gpu_model=asked.gpu_model, os=asked.os, phone=asked.phone,
            resource_spec=asked.resource_spec or {},
        )  # fmt: skip
    except EmailTaken:
        raise Conflict("A provider with this email already exists") from None
    after = "Download the installer to get started."
    if made.approval_status != "approved":
        after = "Download the installer; its node takes work as soon as an admin has approved you."
    return json_answer(
        {
            "success": True,
            "provider_id": made.account_id,
            "api_key": made.key,
            "installer_url": f"/api/providers/installer?key={quote(made.key, safe='')}&os={asked.os}",
            "message": f"Welcome {asked.name}! Your API key is ready. {after}",
            "approval_status": made.approval_status,
        }
    )


@routes.post(
    "/api/providers/login-email", summary="Retrieve API key by email", auth="open", body=LoginBody,
    answers={200: LoginAnswer}, errors=(400, 401, 413, 429, 503),
)  # fmt: skip
@stored
async def login_email(request: web.Request) -> web.StreamResponse:
    """The first call mails a one-time code; the second, with `code`, answers with a new, additional key.

    Both answers are the same for an address that no provider has. Keys that were there stay valid: only rotation revokes.
    """
    asked = await body_of(request, LoginBody)
    logins = request.app[LOGINS]
    if logins is None:
        raise Unavailable("This service can't send mail, so it can't log you in by it.")
    if asked.code is None:
        try:
            logins.ask(asked.email)
        except QueueFull:
            raise RateLimited("Too many logins at once. Try again later.", retry_after_s=60) from None
        return json_answer({"success": True, "message": CODE_MAILED})
    try:
        account_id = await logins.redeem(asked.email, asked.code.strip())
    except WrongCode:
        raise InvalidCode from None
    provider = await request.app[PROVIDERS].show(account_id)
    key = await request.app[PROVIDER_ACCOUNTS].add_key(account_id, "login")
    shown = {
        "id": provider.id, "name": provider.name, "email": asked.email, "gpu_model": provider.gpu_model,
        "status": provider.status,
    }  # fmt: skip
    return json_answer({"success": True, "api_key": key, "provider": shown})


@routes.get(
    "/api/providers/me", summary="Provider self-service dashboard", auth="provider", answers={200: Dashboard},
    errors=(400, 404, 503),
)  # fmt: skip
@stored
async def me(request: web.Request) -> web.StreamResponse:
    """Profile, what the GPUs last told, earnings and recent jobs. Without a key 400, with an unknown one 404 (contract)."""
    secret = presented_key(request)
    if secret is None:
        raise BadRequest("API key required")
    try:
        principal = await counted(request, await principal_of(request.app[KEYRING], secret, SCOPE))
        provider = await request.app[PROVIDERS].show(principal.account_id)
    except (InvalidApiKey, UnknownProvider):
        raise ProviderNotFound from None
    readings = await request.app[PROVIDERS].readings(provider.id)
    earned = await request.app[PROVIDER_ACCOUNTS].earned(provider.id)
    shown = profile(provider, readings, earned, request.app[SETTINGS].minor_per_major)
    return json_answer({"provider": shown, "recent_jobs": []})


@routes.declare(
    "DELETE", "/api/providers/me", summary="Delete provider account (PDPL right to erasure)", auth="provider",
    body=Deletion, answers={200: Deleted}, errors=(400, 409, 413, 503),
)  # fmt: skip
@stored
async def delete_me(request: web.Request) -> web.StreamResponse:
    """Irreversible. Nodes must be stopped, and no withdrawal under way. What was earned stays in the book, nameless."""
    asked = await body_of(request, Deletion)
    principal = await caller_of(request, asked)
    try:
        deleted_at = await request.app[PROVIDER_ACCOUNTS].delete(principal.account_id)
    except NodesRunning:
        raise Conflict("A node is still running: stop its agent first.") from None
    except WithdrawalPending:
        raise Conflict("A withdrawal is pending: wait until it is paid.") from None
    return json_answer(
        {
            "success": True,
            "message": "Provider account permanently deleted. Earnings history anonymised.",
            "deleted_at": moment(deleted_at),
        }
    )


@routes.post(
    "/api/providers/rotate-key", summary="Rotate provider API key", auth="provider", answers={200: Rotated},
    errors=(400, 413, 503),
)  # fmt: skip
@stored
async def rotate_key(request: web.Request) -> web.StreamResponse:
    """A new key; every key that the provider had before is revoked, those of its agents too."""
    principal = await caller_of(request, await body_of(request, KeyBody, may_be_absent=True))
    key = await request.app[PROVIDER_ACCOUNTS].rotate(principal.account_id)
    return json_answer({"success": True, "api_key": key})


@routes.get(
    "/api/providers/status/{api_key}", summary="Get provider status by API key (daemon-facing)", auth="open",
    answers={200: dict[str, Any]}, errors=(401, 404, 429, 503),
)  # fmt: skip
@stored
async def status(request: web.Request) -> web.StreamResponse:
    """The key stands in the path; it reaches no log."""
    secret = request.match_info["api_key"]
    principal = await counted(request, await principal_of(request.app[KEYRING], secret, SCOPE))
    try:
        provider = await request.app[PROVIDERS].show(principal.account_id)
    except UnknownProvider:
        raise NotFound("Provider not found.") from None
    earned = await request.app[PROVIDER_ACCOUNTS].earned(provider.id)
    shown: dict[str, Any] = {
        "provider_id": provider.id,
        "name": provider.name,
        "status": provider.status,
        "approval_status": provider.approval_status,
        "gpu_model": provider.gpu_model,
        "total_earnings": minor(earned.total_nano, request.app[SETTINGS].minor_per_major),
        "total_jobs": provider.jobs_completed,
        "uptime_percent": provider.uptime_percent or 0.0,
    }
    if provider.last_heartbeat_at is not None:
        shown["last_heartbeat"] = moment(provider.last_heartbeat_at)
    return json_answer(shown)
