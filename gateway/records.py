"""Where settled turns go: into the journal at once, to metrics and the log in batches beside the request path."""

import asyncio
import logging
from collections import Counter
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
        self._count(noted)
        if log.isEnabledFor(logging.INFO):
            for record in noted:
                log.info("%s %s %s", record.surface, record.model, record.outcome, extra=_fields(record))

    def _count(self, noted: list[UsageRecord]) -> None:
        """Counters take the sums of a batch: each touch of one looks up its labels, locks and asks for the process id."""
        metrics = self._metrics
        turns: Counter[tuple[str, str, str]] = Counter()
        tokens: Counter[tuple[str, str]] = Counter()
        charged: Counter[str] = Counter()
        for record in noted:
            model = record.model
            turns[record.surface, model, record.outcome] += 1
            tokens[model, "prompt"] += record.prompt_tokens - record.cached_tokens
            tokens[model, "cached_prompt"] += record.cached_tokens
            tokens[model, "completion"] += record.completion_tokens
            charged[model] += record.amount_nano
            if record.loss_nano:
                metrics.platform_loss.labels(record.node_id).inc(record.loss_nano)
        for names, count in turns.items():
            metrics.turns.labels(*names).inc(count)
        for kind, count in tokens.items():
            if count:
                metrics.tokens.labels(*kind).inc(count)
        for model, amount_nano in charged.items():
            if amount_nano:
                metrics.charged.labels(model).inc(amount_nano)
            of_model = [record for record in noted if record.model == model]
            duration, first_event = metrics.duration.labels(model), metrics.first_event.labels(model)
            for record in of_model:
                duration.observe(record.duration_ms / 1000)
                if record.ttft_ms is not None:
                    first_event.observe(record.ttft_ms / 1000)


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
