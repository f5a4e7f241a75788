"""The whole system with a real engine, as a user starts it, and what its stores and its engine say of themselves.

Starting and stopping is `tests.fakes.up`; what should hold is said by the tests.
"""

import asyncio
import re
import time
import urllib.request
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import asyncpg
import psutil

from config.embedded import embedded_urls
from tests.fakes.processes import eventually
from tests.fakes.up import Up

MODEL = "smollm2-135m"
KEY = "sk-test-of-the-real-engine"
CHUNK_TIMEOUT_S = 10.0

# 25 s on an idle machine of two cores; several times that beside other work.
START_BOUND_S = 240.0


@dataclass(frozen=True, slots=True)
class Row:
    """One settled turn, as PostgreSQL has it."""

    surface: str
    stream: bool
    outcome: str
    status: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    estimated: bool
    node_id: str | None
    ttft_ms: int | None
    amount_nano: int

    @property
    def tokens(self) -> tuple[int, int]:
        """Prompt and completion."""
        return self.prompt_tokens, self.completion_tokens


@dataclass(frozen=True, slots=True)
class EngineRow:
    """One engine, as it was last reported to the gateway."""

    node_id: str
    url: str
    state: str
    restarts: int

    def metric(self, name: str) -> float:
        """The engine's own word on itself, summed over labels; `name` is without its `vllm:`."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as answer:
            text = answer.read().decode()
        values = re.findall(rf"^vllm:{name}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)
        assert values, f"the engine has no metric vllm:{name}"
        return sum(map(float, values))

    def is_idle(self) -> bool:
        return self.metric("num_requests_running") == 0 and self.metric("num_requests_waiting") == 0

    def server(self) -> psutil.Process:
        """vLLM's API server: the process that listens where the row says, and not its watchdog."""
        port = self.url.rsplit(":", 1)[1]
        return next(
            process
            for process in psutil.process_iter()
            if "vllm.entrypoints.cli.main" in (words := _words(process))
            and port in words
            and not any("watchdog.py" in word for word in words)
        )


class System:
    """`poolgate up` that serves the real model. Times are of this machine's clock, in unix seconds."""

    def __init__(self, up: Up) -> None:
        self.up = up

    @property
    def base_url(self) -> str:
        return self.up.base_url

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {KEY}"}

    def rows(self, since: float, turns: int = 1) -> list[Row]:
        """The turns that began after `since`, in their order: exactly `turns`, once they are written."""

        def enough() -> list[Row]:
            found = self.rows_so_far(since)
            return found if len(found) >= turns else []

        found = eventually(enough)
        assert len(found) == turns, found
        return found

    def row(self, since: float) -> Row:
        (found,) = self.rows(since)
        return found

    def rows_so_far(self, since: float) -> list[Row]:
        """What is written by now of the turns that began after `since`."""
        found = self.ask(
            "select surface, stream, outcome, status, prompt_tokens, cached_tokens, completion_tokens, estimated,"
            " node_id, ttft_ms, amount_nano from usage where started_at >= $1 order by started_at, turn_id",
            datetime.fromtimestamp(since, UTC),
        )
        return [Row(**row) for row in found]

    def engines(self) -> list[EngineRow]:
        """Every engine of the pool that was not stopped, the longest known node's first."""
        found = self.ask(
            "select e.node_id::text, e.url, e.state, e.restarts from engines e join nodes n on n.id = e.node_id"
            " where e.state <> 'stopped' order by n.created_at"
        )
        return [EngineRow(**row) for row in found]

    @property
    def engine(self) -> EngineRow:
        (only,) = self.engines()
        return only

    def await_ready(self, engines: int = 1) -> list[EngineRow]:
        """Wait until so many engines are ready."""

        def ready() -> list[EngineRow]:
            found = self.engines()
            return found if [engine.state for engine in found] == ["ready"] * engines else []

        return eventually(ready, within_s=START_BOUND_S)

    def ask(self, query: str, *values: object) -> list[dict[str, Any]]:
        """Rows of a query on the system's own PostgreSQL."""

        async def fetch() -> list[dict[str, Any]]:
            connection = await asyncpg.connect(embedded_urls(self.up.folder)[0])
            try:
                return [dict(row) for row in await connection.fetch(query, *values)]
            finally:
                await connection.close()

        return asyncio.run(fetch())


def now() -> float:
    """The time to count turns from."""
    return time.time()


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
