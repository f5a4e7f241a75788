"""What the router sees: engines by model, as one immutable picture, with the live load of each beside it.

A new snapshot is built when nodes or engines change; the `Engine` objects live on from one to the next, because the turns
in flight on them do.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from nodes.breaker import Breaker

TOKENS_PER_WAITING_TURN = 256
"""What a turn waiting inside an engine counts for, when we don't know its size: a common answer's length."""


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

    @property
    def in_tokens(self) -> float:
        """One number: tokens in flight from this gateway, plus turns of others' inside it, plus a full KV cache's weight."""
        foreign = max(0, self.running + self.waiting - self.turns - self.others_turns)
        known = self.tokens + self.others_tokens + foreign * TOKENS_PER_WAITING_TURN
        return known * (1.0 + self.kv_usage)


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

    @property
    def authority(self) -> str:
        """`host:port` as in a URL: an IPv6 address stands in brackets."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    def __repr__(self) -> str:
        state = "open" if self.breaker.is_open else "closed"
        return f"<Engine {self.key} turns={self.load.turns} breaker={state}>"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All engines that are ready on nodes that are online, by model."""

    by_model: Mapping[str, tuple[Engine, ...]] = field(default_factory=lambda: MappingProxyType({}))
    engines: tuple[Engine, ...] = ()
    nodes_online: int = 0

    @classmethod
    def of(cls, engines: Iterable[Engine], nodes_online: int) -> "Snapshot":
        """Index `engines` by each model that they serve."""
        everything = tuple(engines)
        by_model: dict[str, list[Engine]] = {}
        for engine in everything:
            for model in engine.models:
                by_model.setdefault(model, []).append(engine)
        index = MappingProxyType({model: tuple(row) for model, row in by_model.items()})
        return cls(index, everything, nodes_online)

    def models(self) -> dict[str, Model]:
        """Every model that is served, with the largest context that any engine gives it."""
        found: dict[str, Model] = {}
        for engine in self.engines:
            for model in engine.models.values():
                known = found.get(model.id)
                if known is None or known.context_length < model.context_length:
                    found[model.id] = model
        return found
