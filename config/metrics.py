"""Prometheus metrics of one process, merged over all workers when they are read.

prometheus_client keeps each process's values in files of a shared folder (its multiprocess mode), so that any
worker can answer for all. What is counted when is its owner's business; on the request path nothing here is
called.
"""

import asyncio
import fcntl
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest, multiprocess
from prometheus_client.mmap_dict import MmapedDict

FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_THE_DEAD = 0
"""Stands for the process id in the files of those that have ended; no process has it."""

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
"""From an answer out of a warm cache to the longest answer that a client waits for."""


def prepare_folder(folder: Path) -> None:
    """Empty `folder` and make it the place of this process's children's metrics. Before they start."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    for stale in folder.glob("*.db"):
        stale.unlink(missing_ok=True)
    os.environ[FOLDER_VARIABLE] = str(folder)


def forget_process(pid: int) -> None:
    """A worker is dead: its gauges end, and what it counted is added to what the dead before it had.

    Else each reload would leave files behind that every later reader has to add up.
    """
    folder = Path(os.environ[FOLDER_VARIABLE])
    with _locked(folder, fcntl.LOCK_EX):
        multiprocess.mark_process_dead(pid)  # type: ignore[no-untyped-call]
        for kind in ("counter", "histogram"):
            _fold(folder / f"{kind}_{pid}.db", folder / f"{kind}_{_THE_DEAD}.db")


def merged() -> bytes:
    """Prometheus' text format over all workers, living and dead. It takes 6 ms for 8 workers with few models."""
    folder = Path(os.environ[FOLDER_VARIABLE])
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    with _locked(folder, fcntl.LOCK_SH):
        return generate_latest(registry)


class Shared:
    """What `render` returns, made in a thread; those who ask while it is being made get the same."""

    def __init__(self, render: Callable[[], bytes]) -> None:
        self._render = render
        self._under_way: asyncio.Task[bytes] | None = None

    async def __call__(self) -> bytes:
        if self._under_way is None or self._under_way.done():
            self._under_way = asyncio.create_task(asyncio.to_thread(self._render))
        return await asyncio.shield(self._under_way)


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
        self.usage_differences = Counter(
            "poolgate_usage_difference_tokens",
            "Tokens by which engines' own counts and what was relayed from them differ beyond what is usual",
            ["kind", "direction"],
            registry=into,
        )
        self.queue_waiting = Gauge(
            "poolgate_queue_waiting",
            "Turns that wait because every engine is full",
            multiprocess_mode="livesum",
            registry=into,
        )
        self.queue_turns = Counter(
            "poolgate_queue_turns",
            "Turns that had to wait, by what became of them (served, expired, refused, left)",
            ["result"],
            registry=into,
        )
        self.queue_wait = Histogram(
            "poolgate_queue_wait_seconds", "How long they waited", buckets=SECONDS, registry=into
        )
        self.model_starts = Counter(
            "poolgate_model_starts",
            "Turns that waited for a model to be loaded, by what became of them (served, expired, refused, left)",
            ["result"],
            registry=into,
        )
        self.nodes_online = Gauge(
            "poolgate_nodes_online", "Nodes online", multiprocess_mode="livemax", registry=into
        )
        self.engines_ready = Gauge(
            "poolgate_engines_ready", "Engines ready for turns", multiprocess_mode="livemax", registry=into
        )
        self.tunnels = Gauge(
            "poolgate_tunnels", "Agents' tunnels that are open", multiprocess_mode="livesum", registry=into
        )
        self.breakers_open = Gauge(
            "poolgate_breakers_open",
            "Engines that a worker sends no turns to",
            multiprocess_mode="livemax",
            registry=into,
        )

        self.rendered = Shared(self.render)

    def render(self) -> bytes:
        """Prometheus' text format: over all workers where they share a folder, else of this process."""
        return merged() if os.environ.get(FOLDER_VARIABLE) else generate_latest(self._registry)


@contextmanager
def _locked(folder: Path, how: int) -> Iterator[None]:
    """Readers share it; whoever moves counts from one file into another has it alone, or some would be read twice."""
    with (folder / "lock").open("ab") as file:
        fcntl.flock(file, how)
        yield


def _fold(source: Path, into: Path) -> None:
    if not source.exists():
        return
    total = MmapedDict(str(into))  # type: ignore[no-untyped-call]
    for key, value, _, _ in MmapedDict.read_all_values_from_file(str(source)):  # type: ignore[no-untyped-call]
        before, _ = total.read_value(key)  # type: ignore[no-untyped-call]
        total.write_value(key, before + value, 0.0)  # type: ignore[no-untyped-call]
    total.close()  # type: ignore[no-untyped-call]
    source.unlink()
