"""Who asks: the credential of a request, wherever it stands, becomes a principal.

A key in a query works because contracts say so; it never reaches a log, since paths are logged without their query.
"""

import hmac
from collections.abc import Callable

from aiohttp import web

from gateway.api.services import KEYRING, SETTINGS
from gateway.errors import ApiError, Forbidden, InvalidApiKey, Unavailable
from gateway.identity.keyring import IdentityUnavailable, InvalidKey, KeyRing, Principal

NO_KEY = "You didn't provide an API key. Send it as 'Authorization: Bearer KEY' (or in X-API-Key, x-renter-key or ?key=)."


def presented_key(request: web.Request) -> str | None:
    """The API key that a request carries, in a header or else in its query."""
    return key_in(request.headers.get) or request.query.get("key") or None


def key_in(header: Callable[[str], str | None]) -> str | None:
    """The API key in a request's headers, each of which `header` tells; the one that OpenAI's SDKs send comes first."""
    authorization = header("authorization")
    if authorization is not None:
        scheme, _, value = authorization.partition(" ")
        if scheme.lower() == "bearer" and value.strip():
            return value.strip()
    return header("x-api-key") or header("x-renter-key") or header("x-provider-key") or None


async def authenticate(request: web.Request, scope: str) -> Principal:
    """The principal of a request whose key has `scope`. From memory, but for a key seen first."""
    secret = presented_key(request)
    if secret is None:
        raise InvalidApiKey(NO_KEY)
    return await principal_of(request.app[KEYRING], secret, scope)


async def admin_of(request: web.Request) -> str:
    """Who administers: the holder of the setting `admin_token`, or of a key with the scope `admin`. For the log.

    Raises InvalidApiKey, Forbidden or Unavailable.
    """
    presented = request.headers.get("x-admin-token") or key_in(request.headers.get)
    if not presented:
        raise InvalidApiKey("Send the admin token in the header x-admin-token.")
    token = request.app[SETTINGS].admin_token
    if token and hmac.compare_digest(presented.encode("utf-8", "surrogatepass"), token.encode()):
        return "the admin token"
    principal = await principal_of(request.app[KEYRING], presented, "admin")
    return f"account {principal.account_id}"


async def principal_of(keyring: KeyRing, secret: str, scope: str) -> Principal:
    """The principal of `secret`. Raises InvalidApiKey, Forbidden or Unavailable."""
    principal = keyring.lookup(secret)
    if principal is None:
        try:
            principal = await keyring.load(secret)
        except InvalidKey:
            raise InvalidApiKey from None
        except IdentityUnavailable:
            raise Unavailable(
                "Keys can't be checked right now. Try again shortly.", retry_after_s=2
            ) from None
    check_scope(principal, scope)
    return principal


async def is_good(keyring: KeyRing, secret: str, scope: str) -> bool:
    """Whether what `secret` began may go on: unless it is known to be no key any more, or not to have the scope."""
    try:
        await principal_of(keyring, secret, scope)
    except Unavailable:
        return True  # the keyring can't say: nothing was revoked that this worker knows of
    except ApiError:
        return False
    return True


def check_scope(principal: Principal, scope: str) -> None:
    """Raises Forbidden unless a key has it."""
    if scope not in principal.scopes:
        raise Forbidden(f"This key may not do that: it lacks the scope '{scope}'.")
