"""The messages between a node's agent and the gateway: the heartbeat and its reply, as objects and as JSON.

Field names are those of the marketplace contract plus our optional ones; a message of the other side is
checked here and never trusted. What a gateway does with one is left to `heartbeats`, what goes in to `agent`.
"""

import hmac
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

AGENT_VERSION = "0.1.0"
HEARTBEAT_PATH = "/api/providers/heartbeat"
TUNNEL_PATH = "/api/providers/tunnel"
NODE_HEADER = "x-poolgate-node"  # which node a tunnel is of
TOKEN_HEADER = "x-poolgate-token"  # what a request to an agent's listener must have  # noqa: S105 - its name
ENGINE_HEADER = "x-poolgate-engine"  # and for which engine it is
PROOF_PATH = "/poolgate/proof"  # where a listener proves whose it is

STARTING, READY, DRAINING, FAILED, STOPPED = "starting", "ready", "draining", "failed", "stopped"
ENGINE_STATES = (STARTING, READY, DRAINING, FAILED, STOPPED)
GENERATE, POOLING = "generate", "pooling"
MODEL_KINDS = (GENERATE, POOLING)

# A heartbeat comes from another machine; these keep a broken or hostile one small, far above real use.
ENGINES_MAX = 64
MODELS_MAX = 512  # of one engine: a base model and its LoRA adapters
CACHED_MODELS_MAX = 4096
TEXT_MAX = 512
REASON_MAX = 2000
FACTS_MAX = 64  # fields of gpu_status and resource_spec
PENDING_MAX = 64  # commands and their progress in one message
COUNT_MAX = 2**53

PREFERENCES = (
    "run_mode", "scheduled_start", "scheduled_end", "gpu_usage_cap_pct", "vram_reserve_gb", "temp_limit_c", "time_zone",
)  # fmt: skip
"""What a provider prefers, in the heartbeat's reply, by the contract's names; scheduled hours are of `time_zone`."""

WANTED_BY_STATE = {"paused": "pause", "draining": "drain"}
"""What is wanted of a node, where a gateway tells only the node's state."""


def listener_proof(token: str, nonce: str) -> str:
    """What only a listener that has the node's token can answer to `nonce`; it tells nothing of the token."""
    return hmac.digest(token.encode(), f"listener:{nonce}".encode(), "sha256").hex()


class BadMessage(ValueError):
    """The message names a field that is missing or has a wrong value; its text names the field."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """A model that an engine serves; `parent` is the base model of a LoRA adapter."""

    id: str
    context_length: int = 0  # tokens; 0: not known
    kind: str = GENERATE
    parent: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "context_length": self.context_length,
            "kind": self.kind,
            "parent": self.parent,
        }

    @classmethod
    def from_json(cls, value: object) -> "ModelInfo":
        fields = _Fields(value, "models[]")
        return cls(
            id=fields.text("id", required=True),
            context_length=fields.count("context_length"),
            kind=fields.one_of("kind", MODEL_KINDS, GENERATE),
            parent=fields.text("parent") or None,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineReport:
    """One vLLM server of a node. `engine_id` is stable over restarts and unique in the node."""

    engine_id: str
    url: str  # as the gateway reaches it
    state: str
    reason: str = ""  # why it is in that state, for people
    restarts: int = 0
    models: tuple[ModelInfo, ...] = ()
    block_size: int = 0  # tokens of one prefix-cache block; 0: not known
    kv_tokens: int = 0  # tokens that its KV cache holds; 0: not known
    prompt_tokens: int | None = None  # that it has worked on since its start; None: it does not tell
    completion_tokens: int | None = None

    @property
    def tells_usage(self) -> bool:
        return self.prompt_tokens is not None and self.completion_tokens is not None

    def to_json(self) -> dict[str, Any]:
        return {
            "engine_id": self.engine_id,
            "url": self.url,
            "state": self.state,
            "reason": self.reason,
            "restarts": self.restarts,
            "models": [model.to_json() for model in self.models],
            "block_size": self.block_size,
            "kv_tokens": self.kv_tokens,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
        }

    @classmethod
    def from_json(cls, value: object) -> "EngineReport":
        fields = _Fields(value, "engines[]")
        url = fields.text("url", required=True)
        if not url.startswith(("http://", "https://")):
            raise BadMessage("engines[].url must start with http:// or https://")
        return cls(
            engine_id=fields.text("engine_id", required=True),
            url=url.rstrip("/"),
            state=fields.one_of("state", ENGINE_STATES),
            reason=fields.text("reason", most=REASON_MAX),
            restarts=fields.count("restarts"),
            models=tuple(ModelInfo.from_json(item) for item in fields.items("models", MODELS_MAX)),
            block_size=fields.count("block_size"),
            kv_tokens=fields.count("kv_tokens"),
            prompt_tokens=fields.count("prompt_tokens") if fields.has("prompt_tokens") else None,
            completion_tokens=fields.count("completion_tokens") if fields.has("completion_tokens") else None,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLoad:
    """What an engine last said of itself; `kv_usage` is 0..1."""

    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0
    sleeping: bool = False

    @property
    def is_idle(self) -> bool:
        return self.running + self.waiting == 0

    def to_json(self) -> dict[str, Any]:
        return {
            "running": self.running,
            "waiting": self.waiting,
            "kv_usage": round(self.kv_usage, 4),
            "sleeping": self.sleeping,
        }

    @classmethod
    def from_json(cls, value: object) -> "EngineLoad":
        fields = _Fields(value, "load")
        return cls(
            running=fields.count("running"),
            waiting=fields.count("waiting"),
            kv_usage=min(1.0, fields.number("kv_usage")),
            sleeping=fields.flag("sleeping"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ReachAsked:
    """How a node's engines are to be reached: `direct` at the addresses reported, or behind their `agent`, by its tunnel or
    by the listener that it advertises (HOST:PORT and the SHA-256 of its certificate, in hex)."""

    mode: str = "direct"
    advertise: str = ""
    fingerprint: str = ""

    def to_json(self) -> dict[str, Any]:
        return {"mode": self.mode, "advertise": self.advertise, "fingerprint": self.fingerprint}

    @classmethod
    def from_json(cls, value: object) -> "ReachAsked":
        if value is None:
            return cls()
        fields = _Fields(value, "reach")
        asked = cls(
            mode=fields.one_of("mode", ("direct", "agent"), "direct"),
            advertise=fields.text("advertise"),
            fingerprint=fields.text("fingerprint").lower(),
        )
        if asked.advertise and not re.fullmatch("[0-9a-f]{64}", asked.fingerprint):
            raise BadMessage("reach.fingerprint must be the SHA-256 of the listener's certificate, in hex")
        return asked


@dataclass(frozen=True, slots=True, kw_only=True)
class ReachReply:
    """How the gateway gets to this node now (direct, listener, tunnel or none), what keeps it from a better way, and the
    secret by which a listener knows the gateway."""

    way: str = ""
    problem: str = ""
    token: str = field(default="", repr=False)

    def to_json(self) -> dict[str, Any]:
        return {"way": self.way, "problem": self.problem, "token": self.token}

    @classmethod
    def from_json(cls, value: object) -> "ReachReply":
        if value is None:
            return cls()
        fields = _Fields(value, "reach")
        return cls(
            way=fields.text("way"),
            problem=fields.text("problem", most=REASON_MAX),
            token=fields.text("token"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat:
    """What an agent says of its node. Only `api_key` is required; without `node_id` a key has one node."""

    api_key: str = field(repr=False)
    gpu_status: Mapping[str, Any] = field(default_factory=dict)
    uptime: float = 0.0  # seconds
    provider_ip: str = ""
    provider_hostname: str = ""
    cached_models: tuple[str, ...] = ()
    resource_spec: Mapping[str, Any] = field(default_factory=dict)
    node_id: str = ""
    epoch: int = 0
    instance: str = ""  # of the agent's process: tells two agents of one node id apart
    agent_version: str = ""
    engines: tuple[EngineReport, ...] = ()
    load: Mapping[str, EngineLoad] = field(default_factory=dict)  # by engine_id
    progress: tuple[Mapping[str, Any], ...] = ()  # of commands, where the control websocket is down
    reach: ReachAsked = field(default_factory=ReachAsked)

    def to_json(self) -> dict[str, Any]:
        return {
            "api_key": self.api_key,
            "gpu_status": dict(self.gpu_status),
            "uptime": round(self.uptime, 1),
            "provider_ip": self.provider_ip,
            "provider_hostname": self.provider_hostname,
            "cached_models": list(self.cached_models),
            "resource_spec": dict(self.resource_spec),
            "node_id": self.node_id,
            "epoch": self.epoch,
            "instance": self.instance,
            "agent_version": self.agent_version,
            "engines": [engine.to_json() for engine in self.engines],
            "load": {engine_id: load.to_json() for engine_id, load in self.load.items()},
            "progress": [dict(entry) for entry in self.progress],
            "reach": self.reach.to_json(),
        }

    @classmethod
    def from_json(cls, value: object) -> "Heartbeat":
        """Raises `BadMessage`; absent and null are the same."""
        fields = _Fields(value, "")
        engines = tuple(EngineReport.from_json(item) for item in fields.items("engines", ENGINES_MAX))
        known = {engine.engine_id for engine in engines}
        if len(known) != len(engines):
            raise BadMessage("engines[].engine_id must be unique in a node")
        load = fields.facts("load", ENGINES_MAX)
        return cls(
            api_key=fields.text("api_key", required=True),
            gpu_status=fields.facts("gpu_status"),
            uptime=fields.number("uptime"),
            provider_ip=fields.text("provider_ip"),
            provider_hostname=fields.text("provider_hostname"),
            cached_models=fields.texts("cached_models", CACHED_MODELS_MAX),
            resource_spec=fields.facts("resource_spec"),
            node_id=_uuid(fields.text("node_id")),
            epoch=fields.count("epoch"),
            instance=_uuid(fields.text("instance"), "instance"),
            agent_version=fields.text("agent_version"),
            engines=engines,
            load={key: EngineLoad.from_json(item) for key, item in load.items() if key in known},
            progress=tuple(
                _Fields(item, "progress[]").all() for item in fields.items("progress", PENDING_MAX)
            ),
            reach=ReachAsked.from_json(fields.get("reach")),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class HeartbeatReply:
    """What the gateway answers. After `lease_s` without another good heartbeat it takes the node as gone."""

    message: str = "Heartbeat received"
    timestamp: str = ""
    needs_update: bool = False
    update_available: bool = False
    latest_version: str = AGENT_VERSION
    min_version: str = ""
    approval_status: str = "approved"
    preload_model: Mapping[str, Any] | None = None
    wanted: str = "serve"  # of this node: serve, pause, drain
    commands: tuple[Mapping[str, Any], ...] = ()  # not done yet; an agent does each id once
    preferences: Mapping[str, Any] = field(default_factory=dict)  # the provider's, by the contract's names
    node_id: str = ""
    epoch: int = 0
    lease_s: float = 0.0  # 0: none was said
    heartbeat_interval_s: float = 0.0  # 0: none was said
    state: str = ""  # of the node, as the gateway has it: online, paused, draining, suspended
    reach: ReachReply = field(default_factory=ReachReply)

    def to_json(self) -> dict[str, Any]:
        return {
            "success": True,
            "message": self.message,
            "timestamp": self.timestamp,
            "needs_update": self.needs_update,
            "update_available": self.update_available,
            "latest_version": self.latest_version,
            "min_version": self.min_version,
            "approval_status": self.approval_status,
            "approved": self.approval_status == "approved",
            "preload_model": None if self.preload_model is None else dict(self.preload_model),
            "wanted": self.wanted,
            "commands": [dict(command) for command in self.commands],
            "preferences": dict(self.preferences),
            "node_id": self.node_id,
            "epoch": self.epoch,
            "lease_s": self.lease_s,
            "heartbeat_interval_s": self.heartbeat_interval_s,
            "state": self.state,
            "reach": self.reach.to_json(),
        }

    @classmethod
    def from_json(cls, value: object) -> "HeartbeatReply":
        """Raises `BadMessage`; our own fields may be absent, as in other gateways of the contract."""
        fields = _Fields(value, "")
        return cls(
            message=fields.text("message", most=REASON_MAX),
            timestamp=fields.text("timestamp"),
            needs_update=fields.flag("needs_update"),
            update_available=fields.flag("update_available"),
            latest_version=fields.text("latest_version"),
            min_version=fields.text("min_version"),
            approval_status=fields.text("approval_status"),
            preload_model=fields.facts("preload_model") or None,
            wanted=fields.text("wanted") or WANTED_BY_STATE.get(fields.text("state"), "serve"),
            commands=tuple(
                _Fields(item, "commands[]").all() for item in fields.items("commands", PENDING_MAX)
            ),
            preferences={**fields.facts("preferences"), **fields.some(PREFERENCES)},
            node_id=_uuid(fields.text("node_id")),
            epoch=fields.count("epoch"),
            lease_s=fields.number("lease_s"),
            heartbeat_interval_s=fields.number("heartbeat_interval_s"),
            state=fields.text("state"),
            reach=ReachReply.from_json(fields.get("reach")),
        )


class _Fields:
    """Reads one JSON object field by field; each refusal names the field."""

    def __init__(self, value: object, place: str) -> None:
        if not isinstance(value, dict):
            raise BadMessage(f"{place or 'the body'} must be a JSON object")
        self._fields: dict[str, object] = value
        self._place = f"{place}." if place else ""

    def some(self, names: Iterable[str]) -> dict[str, Any]:
        """Those of these fields that are there, unchecked."""
        return {name: self._fields[name] for name in names if self._fields.get(name) is not None}

    def all(self) -> dict[str, Any]:
        """Every field, unchecked but for their number."""
        if len(self._fields) > FACTS_MAX:
            raise BadMessage(f"{self._place.rstrip('.')} must be an object of up to {FACTS_MAX} fields")
        return self._fields

    def text(self, name: str, *, required: bool = False, most: int = TEXT_MAX) -> str:
        value = self.get(name)
        if value is None and not required:
            return ""
        if not isinstance(value, str) or len(value) > most or (required and not value):
            raise self._bad(name, f"must be a string of {1 if required else 0} to {most} characters")
        return value

    def texts(self, name: str, most: int) -> tuple[str, ...]:
        values = self.items(name, most)
        for value in values:
            if not isinstance(value, str) or len(value) > TEXT_MAX:
                raise self._bad(name, f"must hold strings of up to {TEXT_MAX} characters")
        return tuple(str(value) for value in values)

    def one_of(self, name: str, allowed: tuple[str, ...], default: str = "") -> str:
        value = self.get(name)
        if value is None and default:
            return default
        if not isinstance(value, str) or value not in allowed:
            raise self._bad(name, f"must be one of {', '.join(allowed)}")
        return value

    def number(self, name: str) -> float:
        value = self.get(name)
        if value is None:
            return 0.0
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._bad(name, "must be a number of 0 or more")
        if not math.isfinite(value) or not 0 <= value <= COUNT_MAX:
            raise self._bad(name, "must be a number of 0 or more")
        return float(value)

    def count(self, name: str) -> int:
        value = self.number(name)
        if value != int(value):
            raise self._bad(name, "must be a whole number of 0 or more")
        return int(value)

    def flag(self, name: str) -> bool:
        value = self.get(name)
        if value is not None and not isinstance(value, bool):
            raise self._bad(name, "must be true or false")
        return bool(value)

    def items(self, name: str, most: int) -> list[object]:
        value = self.get(name)
        if value is None:
            return []
        if not isinstance(value, list) or len(value) > most:
            raise self._bad(name, f"must be a list of up to {most} entries")
        return value

    def facts(self, name: str, most: int = FACTS_MAX) -> dict[str, Any]:
        value = self.get(name)
        if value is None:
            return {}
        if not isinstance(value, dict) or len(value) > most:
            raise self._bad(name, f"must be an object of up to {most} fields")
        return value

    def has(self, name: str) -> bool:
        return self.get(name) is not None

    def get(self, name: str) -> object:
        """As it stands there."""
        return self._fields.get(name)

    def _bad(self, name: str, what: str) -> BadMessage:
        return BadMessage(f"{self._place}{name} {what}")


def _uuid(text: str, name: str = "node_id") -> str:
    """The canonical form, or empty when there is none."""
    if not text:
        return ""
    try:
        return str(UUID(text))
    except ValueError:
        raise BadMessage(f"{name} must be a UUID") from None


Fields = _Fields  # messages of other modules are read by it, too
