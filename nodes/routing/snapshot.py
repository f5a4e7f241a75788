"""What the router sees: engines by model, as one immutable picture, with the live load of each beside it.

A new snapshot is built when nodes or engines change; the `Engine` objects live on from one to the next, because the turns
in flight on them do. Beside each group of engines that can stand in for one another lies the list of those worth a look:
who finds one there that can't take a turn takes it out, and what makes it fit again (a turn's end, a good probe) puts it
back. So the three engines that are left of ten thousand are found without looking at the others.
"""

from bisect import bisect_right, insort
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

from nodes.breaker import Breaker
from nodes.reach import Direct, Reach
from nodes.routing.homes import Ring, mark_of
from nodes.routing.prefixes import Held, sign_of

TOKENS_PER_WAITING_TURN = 256
"""What a turn waiting inside an engine counts for, when we don't know its size: a common answer's length."""

UNTOLD: Final = 2**61
"""Tokens of context that an engine counts as having if it does not tell how many."""

UNCAPPED: Final = 2**61
"""Turns that an engine takes which has refused none."""

SHARE_WINDOW = 256
"""Turns for each engine of a group over which its share of them is told: older ones count less and less. By chance alone a
share is then a sixteenth more or less than the mean; with 64 it would be an eighth, and pass `routing_share_max` daily."""

UNIT_MAX = 1e100
"""Weight of one turn at which all weights are scaled down: doubles go further, sums of many of them as well."""


STRAIGHT = Direct("", 0)
"""Stands for the way straight to an engine's host and port."""


@dataclass(frozen=True, slots=True)
class Model:
    """One model on one engine. `kind`: generate (chat, completions, responses) or pooling (embeddings)."""

    id: str
    context_length: int
    kind: str = "generate"
    parent: str | None = None

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> "Model":
        """From a stored row, which a newer version may have written with more fields."""
        known = {name: fields[name] for name in ("id", "context_length", "kind", "parent") if name in fields}
        return cls(**known)


@dataclass(slots=True)
class Load:
    """Work on one engine: ours, the other workers', and what it last said of itself."""

    turns: int = 0
    tokens: int = 0
    others_turns: int = 0
    others_tokens: int = 0
    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0
    strangers_tokens: int = 0  # of turns inside it that are no worker's, when it last told
    cap: int = UNCAPPED  # turns of ours that it takes, as far as it told by refusing one more

    def hear(self, running: int, waiting: int, kv_usage: float) -> None:
        """What it says of itself now. Turns that no worker sent it are worth a common answer each."""
        self.running, self.waiting, self.kv_usage = running, waiting, kv_usage
        strangers = running + waiting - self.turns - self.others_turns
        self.strangers_tokens = max(0, strangers) * TOKENS_PER_WAITING_TURN

    @property
    def in_tokens(self) -> float:
        """One number: tokens in flight from this gateway, those of strangers' turns, and a full KV cache's weight."""
        return (self.tokens + self.others_tokens + self.strangers_tokens) * (1.0 + self.kv_usage)


@dataclass(slots=True, eq=False)
class Engine:
    """One vLLM server as this worker sees it. Identity is the object: two engines are never equal."""

    key: str
    node_id: str
    engine_id: str
    account_id: int
    host: str
    port: int
    models: Mapping[str, Model]
    breaker: Breaker
    incarnation: int = 0
    load: Load = field(default_factory=Load)
    absent: "list[Group]" = field(default_factory=list)
    """Groups of the newest snapshot that took it out of `fit`."""
    reach: Reach = STRAIGHT
    held: Held = field(default_factory=Held)
    region: str = ""
    tier: int = 0
    price_percent: int = 100
    reputation: float = 1.0
    on_back: "Callable[[], None] | None" = None
    """Told when it may be fit again after it was not: turns may wait for that."""
    mark: int = 0

    def __post_init__(self) -> None:
        self.mark = mark_of(self.key)
        if self.reach is STRAIGHT:
            self.reach = Direct(self.host, self.port)

    @property
    def is_at_work(self) -> bool:
        """It has turns in flight, from here or from another worker."""
        load = self.load
        return load.turns > 0 or load.others_turns > 0

    def began(self, tokens: int) -> None:
        """A turn of that size goes there now; `ended` follows, whatever becomes of it."""
        load = self.load
        load.turns += 1
        load.tokens += tokens
        self.breaker.began()

    def ended(self, tokens: int) -> None:
        """That turn is over: there is room for another."""
        load = self.load
        load.turns -= 1
        load.tokens -= tokens
        self.breaker.ended()
        if self.absent:
            self.comes_back()

    def refused(self) -> None:
        """It said that it is full: it takes no more than it has of ours."""
        self.load.cap = max(1, self.load.turns)

    def is_fit(self, turns_max: int) -> bool:
        """It may get a turn now: its breaker lets one through, it has fewer than `turns_max` from this worker, and it did
        not say that it is full."""
        load = self.load
        return load.turns < turns_max and load.turns < load.cap and self.breaker.admits

    def comes_back(self) -> None:
        """It may be fit again, as its breaker closed or a turn ended: worth a look in every group."""
        for group in self.absent:
            group.put_back(self)
        self.absent.clear()
        if self.on_back is not None:
            self.on_back()

    def __repr__(self) -> str:
        state = "open" if self.breaker.is_open else "closed"
        return f"<Engine {self.key} turns={self.load.turns} breaker={state}>"


class Group:
    """Engines that serve one model in one way, of all providers or of one: any of them could take the same turn.

    `context_max` is the largest context that one of them gives the model, None if one does not tell; `context_min` the
    smallest that is told, None if none is. `fit` are those worth a look, the roomiest first. `placed`: turns that this
    worker sent to each of late, where one now counts `unit`; `total` is their sum. `sign` stands for the model in
    hashes of prompts.
    """

    __slots__ = (
        "_cold", "_colds", "_growth", "_ring", "_scarcity", "context_max", "context_min", "engines", "fit", "placed",
        "sign", "total", "unit",
    )  # fmt: skip

    def __init__(self, model: str, engines: Iterable[Engine], before: "Group | None" = None) -> None:
        """`before`: the group that it takes the place of, whose placements count on."""
        lengths = {engine: engine.models[model].context_length for engine in engines}
        told = [length for length in lengths.values() if length]
        self.context_max = max(told) if len(told) == len(lengths) else None
        self.context_min = min(told, default=None)
        # How little context they have, for sorting; one that does not tell counts as having all.
        self._scarcity = {engine: -(length or UNTOLD) for engine, length in lengths.items()}
        self.fit = sorted(lengths, key=self._scarcity.__getitem__)
        self.engines = tuple(self.fit)
        self._growth = 1.0 + 1.0 / (SHARE_WINDOW * max(1, len(self.engines)))
        self._ring: Ring | None = None
        self.sign = sign_of(model)
        # Which cold prompt was an engine's last one, counted over all of them, and what it had to compute then, in tokens.
        self._cold: dict[Engine, tuple[int, float]] = {}
        self._colds = 0
        self.unit: float = 1.0 if before is None else before.unit
        known: dict[Engine, float] = {} if before is None else before.placed
        self.placed: dict[Engine, float] = {
            engine: known[engine] for engine in self.engines if engine in known
        }
        self.total: float = float(sum(self.placed.values()))

    @property
    def ring(self) -> Ring:
        """Its engines by their marks; made at the first use, as few groups of a large pool are asked for it."""
        if self._ring is None:
            self._ring = Ring(self.engines)
        return self._ring

    def late_turns(self, engine: Engine) -> float:
        """How many turns that engine got of late, older ones counting less: in the mean SHARE_WINDOW."""
        return self.placed.get(engine, 0.0) / self.unit

    def place(self, engine: Engine) -> None:
        """A turn goes to that engine. Instead of all older ones growing lighter, each new one is heavier."""
        unit = self.unit
        self.placed[engine] = self.placed.get(engine, 0.0) + unit
        self.total += unit
        self.unit = unit * self._growth
        if unit > UNIT_MAX:
            self.placed = {engine: weight / unit for engine, weight in self.placed.items()}
            self.total, self.unit = float(sum(self.placed.values())), 1.0

    def place_cold(self, engine: Engine, tokens: int) -> None:
        """A prompt of so many tokens goes to that engine, of which nothing is cached anywhere."""
        before = self.computing(engine)
        self._colds += 1
        self._cold[engine] = self._colds, before + float(tokens)

    def computing(self, engine: Engine) -> float:
        """Tokens of cold prompts that it is likely to compute yet, if it is at work: an engine computes one prompt after the
        other. They become less with each cold prompt that goes elsewhere, and nothing with as many as there are engines."""
        found = self._cold.get(engine)
        if found is None or not engine.is_at_work:
            return 0.0
        return found[1] * max(0.0, 1.0 - float(self._colds - found[0]) / float(len(self.engines)))

    def roomy(self, context: int) -> int:
        """How many of `fit`, from the first, have room for that many tokens."""
        if self.is_roomy_all(context):
            return len(self.fit)
        return bisect_right(self.fit, -context, key=self._scarcity.__getitem__)

    def has(self, engine: Engine) -> bool:
        """Whether that engine belongs to it."""
        return engine in self._scarcity

    def is_roomy_all(self, context: int) -> bool:
        """Whether each of them has."""
        return self.context_min is None or context <= self.context_min

    def is_roomy(self, engine: Engine, context: int) -> bool:
        """Whether that engine of the group has room for so many tokens."""
        return -self._scarcity[engine] >= context

    def put_back(self, engine: Engine) -> None:
        """It may be fit again."""
        insort(self.fit, engine, key=self._scarcity.__getitem__)

    def take_out(self, place: int) -> None:
        """The engine at that place of `fit` can't take a turn now; what changes that says `comes_back`."""
        self.fit.pop(place).absent.append(self)

    def sweep(self, start: int, end: int, turns_max: int) -> int:
        """Take out everyone in `fit[start:end]` that can't take a turn now; where those who are left end."""
        seen = self.fit[start:end]
        left = [engine for engine in seen if engine.is_fit(turns_max)]
        if len(left) < len(seen):
            for engine in set(seen).difference(left):
                engine.absent.append(self)
            self.fit[start:end] = left
        return start + len(left)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All engines that are ready on nodes that are online, by model.

    `groups`: by model, kind and provider (None: of all; those are `common` too, by model and then by kind, as most turns
    look for one of them). An engine belongs to the groups of the newest snapshot alone.
    `cached`: nodes online that have a model on disk, by its name, whether or not an engine of theirs serves it.
    """

    by_model: Mapping[str, tuple[Engine, ...]] = field(default_factory=lambda: MappingProxyType({}))
    engines: tuple[Engine, ...] = ()
    nodes_online: int = 0
    groups: dict[tuple[str, str, int | None], Group] = field(default_factory=dict)
    common: dict[str, dict[str, Group]] = field(default_factory=dict)
    cached: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: MappingProxyType({}))

    @classmethod
    def of(
        cls, engines: Iterable[Engine], nodes_online: int, *, cached: Mapping[str, tuple[str, ...]] | None = None,
        before: "Snapshot | None" = None,
    ) -> "Snapshot":  # fmt: skip
        """Index `engines` by each model that they serve. `before`: the snapshot whose place this one takes."""
        known: dict[tuple[str, str, int | None], Group] = before.groups if before is not None else {}
        everything = tuple(engines)
        by_model: dict[str, list[Engine]] = {}
        members: dict[tuple[str, str, int | None], list[Engine]] = {}
        for engine in everything:
            engine.absent.clear()
            for model, facts in engine.models.items():
                by_model.setdefault(model, []).append(engine)
                members.setdefault((model, facts.kind, None), []).append(engine)
                members.setdefault((model, facts.kind, engine.account_id), []).append(engine)
        index = MappingProxyType({model: tuple(row) for model, row in by_model.items()})
        groups = {key: Group(key[0], row, known.get(key)) for key, row in members.items()}
        common: dict[str, dict[str, Group]] = {}
        for (model, kind, account_id), group in groups.items():
            if account_id is None:
                common.setdefault(model, {})[kind] = group
        return cls(index, everything, nodes_online, groups, common, MappingProxyType(dict(cached or {})))

    def group(self, model: str, kind: str, account_id: int | None) -> Group | None:
        """The engines that serve a model in that way, of one provider or (None) of all."""
        if account_id is not None:
            return self.groups.get((model, kind, account_id))
        kinds = self.common.get(model)
        return None if kinds is None else kinds.get(kind)

    def models(self) -> dict[str, Model]:
        """Every model that is served, with the largest context that any engine gives it."""
        found: dict[str, Model] = {}
        for engine in self.engines:
            for model in engine.models.values():
                known = found.get(model.id)
                if known is None or known.context_length < model.context_length:
                    found[model.id] = model
        return found
