"""This worker's picture of the pool: rows become a snapshot, failures open breakers, probes close them.

The rows are `nodes.heartbeats`', the choice `nodes.routing`'s. When PostgreSQL is away the last picture stays: the data
plane outlives the control plane.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable

from config.changes import EVERYTHING
from config.clock import Clock
from config.defaults import Settings
from config.postgres import AWAY
from nodes.breaker import Breaker
from nodes.heartbeats import CachedRow, EngineRow, NodeStore, PoolRows
from nodes.networks import AllowedNetworks, EngineUrlRefused
from nodes.reach import Direct, Listener, Reach, reach_behind_agent
from nodes.routing.prefixes import TOKENS_UNTOLD, Prefixes
from nodes.routing.snapshot import UNCAPPED, Engine, Model, Snapshot

log = logging.getLogger("poolgate.nodes")

RELOAD_RETRY_S = 1.0
"""Pause before nodes are read again after PostgreSQL did not answer."""

RELOAD_SHARE, RELOAD_PAUSE_MAX_S = 0.1, 0.5
"""Reading changes takes no more of the time than this: those that come faster are read together."""

KEPT_SHARE = 0.85
"""Of an engine's KV cache, for prompts that may come again: the rest is taken by what is under way and by what came once."""

CAP_MAX = 2**16
"""A cap on an engine's turns above this is none."""

Probe = Callable[[Engine], Awaitable[bool]]


class Registry:
    """Keeps `snapshot` current. Engines keep their load and breaker from one snapshot to the next."""

    def __init__(self, settings: Settings, networks: AllowedNetworks, clock: Clock) -> None:
        self._settings = settings
        self._networks = networks
        self._clock = clock
        self._engines: dict[str, Engine] = {}
        self._wake = asyncio.Event()
        self._changed_nodes: set[str] = {EVERYTHING}  # since they were read
        self._changed_accounts: set[str] = set()
        self._cached: dict[str, set[str]] = {}  # models on disk, by node
        self._probing: set[Engine] = set()
        self.snapshot = Snapshot()
        self.prefixes = Prefixes(settings.prefix_entries_max)
        self.on_change: list[Callable[[Snapshot], None]] = []
        self.on_failure: list[Callable[[Engine], None]] = []
        self.capped: set[Engine] = set()
        """Engines that said they are full, lately."""
        self.on_back: Callable[[], None] | None = None
        """Told when an engine may be fit again that was not."""

    def node_changed(self, entity: str) -> None:
        """Read that node again soon, or EVERYTHING; for the change feed."""
        self._changed_nodes.add(entity)
        self._wake.set()

    def account_changed(self, entity: str) -> None:
        """Read that account's nodes again soon, or EVERYTHING: it may have been suspended or approved."""
        self._changed_accounts.add(entity)
        self._wake.set()

    def engine(self, key: str) -> Engine | None:
        """An engine of the snapshot by its key."""
        return self._engines.get(key)

    def apply(self, rows: Iterable[EngineRow], nodes_online: int, cached: Iterable[CachedRow] = ()) -> None:
        """Make the snapshot of these rows; `cached`: the models that nodes online have on disk."""
        self._apply(PoolRows(list(rows), nodes_online, list(cached)))

    def _apply(self, pool: PoolRows) -> None:
        engines: dict[str, Engine] = {}
        if pool.nodes is None:
            self._cached = {}
        else:
            engines = {key: each for key, each in self._engines.items() if each.node_id not in pool.nodes}
            for node_id in pool.nodes:
                self._cached.pop(node_id, None)
        for row in pool.engines:
            engine = self._engine(row)
            if engine is not None:
                engines[row.key] = engine
        for key in self._engines.keys() - engines.keys():
            self.prefixes.forget(self._engines[key])
            log.info("engine %s left", key, extra={"action": "engine_left", "engine": key})
        self._engines = engines
        for model, node_id in pool.cached:
            self._cached.setdefault(node_id, set()).add(model)
        nodes_of: dict[str, list[str]] = {}
        for node_id, models in self._cached.items():
            for model in models:
                nodes_of.setdefault(model, []).append(node_id)
        self.snapshot = Snapshot.of(
            engines.values(), pool.nodes_online, before=self.snapshot,
            cached={model: tuple(nodes) for model, nodes in nodes_of.items()},
        )  # fmt: skip
        for callback in self.on_change:
            callback(self.snapshot)

    def _engine(self, row: EngineRow) -> Engine | None:
        reach = self._reach(row)
        if reach is None:
            return None
        # Of a tunnel the gateway knows no address; no connection is opened by these then.
        host, port = (reach.host, reach.port) if isinstance(reach, Direct | Listener) else ("node", 80)
        models = {model["id"]: Model.of(model) for model in row.models}
        engine = self._engines.get(row.key)
        if engine is None:
            log.info(
                "engine %s is ready with %s", row.key, ", ".join(models), extra={"action": "engine_ready"}
            )
            breaker = Breaker(self._settings)
            engine = Engine(
                row.key, row.node_id, row.engine_id, row.account_id, host, port, models, breaker, row.restarts,
                reach=reach,
            )  # fmt: skip
            engine.on_back = self._came_back
        elif (engine.reach, engine.incarnation) != (reach, row.restarts):
            if engine.incarnation != row.restarts:
                self.prefixes.forget(engine)  # another way to it leads to the same cache
            engine.host, engine.port, engine.reach, engine.incarnation = host, port, reach, row.restarts
            engine.breaker.reset()
            engine.load.cap = UNCAPPED
        engine.models = models
        engine.held.tokens_max = int((row.kv_tokens or TOKENS_UNTOLD) * KEPT_SHARE)
        facts = row.facts
        engine.region, engine.tier, engine.price_percent = facts.region, facts.tier, facts.price_percent
        engine.reputation = facts.reputation
        return engine

    def _reach(self, row: EngineRow) -> Reach | None:
        """The way to an engine; None while there is none that may be used."""
        if row.is_behind_agent:
            return reach_behind_agent(
                row.account_id, row.node_id, row.engine_id, listener=row.listener, tunnel=row.tunnel
            )
        try:
            address = self._networks.address(row.url)
        except EngineUrlRefused as error:
            log.warning("engine %s is not used: %s", row.key, error, extra={"action": "engine_refused"})
            return None
        return Direct(address.host, address.port)

    def _came_back(self) -> None:
        if self.on_back is not None:
            self.on_back()

    def engine_failed(self, engine: Engine) -> None:
        """A turn failed by this engine's fault."""
        for callback in self.on_failure:
            callback(engine)
        if engine.breaker.failed(self._clock.monotonic()):
            log.warning(
                "engine %s failed %d times in a row: no turns until it answers", engine.key, engine.breaker.failures,
                extra={"action": "breaker_opened", "engine": engine.key},
            )  # fmt: skip

    def engine_full(self, engine: Engine) -> None:
        """It refused a turn because it has too many, or reports that too many wait inside it."""
        engine.refused()
        self.capped.add(engine)

    def relax_caps(self, waiting_workers: int) -> None:
        """Let full engines take one turn more while turns wait for them, to see whether they can; else more and more, until
        nothing is left of their having been full. To be called every `queue_retry_s`.

        Of `waiting_workers` (this one is among them if any), each may have its part of what an engine takes: who has more
        gives one back, which another one's next try then finds.
        """
        for engine in list(self.capped):
            load = engine.load
            if not waiting_workers:
                load.cap += load.cap
            elif load.turns * waiting_workers > load.turns + load.others_turns + waiting_workers - 1:
                load.cap = max(1, load.turns - 1)
            else:
                load.cap += 1
            if load.cap > CAP_MAX or self._engines.get(engine.key) is not engine:
                load.cap = UNCAPPED
                self.capped.discard(engine)
            engine.comes_back()

    async def run(self, store: NodeStore) -> None:
        """Read what changed whenever something did, until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await self._wake.wait()
            self._wake.clear()
            began_s = loop.time()
            if await self.reload(store):
                took_s = loop.time() - began_s
                await asyncio.sleep(min(took_s / RELOAD_SHARE - took_s, RELOAD_PAUSE_MAX_S))
            else:
                await asyncio.sleep(RELOAD_RETRY_S)
                self._wake.set()

    async def reload(self, store: NodeStore) -> bool:
        """Read what changed now; False, and the old picture, if PostgreSQL does not answer."""
        nodes, self._changed_nodes = self._changed_nodes, set()
        accounts, self._changed_accounts = self._changed_accounts, set()
        try:
            pool = await (store.pool() if EVERYTHING in nodes | accounts else store.changed(nodes, accounts))
        except AWAY as error:
            self._changed_nodes |= nodes
            self._changed_accounts |= accounts
            log.warning(
                "nodes can't be read: %s", error or type(error).__name__, extra={"action": "nodes_unreadable"}
            )
            return False
        if pool.nodes is None or pool.nodes:  # most accounts own none
            self._apply(pool)
        return True

    async def run_probes(self, probe: Probe) -> None:
        """Ask engines with an open breaker whether they live, each once at a time, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                now_s = self._clock.monotonic()
                for engine in self.snapshot.engines:
                    if engine.breaker.wants_probe(now_s) and engine not in self._probing:
                        self._probing.add(engine)
                        tasks.create_task(self._probe(engine, probe))
                await asyncio.sleep(self._settings.breaker_open_s / 4)

    async def _probe(self, engine: Engine, probe: Probe) -> None:
        try:
            is_good = await probe(engine)
        finally:
            self._probing.discard(engine)
        if engine.breaker.is_open and engine.breaker.probed(is_good, self._clock.monotonic()):
            engine.comes_back()
            log.info(
                "engine %s answers again",
                engine.key,
                extra={"action": "breaker_closed", "engine": engine.key},
            )
