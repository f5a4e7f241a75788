"""The pools of connections to all engines: made at the first turn, closed when their engine is gone."""

from config.defaults import Settings
from gateway.relay.upstream import UpstreamPool, Ways
from nodes.routing.snapshot import Engine


class Upstreams:
    """One pool for each engine of the snapshot."""

    def __init__(self, settings: Settings, ways: Ways | None = None) -> None:
        """Without `ways` every engine is reached straight."""
        self._settings = settings
        self._ways = ways
        self._pools: dict[Engine, UpstreamPool] = {}

    def pool(self, engine: Engine) -> UpstreamPool:
        """The pool of `engine`, which follows it to another address or way."""
        pool = self._pools.get(engine)
        if pool is None or pool.reach is not engine.reach:
            if pool is not None:
                pool.close()
            pool = self._pools[engine] = UpstreamPool(
                engine.host, engine.port, self._settings, reach=engine.reach, ways=self._ways
            )
        return pool

    def keep(self, engines: tuple[Engine, ...]) -> None:
        """Forget the pools of engines that are not in `engines` any more, or have another way now."""
        for gone in self._pools.keys() - set(engines):
            self._pools.pop(gone).close()
        for moved in [engine for engine, pool in self._pools.items() if pool.reach is not engine.reach]:
            self._pools.pop(moved).close()

    def close(self) -> None:
        """Close every idle connection."""
        self.keep(())
