"""The pools of connections to all engines: made at the first turn, closed when their engine is gone."""

from config.defaults import Settings
from gateway.relay.upstream import UpstreamPool
from nodes.routing.snapshot import Engine


class Upstreams:
    """One pool for each engine of the snapshot."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._pools: dict[Engine, UpstreamPool] = {}

    def pool(self, engine: Engine) -> UpstreamPool:
        """The pool of `engine`, which follows it to a new port."""
        pool = self._pools.get(engine)
        if pool is None or pool.port != engine.port or pool.host != engine.host:
            if pool is not None:
                pool.close()
            pool = self._pools[engine] = UpstreamPool(engine.host, engine.port, self._settings)
        return pool

    def keep(self, engines: tuple[Engine, ...]) -> None:
        """Forget the pools of engines that are not in `engines` any more."""
        for gone in self._pools.keys() - set(engines):
            self._pools.pop(gone).close()

    def close(self) -> None:
        """Close every idle connection."""
        self.keep(())
