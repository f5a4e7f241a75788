"""What an engine must be to get a turn at all, and what it fails where it does not. Pure.

The choice itself looks at fitness in its own loops, a few attributes an engine; here are the wishes that few turns have, and
the names of all filters for whoever asks why.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from nodes.routing.router import Need
    from nodes.routing.snapshot import Engine


@dataclass(frozen=True, slots=True)
class Wishes:
    """What a client may ask of the node beside its model. `session` and `region` are hints, the others hold.

    `tier_min` is the least tier, `price_percent_max` the most that the node's owner may ask, in percent of the price book.
    """

    session: str = ""
    region: str = ""
    tier_min: int = 0
    price_percent_max: int | None = None

    @property
    def has_caps(self) -> bool:
        """Some engines may be out of question."""
        return self.tier_min > 0 or self.price_percent_max is not None


NO_WISHES: Final = Wishes()


def meets(engine: "Engine", wishes: Wishes) -> bool:
    """Whether it is within the caps."""
    most = wishes.price_percent_max
    return engine.tier >= wishes.tier_min and (most is None or engine.price_percent <= most)


def failed(engine: "Engine", need: "Need", turns_max: int) -> list[str]:
    """The filters that keep the turn from this engine, by name; none for one that may get it."""
    model = engine.models.get(need.model)
    load, breaker, wishes = engine.load, engine.breaker, need.wishes
    checks = {
        "model": model is None or model.kind != need.kind,
        "provider": need.account_id is not None and engine.account_id != need.account_id,
        "breaker": not breaker.admits,
        "full": load.turns >= min(turns_max, load.cap),
        "tried": engine in need.tried,
        "tier": engine.tier < wishes.tier_min,
        "price": not meets(engine, Wishes(price_percent_max=wishes.price_percent_max)),
    }
    return [name for name, is_failed in checks.items() if is_failed]
