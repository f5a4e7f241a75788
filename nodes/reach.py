"""How a gateway gets to an engine: straight to its address, by its agent's listener, or by the tunnel that the agent opened.

Pure. Who opens connections that way is `gateway.reach`; which way a node has is in its rows (`nodes.reaching`).
"""

import re
from dataclasses import dataclass
from typing import TypeAlias

DIRECT, LISTENER, TUNNEL, NONE = "direct", "listener", "tunnel", "none"
"""The ways by name, as agents are told."""

ENGINE_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
"""What an engine behind its agent may be called: it stands in headers."""


@dataclass(frozen=True, slots=True)
class Direct:
    """Plain HTTP to an address in the operator's networks."""

    host: str
    port: int


@dataclass(frozen=True, slots=True)
class Listener:
    """TLS to the agent's listener, which proved to have the node's token behind a certificate of this SHA-256."""

    host: str
    port: int
    fingerprint: str
    account_id: int
    node_id: str
    engine_id: str


@dataclass(frozen=True, slots=True)
class Tunnelled:
    """The node's tunnel, which ends in the gateway worker that takes hops at `worker` (host:port)."""

    node_id: str
    engine_id: str
    worker: str


Reach: TypeAlias = Direct | Listener | Tunnelled


def reach_behind_agent(
    account_id: int, node_id: str, engine_id: str, *, listener: tuple[str, int, str] | None, tunnel: str
) -> Listener | Tunnelled | None:
    """The way to an engine behind its agent: the listener (host, port, fingerprint), which is every worker's own, else the
    tunnel that ends in the worker `tunnel`; None without either."""
    if ENGINE_ID.fullmatch(engine_id) is None:
        return None
    if listener is not None:
        host, port, fingerprint = listener
        return Listener(host, port, fingerprint, account_id, node_id, engine_id)
    return Tunnelled(node_id, engine_id, tunnel) if tunnel else None
