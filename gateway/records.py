"""Where settled turns go: into the journal at once, to metrics and the log in batches beside the request path."""

import asyncio
import logging
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Final

from billing.usage import UsageRecord
from config.lines import digits
from config.logs import Bulk, Shape, bulk
from config.metrics import SECONDS, Metrics
from gateway.turn import ID_PREFIX

log = logging.getLogger("poolgate.turns")

BATCH_S = 0.1
"""Metrics and log lines lag this much. A batch takes 3 µs a turn in one go, which turns that come meanwhile wait for."""

BOUNDS_MS: Final = tuple(round(bound * 1000) for bound in SECONDS)

LINE: Final = Shape(
    log.name,
    logging.INFO,
    "turn",
    (
        "request_id", "account_id", "key_id", "engine", "status", "prompt_tokens", "cached_tokens",
        "completion_tokens", "ttft_ms", "duration_ms", "amount_nano",
    ),
    frozenset({"request_id", "engine"}),
)  # fmt: skip


class TurnRecords:
    """Takes each settled turn once."""

    def __init__(
        self, metrics: Metrics, write: Callable[[UsageRecord], None],
        tally: Callable[[Sequence[UsageRecord]], None] | None = None,
    ) -> None:  # fmt: skip
        """`tally` also hears of each batch."""
        self._metrics = metrics
        self._write = write
        self._tally = tally
        self._noted: list[UsageRecord] = []

    def add(self, record: UsageRecord) -> None:
        """Memory only; called when a turn is settled."""
        self._write(record)
        self._noted.append(record)

    async def run(self) -> None:
        """Note batches until cancelled."""
        while True:
            await asyncio.sleep(BATCH_S)
            self.flush()

    def flush(self) -> None:
        """Count and log what was settled since."""
        if not self._noted:
            return
        noted, self._noted = self._noted, []
        self._count(noted)
        if self._tally is not None:
            self._tally(noted)
        if log.isEnabledFor(LINE.level):
            lines = bulk(LINE)
            if lines is None:
                _log_each(noted)
            else:
                _log_together(noted, lines)

    def _count(self, noted: Sequence[UsageRecord]) -> None:
        """Metrics take the sums of a batch: each touch of one looks up its labels, locks and asks for the process id."""
        metrics = self._metrics
        turns: dict[tuple[str, str, str], int] = {}
        sums: dict[str, Sums] = {}
        for record in noted:
            model = record.model
            names = (record.surface, model, record.outcome)
            turns[names] = turns.get(names, 0) + 1
            sum_ = sums.get(model)
            if sum_ is None:
                sum_ = sums[model] = Sums()
            sum_.add(record)
            if record.loss_nano:
                metrics.platform_loss.labels(record.node_id).inc(record.loss_nano)
        for names, count in turns.items():
            metrics.turns.labels(*names).inc(count)
        for model, sum_ in sums.items():
            sum_.count(metrics, model)


class Sums:
    """What the turns of one model in one batch come to."""

    __slots__ = (
        "amount_nano",
        "cached",
        "completion",
        "duration",
        "duration_ms",
        "first_event",
        "prompt",
        "ttft_ms",
    )

    def __init__(self) -> None:
        self.prompt = self.cached = self.completion = self.amount_nano = self.duration_ms = self.ttft_ms = 0
        self.duration = [0] * (len(BOUNDS_MS) + 1)
        self.first_event = [0] * (len(BOUNDS_MS) + 1)

    def add(self, record: UsageRecord) -> None:
        """One turn more."""
        self.prompt += record.prompt_tokens
        self.cached += record.cached_tokens
        self.completion += record.completion_tokens
        self.amount_nano += record.amount_nano
        duration_ms, ttft_ms = record.duration_ms, record.ttft_ms
        self.duration_ms += duration_ms
        self.duration[bisect_left(BOUNDS_MS, duration_ms)] += 1
        if ttft_ms is not None:
            self.ttft_ms += ttft_ms
            self.first_event[bisect_left(BOUNDS_MS, ttft_ms)] += 1

    def count(self, metrics: Metrics, model: str) -> None:
        """Into the metrics."""
        tokens = {
            "prompt": self.prompt - self.cached,
            "cached_prompt": self.cached,
            "completion": self.completion,
        }
        for kind, count in tokens.items():
            if count:
                metrics.tokens.labels(model, kind).inc(count)
        if self.amount_nano:
            metrics.charged.labels(model).inc(self.amount_nano)
        metrics.duration.labels(model).add(self.duration, self.duration_ms / 1000)
        metrics.first_event.labels(model).add(self.first_event, self.ttft_ms / 1000)


def _log_together(noted: Sequence[UsageRecord], lines: Bulk) -> None:
    shown, null = lines.shown, lines.null
    rows: list[list[str]] = []
    for record in noted:
        ttft_ms = record.ttft_ms
        rows.append([
            shown[f"{record.surface} {record.model} {record.outcome}"], ID_PREFIX + record.turn_id,
            digits(record.account_id), digits(record.key_id), shown[f"{record.node_id}/{record.engine_id}"],
            digits(record.status), digits(record.prompt_tokens), digits(record.cached_tokens),
            digits(record.completion_tokens), null if ttft_ms is None else digits(ttft_ms), digits(record.duration_ms),
            digits(record.amount_nano),
        ])  # fmt: skip
    lines.write(rows)


def _log_each(noted: Sequence[UsageRecord]) -> None:
    for record in noted:
        extras = {
            "action": LINE.action,
            "request_id": ID_PREFIX + record.turn_id,
            "account_id": record.account_id,
            "key_id": record.key_id,
            "engine": f"{record.node_id}/{record.engine_id}",
            "status": record.status,
            "prompt_tokens": record.prompt_tokens,
            "cached_tokens": record.cached_tokens,
            "completion_tokens": record.completion_tokens,
            "ttft_ms": record.ttft_ms,
            "duration_ms": record.duration_ms,
            "amount_nano": record.amount_nano,
        }
        log.log(LINE.level, "%s %s %s", record.surface, record.model, record.outcome, extra=extras)
