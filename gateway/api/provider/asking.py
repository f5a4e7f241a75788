"""What the provider API's routes share: the caller behind a key, wherever it stands, a checked body, and its answer.

Keys also stand in JSON bodies (`api_key`, `key`) here; the header is the documented way and wins.
"""

import functools
import logging
import re
import uuid
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Annotated, Any, TypeVar

import asyncpg
import orjson
from aiohttp import web
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
)

from config.postgres import AWAY
from gateway.api.credentials import NO_KEY, presented_key, principal_of
from gateway.api.inference import read_body
from gateway.api.openai.explain import explain
from gateway.api.services import KEYRING, REQUEST_ID, REQUEST_LIMITS
from gateway.errors import BadRequest, Conflict, Forbidden, InvalidApiKey, Unavailable
from gateway.identity.keyring import Principal
from gateway.identity.providers import SCOPE
from nodes.providers import UnknownProvider

log = logging.getLogger("poolgate.nodes")

BODY_BYTES_MAX = 2**16
"""The largest is a registration with its resource_spec, or an event with 5,000 characters."""

KEY_CHARS_MAX = 1024

NODE_OF_KEY = uuid.UUID("6f1d1c0e-6f0a-4d0c-9a57-0f3c5a3a7f10")
"""Namespace of node ids for agents that name none."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Shape = TypeVar("Shape", bound=BaseModel)


def _without_nul(text: str) -> str:
    if "\x00" in text:
        raise ValueError("no NUL")
    return text


def _address(text: str) -> str:
    if not EMAIL.fullmatch(text):
        raise ValueError("not an e-mail address")
    return text.lower()


def storable(value: Any) -> Any:
    """What JSON allows and we can't write again: numbers beyond 64 bits, half a surrogate pair, a hundred levels."""
    try:
        orjson.dumps(value)
    except TypeError:
        raise ValueError("not storable") from None
    return value


def _in_utc(at: datetime) -> datetime:
    """Without a zone it is UTC's, as agents write it. ValueError for what is nobody's present."""
    if not 1970 <= at.year <= 9000:
        raise ValueError("not a time of this age")
    return at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC)


EMAIL = re.compile(
    r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+(?:\.[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+)*"
    r"@[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?(?:\.[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?)*"
)
"""What mail is sent to (RFC 5322's dot-atoms): no quoted names, no lists, nothing that could end a header."""

Text = Annotated[str, Field(max_length=512), AfterValidator(_without_nul)]
Named = Annotated[
    str,
    StringConstraints(strip_whitespace=True, min_length=1, max_length=512),
    AfterValidator(_without_nul),
]
Facts = Annotated[dict[str, Any], Field(max_length=64), AfterValidator(storable)]
"""Whatever somebody wants to tell."""

Moment = Annotated[datetime, AfterValidator(_in_utc)]
Email = Annotated[str, Field(max_length=254), AfterValidator(_address)]


class KeyBody(BaseModel):
    """A body that may carry its caller's key."""

    model_config = ConfigDict(extra="ignore")

    key: str | None = Field(None, max_length=KEY_CHARS_MAX, description="Provider key; or in x-provider-key")
    api_key: str | None = Field(None, max_length=KEY_CHARS_MAX, description="The same by its other name")

    @property
    def secret(self) -> str | None:
        return self.key or self.api_key


async def body_of(request: web.Request, shape: type[Shape], *, may_be_absent: bool = False) -> Shape:
    """The request's body as `shape`. Raises BadRequest with the first field that is wrong."""
    if may_be_absent and not request.body_exists:
        return shape()
    body = await read_body(request, BODY_BYTES_MAX)
    if may_be_absent and not body.strip():
        return shape()
    try:
        return shape.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        if not first["loc"] and first["type"] != "json_invalid":
            raise BadRequest("The body must be a JSON object.") from None
        raise explain(error, body) from None


async def caller_of(request: web.Request, body: KeyBody | None = None) -> Principal:
    """The provider's principal; its key counts against the limits. Raises InvalidApiKey, Forbidden, RateLimited."""
    secret = presented_key(request) or (body.secret if body is not None else None)
    if not secret:
        raise InvalidApiKey(NO_KEY)
    return await counted(request, await principal_of(request.app[KEYRING], secret, SCOPE))


async def counted(request: web.Request, principal: Principal) -> Principal:
    """Count the request against its key's limit."""
    await request.app[REQUEST_LIMITS].admit_key(principal.key_id)
    return principal


def stored(handler: Handler) -> Handler:
    """Translate what PostgreSQL makes of a request: values that it can't keep, and its absence."""

    @functools.wraps(handler)
    async def translate(request: web.Request) -> web.StreamResponse:
        try:
            response = await handler(request)
        except asyncpg.DataError:
            raise BadRequest("A text or a number in the request can't be kept, as one with a NUL.") from None
        except UnknownProvider:
            raise Forbidden("This key's account is no provider.") from None
        except asyncpg.IntegrityConstraintViolationError:
            raise Conflict("Something changed meanwhile. Try again.") from None
        except AWAY as error:
            log.warning(  # an error's text may name an address
                "%s was refused: %s", handler.__name__, type(error).__name__,
                extra={"action": "store_failed", "request_id": request[REQUEST_ID]},
            )  # fmt: skip
            raise Unavailable(
                "That can't be looked up right now. Try again shortly.", retry_after_s=2
            ) from None
        response.headers["cache-control"] = "no-store"
        response.headers["referrer-policy"] = "no-referrer"  # keys may stand in this path or query
        return response

    return translate


def whole_number(request: web.Request, name: str, default: int, most: int) -> int:
    """A query parameter from 1 to `most`. Raises BadRequest."""
    text = request.query.get(name)
    if text is None:
        return default
    if not re.fullmatch("[0-9]{1,9}", text) or not 1 <= int(text) <= most:
        raise BadRequest(f"'{name}' must be a whole number from 1 to {most}.", param=name)
    return int(text)


def node_of_account(account_id: int) -> str:
    """The node of an agent that names none: then a provider has one."""
    return str(uuid.uuid5(NODE_OF_KEY, str(account_id)))


def jsonable(value: Any) -> Any:
    """Text of a jsonb column as what it says."""
    return orjson.loads(value) if isinstance(value, str) else value
