"""Load that other workers put on engines, and what engines last said of themselves, shared through Valkey.

Each worker writes its own turns in flight and reads the others'. Without Valkey it knows only its own, which is enough to
serve; a worker that stopped writing is forgotten after a few periods, by our own clock: clocks elsewhere may jump.
"""

import asyncio
import logging
from typing import Any

import orjson
from redis.asyncio import Redis
from redis.exceptions import RedisError

from config.defaults import Settings
from nodes.registry import Registry

log = logging.getLogger("poolgate.load")

IN_FLIGHT = "poolgate:in-flight"
REPORTED = "poolgate:reported"

STALE_PERIODS = 10
"""Periods after which a worker that wrote nothing new counts as gone."""

KEPT_S = 60
"""The hashes vanish this long after the last writer."""

REPORT_FRESH_S = 5.0
"""Age past which an engine's own report says nothing any more: turns last seconds, heartbeats are far apart."""

AWAY_PAUSE_S = 1.0
"""Pause after Valkey did not answer."""


class LoadShare:
    """Reads and writes the two hashes; `report` is for the worker that got a heartbeat."""

    def __init__(self, valkey: "Redis", registry: Registry, settings: Settings, worker: str) -> None:
        self._valkey = valkey
        self._registry = registry
        self._settings = settings
        self._worker = worker
        self._sequence = 0
        self._seen: dict[str, tuple[int, float]] = {}
        self._reports: dict[str, tuple[dict[str, Any], float]] = {}
        self._is_up = True

    async def report(self, loads: dict[str, dict[str, Any]]) -> None:
        """What engines said of themselves, by engine key; for every worker."""
        self._take_reported(loads)
        if loads:
            try:
                await self._valkey.hset(
                    REPORTED, mapping={key: orjson.dumps(load) for key, load in loads.items()}
                )
            except (RedisError, OSError, TimeoutError):
                log.debug("load is not shared", extra={"action": "load_not_shared"})

    async def run(self) -> None:
        """Share until cancelled."""
        while True:
            pause_s = self._settings.load_share_s
            try:
                await self._share()
                if not self._is_up:
                    log.info("load is shared again", extra={"action": "load_shared"})
                self._is_up = True
            except (RedisError, OSError, TimeoutError) as error:
                if self._is_up:
                    log.warning("load is not shared: %s", error, extra={"action": "load_not_shared"})
                self._is_up = False
                self._spread({})
                pause_s = max(pause_s, AWAY_PAUSE_S)
            await asyncio.sleep(pause_s)

    async def _share(self) -> None:
        self._sequence += 1
        mine = {
            engine.key: (engine.load.turns, engine.load.tokens)
            for engine in self._registry.snapshot.engines
            if engine.load.turns
        }
        async with self._valkey.pipeline(transaction=False) as batch:
            batch.hset(
                IN_FLIGHT, self._worker, orjson.dumps({"sequence": self._sequence, "load": mine}).decode()
            )
            batch.expire(IN_FLIGHT, KEPT_S)
            batch.expire(REPORTED, KEPT_S)
            batch.hgetall(IN_FLIGHT)
            batch.hgetall(REPORTED)
            *_, workers, reported = await batch.execute()
        self._spread(self._others(workers))
        self._take_reported({key.decode(): orjson.loads(load) for key, load in reported.items()})

    def _others(self, workers: dict[bytes, bytes]) -> dict[str, tuple[int, int]]:
        """Turns and tokens of all other living workers, by engine."""
        now_s = asyncio.get_running_loop().time()
        totals: dict[str, tuple[int, int]] = {}
        for name, value in workers.items():
            worker = name.decode()
            if worker == self._worker:
                continue
            told = orjson.loads(value)
            sequence, since_s = self._seen.get(worker, (-1, now_s))
            if told["sequence"] != sequence:
                self._seen[worker] = (told["sequence"], now_s)
            elif now_s - since_s > STALE_PERIODS * self._settings.load_share_s:
                continue
            for engine, (turns, tokens) in told["load"].items():
                before = totals.get(engine, (0, 0))
                totals[engine] = (before[0] + turns, before[1] + tokens)
        self._seen = {worker: seen for worker, seen in self._seen.items() if worker.encode() in workers}
        return totals

    def _spread(self, totals: dict[str, tuple[int, int]]) -> None:
        for engine in self._registry.snapshot.engines:
            engine.load.others_turns, engine.load.others_tokens = totals.get(engine.key, (0, 0))

    def _take_reported(self, loads: dict[str, dict[str, Any]]) -> None:
        """Reports count while they are fresh, by our clock: from when this worker first saw them."""
        now_s = asyncio.get_running_loop().time()
        for key, load in loads.items():
            known = self._reports.get(key)
            if known is None or known[0] != load:
                self._reports[key] = (load, now_s)
        self._reports = {
            key: row for key, row in self._reports.items() if self._registry.engine(key) is not None
        }
        for key, (load, since_s) in self._reports.items():
            engine = self._registry.engine(key)
            assert engine is not None
            is_fresh = now_s - since_s <= REPORT_FRESH_S
            engine.load.running = int(load.get("running", 0)) if is_fresh else 0
            engine.load.waiting = int(load.get("waiting", 0)) if is_fresh else 0
            engine.load.kv_usage = float(load.get("kv_usage", 0.0)) if is_fresh else 0.0

    async def leave(self) -> None:
        """Take this worker's entry out, at the end."""
        try:
            await self._valkey.hdel(IN_FLIGHT, self._worker)
        except (RedisError, OSError, TimeoutError):
            log.debug("the entry expires by itself", extra={"action": "load_left"})
