"""What the agent knows of one engine, and the word to the reporter when its state changes.

Whoever runs or watches the engine writes it; the reporter reads it.
"""

import logging
from collections.abc import Callable

from nodes.agent.metrics import EngineMetrics
from nodes.protocol import FAILED, REASON_MAX, STARTING, STOPPED, EngineLoad, EngineReport, ModelInfo

log = logging.getLogger("poolgate.agent")


class Slot:
    """A place for an engine: the id stays while engines in it come and go."""

    def __init__(
        self,
        engine_id: str,
        url: str,
        changed: Callable[[], None],
        failed: Callable[[str, str], None] | None = None,
    ) -> None:
        """`changed()` when the gateway should know more; `failed(engine_id, reason)` at each failure."""
        self.engine_id = engine_id
        self.url = url
        self.state = STARTING
        self.reason = ""
        self.restarts = 0
        self.models: tuple[ModelInfo, ...] = ()
        self.metrics: EngineMetrics | None = None
        self._changed = changed
        self._failed = failed
        self.used_s = 0.0  # monotonic time at which it last had a turn

    def __repr__(self) -> str:
        return f"<Slot {self.engine_id} {self.state} {self.url} restarts={self.restarts}>"

    def move(self, state: str, reason: str = "") -> None:
        """Enter `state`; says so in the log and to the reporter if it is news."""
        reason = reason[-REASON_MAX:]  # the end of an engine's last words tells most
        if (state, reason) == (self.state, self.reason):
            return
        is_news = state != self.state
        self.state, self.reason = state, reason
        if state != "ready":
            self.metrics = None
        level = logging.WARNING if state == FAILED else logging.INFO
        log.log(
            level,
            "engine %s is %s%s",
            self.engine_id,
            state,
            f": {reason}" if reason else "",
            extra={"action": f"engine_{state}", "engine": self.engine_id},
        )
        if is_news or state == STOPPED:
            self._changed()
        if state == FAILED and is_news and self._failed is not None:
            self._failed(self.engine_id, reason)

    def learn_models(self, models: tuple[ModelInfo, ...]) -> None:
        if models != self.models:
            self.models = models
            self._changed()

    @property
    def load(self) -> EngineLoad:
        return self.metrics.load if self.metrics is not None else EngineLoad()

    def report(self) -> EngineReport:
        return EngineReport(
            engine_id=self.engine_id,
            url=self.url,
            state=self.state,
            reason=self.reason,
            restarts=self.restarts,
            models=self.models,
            block_size=self.metrics.block_size if self.metrics is not None else 0,
            kv_tokens=self.metrics.kv_tokens if self.metrics is not None else 0,
            prompt_tokens=self.metrics.prompt_tokens if self.metrics is not None else None,
            completion_tokens=self.metrics.completion_tokens if self.metrics is not None else None,
        )
