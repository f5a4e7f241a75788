"""Workers tell each other of their queues through Valkey: how many wait in each, and what accounts got from it.

So bounds and fairness hold over all workers. Without Valkey each keeps its own queue fair, and half a second of what others
gave is forgotten, not owed.
"""

import asyncio
import logging
from typing import Any

import orjson
from redis.asyncio import Redis
from redis.exceptions import RedisError

from config.defaults import Settings
from config.valkey import end_if_cancelled
from gateway.waiting.queue import TurnQueue

log = logging.getLogger("poolgate.queue")

QUEUES = "poolgate:queues"

KEPT_S = 60
"""The hash vanishes this long after the last writer."""

STALE_PERIODS = 10
"""Periods after which a worker that wrote nothing new counts as gone."""

AWAY_PAUSE_S = 1.0

ACCOUNTS_MAX = 1000
"""Accounts of which one worker tells."""


class QueueShare:
    """Writes this worker's entry and reads the others': `{sequence, waiting, served: {account: tokens so far}}`."""

    def __init__(self, valkey: "Redis", queue: TurnQueue, settings: Settings, worker: str) -> None:
        self._valkey = valkey
        self._queue = queue
        self._settings = settings
        self._worker = worker
        self._sequence = 0
        self._served: dict[str, int] = {}
        self._known: dict[str, tuple[Any, float, dict[str, int]]] = {}
        self._is_told = False

    async def run(self) -> None:
        """Share until cancelled."""
        while True:
            pause_s = self._settings.load_share_s
            try:
                await self._share()
            except (RedisError, OSError, TimeoutError):  # that Valkey is away is told by `nodes.load`
                self._queue.others = self._queue.other_workers = 0
                self._known.clear()
                pause_s = max(pause_s, AWAY_PAUSE_S)
            end_if_cancelled()
            await asyncio.sleep(pause_s)

    async def _share(self) -> None:
        is_idle = not self._queue.waiting
        for account, tokens in self._queue.take_served().items():
            self._served[str(account)] = self._served.get(str(account), 0) + tokens
        if (
            is_idle and not self._is_told
        ):  # nobody need know of a queue that stays empty, and an empty one owes nothing
            self._served.clear()
            self._queue.others = self._queue.other_workers = 0
            self._known.clear()
            return
        if len(self._served) > ACCOUNTS_MAX:
            self._served.clear()
        self._sequence += 1
        entry = {"sequence": self._sequence, "waiting": self._queue.waiting, "served": self._served}
        async with self._valkey.pipeline(transaction=False) as batch:
            if is_idle:
                batch.hdel(QUEUES, self._worker)
            else:
                batch.hset(QUEUES, self._worker, orjson.dumps(entry).decode())
                batch.expire(QUEUES, KEPT_S)
            batch.hgetall(QUEUES)
            *_, workers = await batch.execute()
        self._is_told = not is_idle
        self._take({name.decode(): value for name, value in workers.items()})

    def _take(self, workers: dict[str, bytes]) -> None:
        """Count who waits elsewhere, and charge accounts for what they got there since the last time."""
        now_s = asyncio.get_running_loop().time()
        others = others_waiting = 0
        for worker, value in workers.items():
            if worker == self._worker:
                continue
            told = _decoded(value)
            known = self._known.get(worker)
            sequence, since_s, before = known or (None, now_s, told["served"])
            if told["sequence"] == sequence:
                if now_s - since_s <= STALE_PERIODS * self._settings.load_share_s:
                    others += told["waiting"]
                    others_waiting += told["waiting"] > 0
                continue
            others += told["waiting"]
            others_waiting += told["waiting"] > 0
            self._known[worker] = (told["sequence"], now_s, told["served"])
            for account, tokens in told["served"].items():
                got = tokens - before.get(account, 0)
                if got > 0 and account.isdecimal():
                    self._queue.others_served(int(account), got)
        self._known = {worker: known for worker, known in self._known.items() if worker in workers}
        self._queue.others, self._queue.other_workers = others, others_waiting

    async def leave(self) -> None:
        """Take this worker's entry out, at the end."""
        try:
            await self._valkey.hdel(QUEUES, self._worker)
        except (RedisError, OSError, TimeoutError):
            log.debug("the entry expires by itself", extra={"action": "queue_left"})


def _decoded(value: bytes) -> dict[str, Any]:
    """An entry; what another version wrote, or anybody, counts as nothing where it makes no sense."""
    try:
        told = orjson.loads(value)
    except orjson.JSONDecodeError:
        told = None
    told = told if isinstance(told, dict) else {}
    served = told.get("served")
    pairs = served.items() if isinstance(served, dict) else ()
    return {
        "sequence": told.get("sequence"),
        "waiting": waiting if isinstance(waiting := told.get("waiting"), int) and waiting > 0 else 0,
        "served": {account: tokens for account, tokens in pairs if isinstance(tokens, int)},
    }
