"""The messages of the control websocket between an agent and its gateway, as objects and as JSON.

Up go load, and what became of commands; down come commands, what is wanted of the node, and word that the lease goes on.
A message of the other side is checked here and never trusted. Each is one JSON object with a `type`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nodes.protocol import ENGINES_MAX, REASON_MAX, BadMessage, EngineLoad, Fields

CONTROL_PATH = "/api/providers/control"
NODE_HEADER, INSTANCE_HEADER = "x-poolgate-node", "x-poolgate-instance"

MESSAGE_BYTES_MAX = 64 * 1024
"""A load of 64 engines has 8 KB; nothing else comes near."""

COMMANDS_MAX = 32
"""Commands of one node that are not done yet: more are refused, since something is wrong with the node or its admin."""

FENCED, REFUSED, NOT_UNDERSTOOD, GOING_AWAY = 4409, 4403, 4400, 1001
"""Close codes: another agent has this node; the key or its account may not any more; no message; the worker ends."""

SERVE, PAUSE, DRAIN = "serve", "pause", "drain"
WANTED = (SERVE, PAUSE, DRAIN)
"""What is wanted of a node. `pause`: no new turns, engines stay loaded; `drain`: engines end once their turns have."""

QUEUED, DOWNLOADING, LOADING, DONE, FAILED = "queued", "downloading", "loading", "done", "failed"
PROGRESS = (QUEUED, DOWNLOADING, LOADING, DONE, FAILED)
ENDS = (DONE, FAILED)

ARGUMENTS: Mapping[str, tuple[str, ...]] = {
    "preload_model": ("model_name",),
    "start_engine": ("engine_id",),
    "stop_engine": ("engine_id",),
    "restart_engine": ("engine_id",),
    "sleep_engine": ("engine_id",),
    "wake_engine": ("engine_id",),
    "load_lora": ("engine_id", "adapter"),
    "unload_lora": ("engine_id", "adapter"),
    "update": (),
}
"""Every command with its arguments. What is wanted of a node (`WANTED`) is a state, and no command."""


@dataclass(frozen=True, slots=True)
class Command:
    """One thing to do once. `id` names it for ever; 0 where a gateway of the contract asks by `preload_model` alone."""

    id: int
    name: str
    arguments: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {"type": "command", "id": self.id, "name": self.name, "arguments": dict(self.arguments)}

    @classmethod
    def from_json(cls, value: object) -> "Command":
        """Raises BadMessage, also for an argument that is missing or not known."""
        fields = Fields(value, "command")
        name = fields.one_of("name", tuple(ARGUMENTS))
        given = Fields(fields.facts("arguments"), "arguments")
        arguments = {argument: given.text(argument, required=True) for argument in ARGUMENTS[name]}
        if set(fields.facts("arguments")) - set(arguments):
            raise BadMessage(f"arguments of {name} are {', '.join(ARGUMENTS[name]) or 'none'}")
        return cls(fields.count("id"), name, arguments)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a command has come; `percent` of a download, `detail` for people."""

    id: int
    status: str
    percent: int = 0
    detail: str = ""

    @property
    def has_ended(self) -> bool:
        return self.status in ENDS

    def to_json(self) -> dict[str, Any]:
        return {
            "type": "progress", "id": self.id, "status": self.status, "percent": self.percent,
            "detail": self.detail,
        }  # fmt: skip

    @classmethod
    def from_json(cls, value: object) -> "Progress":
        fields = Fields(value, "progress")
        return cls(
            id=fields.count("id"),
            status=fields.one_of("status", PROGRESS),
            percent=min(100, fields.count("percent")),
            detail=fields.text("detail", most=REASON_MAX),
        )


def load_message(loads: Mapping[str, EngineLoad]) -> dict[str, Any]:
    """Sent each second."""
    return {"type": "load", "engines": {engine_id: load.to_json() for engine_id, load in loads.items()}}


def read_loads(value: object) -> dict[str, EngineLoad]:
    engines = Fields(value, "load").facts("engines", ENGINES_MAX)
    return {engine_id: EngineLoad.from_json(load) for engine_id, load in engines.items()}


def wanted_message(wanted: str) -> dict[str, Any]:
    """Sent first on every connection, and whenever it changes."""
    return {"type": "wanted", "wanted": wanted}


def read_wanted(value: object) -> str:
    return Fields(value, "wanted").one_of("wanted", WANTED, SERVE)


LEASE_MESSAGE: Mapping[str, str] = {"type": "lease"}
"""The gateway hears the agent: its lease begins anew, also while heartbeats can't be written down."""
