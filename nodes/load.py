"""Load that other workers put on engines, and what engines last said of themselves, shared through Valkey.

Each worker writes its own turns in flight and reads the others'. Without Valkey it knows only its own, which is enough to
serve; a worker that stopped writing is forgotten after a few periods, by our own clock: clocks elsewhere may jump.
"""

import asyncio
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import orjson
from redis.asyncio import Redis
from redis.exceptions import RedisError

from config.defaults import Settings
from config.valkey import end_if_cancelled
from nodes.registry import Registry

log = logging.getLogger("poolgate.load")

IN_FLIGHT = "poolgate:in-flight"

ALONE_PERIODS = 4
"""Periods until a worker that found no others looks again: it has nobody to tell."""

STALE_PERIODS = 10
"""Periods after which a worker that wrote nothing new counts as gone."""

KEPT_S = 60
"""The hash vanishes this long after the last writer."""

TOLD_PERIODS = 5
"""Periods for which a worker's entry has a report: others read one late, but what all engines ever said is in none."""

REPORT_FRESH_S = 5.0
"""Age past which an engine's own report says nothing any more: turns last seconds, heartbeats are far apart."""

AWAY_PAUSE_S = 1.0
"""Pause after Valkey did not answer."""


class LoadShare:
    """Reads and writes the hash; `report` is for the worker that an agent told."""

    def __init__(self, valkey: "Redis", registry: Registry, settings: Settings, worker: str) -> None:
        self._valkey = valkey
        self._registry = registry
        self._settings = settings
        self._worker = worker
        self._sequence = 0
        self._is_idle = False  # our entry says that nothing is in flight
        self._is_alone = False  # nobody else shares
        self._seen: dict[str, tuple[Any, float]] = {}  # each worker's sequence, and since when
        # The reports in each worker's entry, taken once.
        self._heard: dict[str, dict[str, dict[str, Any]]] = {}
        self._told = 0
        self._untold: dict[str, tuple[Mapping[str, Any], float]] = {}  # reports that came to us of late
        self._reports: dict[str, float] = {}  # engines whose reports count, and since when
        self._laden: set[str] = set()  # engines that others have turns on
        self._is_up = True

    def report(self, loads: Mapping[str, Mapping[str, Any]]) -> None:
        """What engines said of themselves, by engine key: this worker knows it at once, the others a moment later."""
        now_s = asyncio.get_running_loop().time()
        self._told += 1  # so that one which says the same as before is another one, and is as fresh
        told = {key: {**load, "told": self._told} for key, load in loads.items()}
        self._untold |= {key: (load, now_s) for key, load in told.items()}
        self._take(told)

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
                self._is_up = self._is_alone = False
                self._spread({})
                self._fade()
                pause_s = max(pause_s, AWAY_PAUSE_S)
            end_if_cancelled()
            await asyncio.sleep(pause_s * ALONE_PERIODS if self._is_alone else pause_s)

    async def _share(self) -> None:
        mine = {
            engine.key: (engine.load.turns, engine.load.tokens)
            for engine in self._registry.snapshot.engines
            if engine.load.turns
        }
        told_s = asyncio.get_running_loop().time() - TOLD_PERIODS * self._settings.load_share_s
        self._untold = {key: report for key, report in self._untold.items() if report[1] > told_s}
        is_idle, self._is_idle = self._is_idle, False  # until that is known to be there
        says_nothing = not mine and not self._untold
        async with self._valkey.pipeline(transaction=False) as batch:
            if not (
                says_nothing and is_idle
            ):  # one that says nothing need not be renewed: without it nothing is known, too
                self._sequence += 1
                reports = {key: load for key, (load, _) in self._untold.items()}
                entry = orjson.dumps({"sequence": self._sequence, "load": mine, "reports": reports})
                batch.hset(IN_FLIGHT, self._worker, entry.decode())
                batch.expire(IN_FLIGHT, KEPT_S)
            batch.hgetall(IN_FLIGHT)
            *_, workers = await batch.execute()
        self._is_idle = says_nothing
        self._spread(self._others({name.decode(): value for name, value in workers.items()}))
        self._fade()
        now_s = asyncio.get_running_loop().time()
        gone = [worker for worker, (_, since_s) in self._seen.items() if now_s - since_s > KEPT_S]
        if gone:
            await self._valkey.hdel(IN_FLIGHT, *gone)

    def _others(self, workers: dict[str, bytes]) -> dict[str, tuple[int, int]]:
        """Turns and tokens of all other living workers, by engine; what they were told is taken."""
        now_s = asyncio.get_running_loop().time()
        self._is_alone = True
        totals: dict[str, tuple[int, int]] = {}
        for worker, value in workers.items():
            if worker == self._worker:
                continue
            told = _decoded(value)
            sequence, since_s = self._seen.get(worker, (None, now_s))
            if told.get("sequence") != sequence or worker not in self._seen:
                self._seen[worker] = (told.get("sequence"), now_s)
                self._hear(worker, _reports(told))
            elif now_s - since_s > STALE_PERIODS * self._settings.load_share_s:
                continue
            self._is_alone = False
            for engine, pair in _pairs(told):
                before = totals.get(engine, (0, 0))
                totals[engine] = (before[0] + pair[0], before[1] + pair[1])
        self._seen = {worker: seen for worker, seen in self._seen.items() if worker in workers}
        self._heard = {worker: heard for worker, heard in self._heard.items() if worker in workers}
        return totals

    def _hear(self, worker: str, reports: dict[str, dict[str, Any]]) -> None:
        """Each report once: what its engine has told another worker since is not undone by it."""
        before, self._heard[worker] = self._heard.get(worker, {}), reports
        self._take({key: load for key, load in reports.items() if before.get(key) != load})

    def _spread(self, totals: dict[str, tuple[int, int]]) -> None:
        for key in self._laden | totals.keys():
            engine = self._registry.engine(key)
            if engine is not None:
                engine.load.others_turns, engine.load.others_tokens = totals.get(key, (0, 0))
        self._laden = set(totals)

    def _take(self, loads: Mapping[str, Mapping[str, Any]]) -> None:
        """A report counts while it is fresh, by our clock: from when this worker first saw it."""
        now_s = asyncio.get_running_loop().time()
        for key, load in loads.items():
            engine = self._registry.engine(key)
            if engine is None:
                continue
            self._reports[key] = now_s
            running, waiting = int(_number(load, "running")), int(_number(load, "waiting"))
            engine.load.hear(running, waiting, _number(load, "kv_usage"))
            if engine.load.waiting > self._settings.engine_waiting_max:
                self._registry.engine_full(engine)

    def _fade(self) -> None:
        """What was not renewed says nothing any more."""
        oldest_s = asyncio.get_running_loop().time() - REPORT_FRESH_S
        for key in [key for key, since_s in self._reports.items() if since_s < oldest_s]:
            del self._reports[key]
            engine = self._registry.engine(key)
            if engine is not None:
                engine.load.hear(0, 0, 0.0)

    async def leave(self) -> None:
        """Take this worker's entry out, at the end."""
        try:
            await self._valkey.hdel(IN_FLIGHT, self._worker)
        except (RedisError, OSError, TimeoutError):
            log.debug("the entry expires by itself", extra={"action": "load_left"})


# What stands in Valkey may come from another version, or from anybody: nonsense counts as nothing.


def _decoded(value: bytes) -> dict[str, Any]:
    try:
        decoded = orjson.loads(value)
    except orjson.JSONDecodeError:
        return {}
    return decoded if isinstance(decoded, dict) else {}


def _pairs(told: dict[str, Any]) -> Iterator[tuple[str, tuple[int, int]]]:
    load = told.get("load")
    for engine, pair in load.items() if isinstance(load, dict) else ():
        if isinstance(pair, list) and len(pair) == 2 and all(isinstance(count, int) for count in pair):
            yield engine, (pair[0], pair[1])


def _reports(told: dict[str, Any]) -> dict[str, dict[str, Any]]:
    reports = told.get("reports")
    pairs = reports.items() if isinstance(reports, dict) else ()
    return {key: load for key, load in pairs if isinstance(load, dict)}


def _number(load: Mapping[str, Any], name: str) -> float:
    value = load.get(name, 0)
    return value if isinstance(value, int | float) and 0 <= value < 2**53 else 0
