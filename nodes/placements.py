"""Workers tell each other, through Valkey, where they sent prompts that were not held there.

So all have one picture of what engines hold, and the next prompt that begins alike goes to the same engine, whichever worker
gets it. It is a hint: a message that is lost, or comes too late, costs one prefill.
"""

import asyncio
import contextlib
from typing import Any

import orjson
from redis.asyncio import Redis
from redis.exceptions import RedisError

from config.defaults import Settings
from config.valkey import end_if_cancelled, listen
from nodes.registry import Registry
from nodes.routing.prefixes import ENDS

CHANNEL = "poolgate:placements:2"
"""The number stands for how hashes are made and where homes lie: workers that differ in it have nothing to tell each
other."""

LOOK_S = 1.0
"""How often a worker that has nobody to tell looks for others."""


class PlacementShare:
    """Tells what the registry's `prefixes` have as news, and learns what others tell: `[worker, [[engine, tokens,
    [hash, ...]], ...]]`."""

    def __init__(self, valkey: Redis, registry: Registry, settings: Settings, worker: str) -> None:
        self._valkey = valkey
        self._registry = registry
        self._settings = settings
        self._worker = worker
        self._alone_s = 0.0  # since others were looked for

    async def run(self) -> None:
        """Tell and learn until cancelled. That Valkey is away is told by `nodes.load`."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(listen(self._valkey, CHANNEL, self.learn), name="placements-listen")
            while True:
                await asyncio.sleep(self._settings.load_share_s)
                with contextlib.suppress(RedisError, OSError, TimeoutError):
                    await self._tell()
                end_if_cancelled()

    async def _tell(self) -> None:
        """Without others there are no news, which would take as long as the choices that they are of; but now and then it
        is looked whether others have come."""
        prefixes = self._registry.prefixes
        news = prefixes.news
        self._alone_s += self._settings.load_share_s
        if news or (not prefixes.has_others and self._alone_s >= LOOK_S):
            told = [(engine.key, tokens, hashes) for engine, hashes, tokens in news]
            news.clear()
            self._alone_s = 0.0
            prefixes.has_others = await self._valkey.publish(CHANNEL, orjson.dumps([self._worker, told])) > 1

    def learn(self, message: bytes) -> None:
        """What stands in it may come from another version, or from anybody: nonsense counts as nothing."""
        try:
            worker, told = orjson.loads(message)
        except (ValueError, TypeError):
            return
        if worker == self._worker or not isinstance(told, list):
            return
        for row in told:
            if _is_placement(row):
                key, tokens, hashes = row
                engine = self._registry.engine(key)
                if engine is not None:
                    self._registry.prefixes.learn(engine, hashes, tokens)


def _is_placement(row: Any) -> bool:
    return (
        isinstance(row, list)
        and list(map(type, row)) == [str, int, list]
        and 0 < len(row[2]) <= len(ENDS)
        and all(type(value) is int for value in row[2])
        and 0 <= row[1] < 2**32
    )
