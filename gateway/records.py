"""Where settled turns go: to the usage writer at once, to metrics and the log in batches beside the request path."""

import asyncio
import logging
from collections.abc import Callable

from billing.usage import UsageRecord
from config.metrics import Metrics

log = logging.getLogger("poolgate.turns")

BATCH_S = 0.25
"""Metrics and log lines lag this much: Prometheus reads every some seconds."""


class TurnRecords:
    """Takes each settled turn once."""

    def __init__(self, metrics: Metrics, write: Callable[[UsageRecord], None]) -> None:
        self._metrics = metrics
        self._write = write
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
        noted, self._noted = self._noted, []
        for record in noted:
            self._count(record)
        if log.isEnabledFor(logging.INFO):
            for record in noted:
                log.info("%s %s %s", record.surface, record.model, record.outcome, extra=_fields(record))

    def _count(self, record: UsageRecord) -> None:
        metrics, model = self._metrics, record.model
        metrics.turns.labels(record.surface, model, record.outcome).inc()
        metrics.duration.labels(model).observe(record.duration_ms / 1000)
        if record.ttft_ms is not None:
            metrics.first_event.labels(model).observe(record.ttft_ms / 1000)
        if record.prompt_tokens:
            cached = min(record.cached_tokens, record.prompt_tokens)  # an engine may report nonsense
            metrics.tokens.labels(model, "prompt").inc(record.prompt_tokens - cached)
            metrics.tokens.labels(model, "cached_prompt").inc(cached)
        if record.completion_tokens:
            metrics.tokens.labels(model, "completion").inc(record.completion_tokens)
        if record.amount_nano:
            metrics.charged.labels(model).inc(record.amount_nano)


def _fields(record: UsageRecord) -> dict[str, object]:
    return {
        "action": "turn",
        "request_id": f"req_{record.turn_id.hex}",
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
