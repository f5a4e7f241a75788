"""How limits are told to clients: OpenAI's `x-ratelimit-*` and the contracts' `X-RateLimit-*`.

Each names the tightest window of its kind, the one with the least share left. Which windows there are, and what is used
of them, is told by the limiter.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple


class View(NamedTuple):
    """One window as a client may see it."""

    unit: str  # requests, tokens
    limit: int
    remaining: int
    reset_ms: int  # until the window is as if nothing had come, if nothing more comes


class Told(dict[str, str]):
    """Headers, shared by all answers that tell the same, so they must not be changed."""

    __slots__ = ("_lines",)

    def __init__(self) -> None:
        super().__init__()
        self._lines: bytes | None = None

    def with_more(self, more: Mapping[str, str]) -> "Told":
        """These, and some that one answer has."""
        told = Told()
        told.update(self)
        told.update(more)
        return told

    @property
    def lines(self) -> bytes:
        """The same as they stand in an answer's head, each with its end of line; made once, when all are in."""
        if self._lines is None:
            self._lines = "".join([f"{name}: {value}\r\n" for name, value in self.items()]).encode()
        return self._lines


NOTHING_TOLD = Told()
"""For answers without limits."""


def headers_of(views: Iterable[View]) -> Told:
    """Headers of one answer: of each unit the window that has the least part left."""
    tightest: dict[str, View] = {}
    for view in views:
        other = tightest.get(view.unit)
        if other is None or view.remaining * other.limit < other.remaining * view.limit:
            tightest[view.unit] = view
    headers = Told()
    for unit, view in tightest.items():
        headers["x-ratelimit-limit-" + unit] = str(view.limit)
        headers["x-ratelimit-remaining-" + unit] = str(view.remaining)
        headers["x-ratelimit-reset-" + unit] = duration(view.reset_ms)
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
