"""Heartbeats that are to be written, and what may keep one from it: decided here from what is known of its node. Pure.

How they are written, by the batch, is `beats`'; what `gpu_status` says is `telemetry`'s.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias

import orjson

from config.postgres import Row
from nodes.control_messages import Command, Progress
from nodes.protocol import EngineReport, Heartbeat
from nodes.providers import Preferences, UnknownProvider
from nodes.reaching import NodeReach
from nodes.telemetry import telemetry_of


class NotApproved(Exception):
    """The node's provider is not approved."""


class NodeOfAnother(Exception):
    """The node id belongs to another provider."""


class NodeFenced(Exception):
    """Another agent has taken this node since: the one that asks has lost it for ever."""


class TooManyNodes(Exception):
    """The provider has as many nodes as one may have."""


class AddressOfAnother(Exception):
    """An engine of another provider has that address."""


@dataclass(frozen=True, slots=True)
class NodeLease:
    """What a node may count on after a heartbeat, and what its agent is to know."""

    epoch: int
    state: str
    wanted: str
    commands: tuple[Command, ...]  # not done yet
    preferences: Preferences
    reach: NodeReach


Engine: TypeAlias = list[Any]
"""url, state, reason, restarts, models, block_size, kv_tokens"""

Counters: TypeAlias = list[int | None]
"""prompt and completion tokens; None: never told"""


@dataclass(frozen=True, slots=True, eq=False)
class Report:
    """A heartbeat as rows. What JSON can't say is found out before it is one of many."""

    account_id: int
    node_id: str
    epoch: int
    instance: str
    is_direct: bool  # its engines are called at their own addresses
    node: str = field(repr=False)  # its row in JSON
    engines: Mapping[str, Engine] = field(repr=False)
    counters: Mapping[str, Counters] = field(repr=False)  # of those that tell them
    progress: tuple[Progress, ...] = ()

    @classmethod
    def of(
        cls, account_id: int, beat: Heartbeat, engines: Sequence[EngineReport], progress: Iterable[Progress]
    ) -> "Report":
        """Raises TypeError for what JSON can't say."""
        node = {
            "node_id": beat.node_id, "account_id": account_id, "hostname": beat.provider_hostname,
            "cached_models": beat.cached_models, "gpu_status": beat.gpu_status, "agent_version": beat.agent_version,
            "instance": beat.instance, "reach": beat.reach.mode, "advertised": beat.reach.advertise,
            "fingerprint": beat.reach.fingerprint, **asdict(telemetry_of(beat.gpu_status)),
        }  # fmt: skip
        rows = {
            engine.engine_id: [
                engine.url, engine.state, engine.reason, engine.restarts, [model.to_json() for model in engine.models],
                engine.block_size, engine.kv_tokens,
            ]
            for engine in engines
        }  # fmt: skip
        counters = {
            engine.engine_id: [engine.prompt_tokens, engine.completion_tokens] for engine in engines if engine.tells_usage
        }  # fmt: skip
        return cls(
            account_id, beat.node_id, beat.epoch, beat.instance, beat.reach.mode == "direct", orjson.dumps(node).decode(),
            rows, counters, tuple(progress),
        )  # fmt: skip


def batches_of(reports: Iterable[Report]) -> list[list[Report]]:
    """Each has a node once, in the order of ids in which rows are locked; what a node said first comes first."""
    batches: list[dict[str, Report]] = []
    for report in reports:
        batch = next((batch for batch in batches if report.node_id not in batch), None)
        if batch is None:
            batches.append(batch := {})
        batch[report.node_id] = report
    return [[batch[node_id] for node_id in sorted(batch)] for batch in batches]


def refusal(report: Report, known: Row) -> Exception | None:
    """What keeps a report from being written, as far as its node and its provider go; `known` is a row of KNOWN.

    An agent that begins (epoch 0) takes the node; the one that had it is fenced from then on.
    """
    if known["approval_status"] is None:
        return UnknownProvider()
    if known["approval_status"] != "approved":
        return NotApproved()
    if known["owner_id"] not in (None, report.account_id):
        return NodeOfAnother()
    is_its_own = report.instance in ("", known["instance"]) or not known["instance"]
    return None if is_its_own or report.epoch == 0 else NodeFenced()


def new_urls(report: Report, known: Row) -> set[str]:
    """Addresses of its engines that they did not have before. Behind an agent they are nobody else's."""
    if not report.is_direct:
        return set()
    urls = {engine[0] for engine in report.engines.values()}
    return urls - {engine[0] for engine, _ in engines_known(known).values()} if known["holds_urls"] else urls


def engines_known(row: Row) -> dict[str, tuple[Engine, Counters]]:
    """By engine_id, as they are known."""
    return {
        engine_id: (engine, counters) for engine_id, engine, counters in orjson.loads(row["engines"] or "[]")
    }
