"""Turns for a model that no engine serves but some node has on disk: one node is asked to load it, and they wait for that.

They wait before anything is held for them. Loading is the agent's work; `wish` is how it is asked.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

from redis.asyncio import Redis

from config.changes import wake_feeds
from config.defaults import Settings
from config.metrics import Metrics
from config.postgres import AWAY
from gateway.errors import NoNodeAvailable
from nodes.commands import CommandStore, TooManyCommands, UnknownNode
from nodes.registry import Registry
from nodes.routing.snapshot import Snapshot
from nodes.wishes import WISH_KEPT_S, WishStore

log = logging.getLogger("poolgate.nodes")

RENEW_S = 10.0
"""A wish is renewed this often while turns wait: well within the time that it is kept."""

Wish = Callable[[str, Sequence[str]], Awaitable[str | None]]
"""Has one of these nodes load the model; None: none of them can."""


async def wish_by_command(
    wishes: WishStore, commands: CommandStore, valkey: Redis, model: str, nodes: Sequence[str]
) -> str | None:
    """`Wish`: the node that is asked gets a command, which its agent hears of at once; the same one is not given twice."""
    node = await wishes.wish(model, nodes)
    if node is None:
        return None
    try:
        await commands.send(node, "preload_model", {"model_name": model}, expires_s=WISH_KEPT_S)
    except (UnknownNode, TooManyCommands):
        return None
    await wake_feeds(valkey)
    return node


class ModelNotLoaded(NoNodeAvailable):
    """No node serves this model right now, but one could be started for it. Try again shortly."""


class ModelStarts:
    """The models that one worker's turns wait for."""

    def __init__(self, settings: Settings, *, registry: Registry, wish: Wish, metrics: Metrics) -> None:
        self._settings = settings
        self._registry = registry
        self._wish = wish
        self._metrics = metrics
        self._waiting: dict[str, set[asyncio.Future[bool]]] = {}
        self._asking: dict[str, asyncio.Task[None]] = {}
        registry.on_change.append(self._changed)

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def can_start(self, model: str) -> bool:
        """Whether a node that is online has it on disk and nobody serves it."""
        snapshot = self._registry.snapshot
        return model in snapshot.cached and model not in snapshot.by_model

    async def wait(self, model: str) -> None:
        """Until an engine serves it. Raises ModelNotLoaded where that takes too long or too many wait."""
        if len(self) >= self._settings.model_start_waiting_max:
            self._metrics.model_starts.labels("refused").inc()
            raise self._refusal()
        is_loaded: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        waiting = self._waiting.setdefault(model, set())
        waiting.add(is_loaded)
        if model not in self._asking:
            self._asking[model] = asyncio.create_task(self._ask(model), name=f"start {model}")
        result = "left"
        try:
            async with asyncio.timeout(self._settings.model_start_wait_s):
                result = "served" if await is_loaded else "refused"
        except TimeoutError:
            result = "expired"
        finally:
            waiting.discard(is_loaded)
            if not waiting:
                self._stop_asking(model)
            self._metrics.model_starts.labels(result).inc()
        if result != "served":
            raise self._refusal()

    def _refusal(self) -> ModelNotLoaded:
        return ModelNotLoaded(retry_after_s=max(1, round(self._settings.heartbeat_interval_s)))

    async def _ask(self, model: str) -> None:
        """Wish for it, again and again while turns wait."""
        told = ""
        while True:
            try:
                node = await self._wish(model, self._registry.snapshot.cached.get(model, ()))
            except AWAY as error:
                log.warning(
                    "no node can be asked for %s: %s", model, error or type(error).__name__,
                    extra={"action": "model_not_wished"},
                )  # fmt: skip
            else:
                if node is None:
                    self._end(model, is_loaded=False)
                    return
                if node != told:
                    told = node
                    log.info(
                        "node %s is to load %s", node, model, extra={"action": "model_wished", "node": node}
                    )
            await asyncio.sleep(RENEW_S)

    def _stop_asking(self, model: str) -> None:
        self._waiting.pop(model, None)
        task = self._asking.pop(model, None)
        if task is not None and task is not asyncio.current_task():
            task.cancel()

    def _changed(self, snapshot: Snapshot) -> None:
        for model in [model for model in self._waiting if model in snapshot.by_model]:
            self._end(model, is_loaded=True)

    def _end(self, model: str, *, is_loaded: bool) -> None:
        for future in self._waiting.get(model, ()):
            if not future.done():
                future.set_result(is_loaded)
