"""Browsers of other origins (setting `cors_origins`): which may read answers, and what they are told. Pure."""

import re

from config.defaults import Settings
from gateway.relay.downstream import lines_of

EXPOSED = (
    "x-request-id, x-poolgate-max-tokens, idempotent-replayed, retry-after, x-ratelimit-limit-requests, "
    "x-ratelimit-remaining-requests, x-ratelimit-reset-requests, x-ratelimit-limit-tokens, "
    "x-ratelimit-remaining-tokens, x-ratelimit-reset-tokens"
)
"""Headers of ours that a script may read; without this it sees none."""

PREFLIGHT = {
    "access-control-allow-methods": "GET, HEAD, POST, PUT, PATCH, DELETE",
    "access-control-max-age": "86400",
}
"""What an OPTIONS that asks for permission is told beside the origin and the headers that it asked for."""


VISIBLE = re.compile(r"[ -~]+")
"""What of a request may stand in its answer: with `*` for origins, anybody's bytes would."""


class Cors:
    """The origins that are allowed; none by default, since keys belong on servers."""

    def __init__(self, settings: Settings) -> None:
        self._origins = {origin.strip() for origin in settings.cors_origins.split(",") if origin.strip()}

    def allows(self, origin: str | None) -> bool:
        """May a page of `origin` read answers?"""
        if origin is None or VISIBLE.fullmatch(origin) is None:
            return False
        return "*" in self._origins or origin in self._origins

    def fields(self, origin: str | None) -> dict[str, str]:
        """Headers of an answer to `origin`: no cookies are used here, so credentials are never allowed."""
        if not self._origins:
            return {}
        if not self.allows(origin):
            return {"vary": "origin"}
        assert origin is not None
        return {
            "access-control-allow-origin": origin, "access-control-expose-headers": EXPOSED, "vary": "origin",
        }  # fmt: skip

    def lines(self, origin: str | None) -> bytes:
        """The same as they stand in a head."""
        return lines_of(self.fields(origin))
