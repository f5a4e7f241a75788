"""Prometheus metrics of one process, merged over all workers when they are read.

prometheus_client keeps each process's values in files of a shared folder (its multiprocess mode), so that any
worker can answer for all. What is counted when is its owner's business; on the request path nothing here is
called.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest, multiprocess

FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
"""From an answer out of a warm cache to the longest answer that a client waits for."""


def prepare_folder(folder: Path) -> None:
    """Empty `folder` and make it the place of this process's children's metrics. Before they start."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    for stale in folder.glob("*.db"):
        stale.unlink(missing_ok=True)
    os.environ[FOLDER_VARIABLE] = str(folder)


def forget_process(pid: int) -> None:
    """A worker is dead: its gauges end, its counters stay."""
    multiprocess.mark_process_dead(pid)  # type: ignore[no-untyped-call]


class Histogram(prometheus_client.Histogram):
    """One that also takes what was counted elsewhere."""

    def add(self, counts: Sequence[int], total: float) -> None:
        """As many observations in each bucket, the one above all bounds the last; `total` is their sum."""
        for bucket, count in zip(self._buckets, counts, strict=True):
            if count:
                bucket.inc(count)
        self._sum.inc(total)


class Metrics:
    """Every metric of the gateway, in one place; one object a process."""

    def __init__(self) -> None:
        into = self._registry = CollectorRegistry()
        self.turns = Counter(
            "poolgate_turns", "Turns by how they ended", ["route", "model", "outcome"], registry=into
        )
        self.tokens = Counter(
            "poolgate_tokens", "Tokens delivered and charged", ["model", "kind"], registry=into
        )
        self.charged = Counter(
            "poolgate_charged_nano", "Charged, 1e-9 of the currency's major unit", ["model"], registry=into
        )
        self.first_event = Histogram(
            "poolgate_first_event_seconds",
            "From admission to the engine's first event",
            ["model"],
            buckets=SECONDS,
            registry=into,
        )
        self.duration = Histogram(
            "poolgate_turn_seconds", "From admission to settlement", ["model"], buckets=SECONDS, registry=into
        )
        self.refusals = Counter(
            "poolgate_refusals", "Requests refused, by error code", ["code"], registry=into
        )
        self.in_flight = Gauge(
            "poolgate_turns_in_flight", "Turns in flight", multiprocess_mode="livesum", registry=into
        )
        self.usage_pending = Gauge(
            "poolgate_usage_pending",
            "Settled turns in journals that wait for PostgreSQL",
            multiprocess_mode="livesum",
            registry=into,
        )
        self.journal_bytes = Gauge(
            "poolgate_journal_bytes",
            "Size of what waits in journals",
            multiprocess_mode="livesum",
            registry=into,
        )
        self.quarantined = Counter(
            "poolgate_usage_quarantined", "Records that PostgreSQL refused; a person must look", registry=into
        )
        self.platform_loss = Counter(
            "poolgate_platform_loss_nano",
            "Delivered beyond what was held for it, by the node that produced it",
            ["node"],
            registry=into,
        )
        self.lease_requests = Counter(
            "poolgate_lease_requests",
            "Requests to PostgreSQL for a part of a wallet or budget (granted, refused, failed)",
            ["result"],
            registry=into,
        )
        self.leases = Gauge(
            "poolgate_leases",
            "Accounts of which a process has a lease",
            multiprocess_mode="livesum",
            registry=into,
        )
        self.limited = Counter(
            "poolgate_limited", "Requests over a rate limit, by limit", ["limit"], registry=into
        )
        self.limits_local = Counter(
            "poolgate_limits_local",
            "Limited requests decided by a process's own share because Valkey was away",
            registry=into,
        )
        self.idempotent = Counter(
            "poolgate_idempotent_requests",
            "Requests with an Idempotency-Key (first, repeated, running, conflict, rerun, lost)",
            ["outcome"],
            registry=into,
        )
        self.nodes_online = Gauge(
            "poolgate_nodes_online", "Nodes online", multiprocess_mode="livemax", registry=into
        )
        self.engines_ready = Gauge(
            "poolgate_engines_ready", "Engines ready for turns", multiprocess_mode="livemax", registry=into
        )
        self.breakers_open = Gauge(
            "poolgate_breakers_open",
            "Engines that a worker sends no turns to",
            multiprocess_mode="livemax",
            registry=into,
        )

    def render(self) -> bytes:
        """Prometheus' text format: over all workers where they share a folder, else of this process."""
        if not os.environ.get(FOLDER_VARIABLE):
            return generate_latest(self._registry)
        registry = CollectorRegistry()
        multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return generate_latest(registry)
