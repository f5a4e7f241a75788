"""What a request's headers ask of the node that it goes to: session, region, caps, and an explanation.

A request without them pays nothing for them; what they do is `nodes.routing`'s.
"""

from collections.abc import Callable
from dataclasses import dataclass

from gateway.errors import BadRequest
from nodes.routing.filters import Wishes

SESSION, REGION = "x-poolgate-session", "x-poolgate-region"
TIER_MIN, PRICE_PERCENT_MAX = "x-poolgate-tier-min", "x-poolgate-price-percent-max"
EXPLAIN = "x-poolgate-explain"
NAMES = (SESSION, REGION, TIER_MIN, PRICE_PERCENT_MAX, EXPLAIN)

TEXT_MAX = 128
"""Characters of a session's or a region's name."""

COUNT_MAX = 32_000


@dataclass(frozen=True, slots=True)
class Hints:
    """The headers of one request. `explains`: an admin wants to know why its node was chosen."""

    wishes: Wishes
    explains: bool = False


def hints_of(header: Callable[[str], str | None]) -> Hints | None:
    """What is asked in the headers, each of which `header` tells; None for nothing. Raises BadRequest."""
    told = {name: value for name in NAMES if (value := header(name)) is not None}
    if not told:
        return None
    percent = _count(told, PRICE_PERCENT_MAX)
    wishes = Wishes(_text(told, SESSION), _text(told, REGION), _count(told, TIER_MIN) or 0, percent)
    return Hints(wishes, explains=told.get(EXPLAIN, "0") not in ("", "0", "false"))


def _text(told: dict[str, str], name: str) -> str:
    value = told.get(name, "")
    if len(value) > TEXT_MAX:
        raise BadRequest(f"The header '{name}' is longer than {TEXT_MAX} characters.")
    return value


def _count(told: dict[str, str], name: str) -> int | None:
    value = told.get(name)
    if value is None:
        return None
    if not (value.isascii() and value.isdigit() and len(value) <= 5 and int(value) <= COUNT_MAX):
        raise BadRequest(f"The header '{name}' must be a whole number from 0 to {COUNT_MAX:,}.")
    return int(value)
