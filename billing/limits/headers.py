"""How limits are told to clients: OpenAI's `x-ratelimit-*` and the contracts' `X-RateLimit-*`.

Each names the tightest window of its kind, the one with the least share left. Which windows there are, and what is used
of them, is told by the limiter.
"""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class View:
    """One window as a client may see it."""

    unit: str  # requests, tokens
    limit: int
    remaining: int
    reset_ms: int  # until the window is as if nothing had come, if nothing more comes

    @property
    def share(self) -> float:
        """What is left, of 1."""
        return self.remaining / self.limit


def headers_of(views: Iterable[View]) -> dict[str, str]:
    """Headers of one answer; the dictionary is shared between answers, so it must not be changed."""
    tightest: dict[str, View] = {}
    for view in views:
        if view.unit not in tightest or view.share < tightest[view.unit].share:
            tightest[view.unit] = view
    headers: dict[str, str] = {}
    for unit, view in tightest.items():
        headers[f"x-ratelimit-limit-{unit}"] = str(view.limit)
        headers[f"x-ratelimit-remaining-{unit}"] = str(view.remaining)
        headers[f"x-ratelimit-reset-{unit}"] = duration(view.reset_ms)
    if tightest:
        # HTTP's header names know no case, but these three are other headers than OpenAI's six.
        told = tightest.get("requests") or tightest["tokens"]
        headers["x-ratelimit-limit"] = str(told.limit)
        headers["x-ratelimit-remaining"] = str(told.remaining)
        headers["x-ratelimit-reset"] = str(-(-told.reset_ms // 1000))
    return headers


def duration(milliseconds: int) -> str:
    """OpenAI writes durations as Go does: `12ms`, `1.5s`, `6m0s`, `24h0m0s`."""
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    seconds, rest_ms = divmod(milliseconds, 1000)
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    fraction = f".{rest_ms:03d}".rstrip("0") if rest_ms else ""
    text = f"{seconds}{fraction}s"
    if hours:
        return f"{hours}h{minutes}m{text}"
    return f"{minutes}m{text}" if minutes else text
