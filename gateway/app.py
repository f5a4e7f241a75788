"""The composition root: every part of a gateway worker is built here, given what it needs, started and stopped in order."""

import asyncio
import logging
import os
import socket
import time
from collections.abc import Coroutine
from functools import cache, partial
from pathlib import Path
from typing import Any

from aiohttp import web

from billing.prices import PriceBook
from config.changes import EVERYTHING, ChangeFeed
from config.clock import SystemClock
from config.defaults import Settings
from config.metrics import Metrics
from config.postgres import open_pool
from config.valkey import open_valkey
from gateway import VERSION
from gateway.accepting import Acceptor
from gateway.admission import Admission
from gateway.api import services
from gateway.api.admin import commands as node_commands
from gateway.api.admin import providers as admin_providers
from gateway.api.admin import routing
from gateway.api.inference import AskOf
from gateway.api.openai import asks, chat, complete, embeddings, models, responses
from gateway.api.openapi import openapi_document
from gateway.api.provider import (
    account,
    control,
    control_socket,
    downloads,
    heartbeat,
    history,
    marketplace,
    setup,
    telling,
    tunnel,
)
from gateway.api.routes import RouteSet, add_to
from gateway.api.system import docs, health
from gateway.caretaker import Caretaker
from gateway.control import ControlHub
from gateway.edge.cors import Cors
from gateway.edge.door import Door
from gateway.edge.handover import ClientProtocol
from gateway.edge.refusals import bad_request_handler, edge
from gateway.edge.refused import RefusedKeys
from gateway.edge.turns import EdgeTurns
from gateway.health import Health
from gateway.idempotent import KeyedTurns
from gateway.identity.accounts import AccountStore
from gateway.identity.keyring import KeyRing
from gateway.identity.keys import KeyStore
from gateway.identity.logins import Logins
from gateway.identity.providers import ProviderAccounts
from gateway.identity.secrets import load_pepper
from gateway.lifecycle import Lifecycle
from gateway.mail import mailer_of
from gateway.marketplace import Marketplace
from gateway.money import Money
from gateway.placement import Placement
from gateway.reach.ask import NoAnswer, ask
from gateway.reach.check import ListenerChecks
from gateway.reach.hop import HopServer
from gateway.reach.tokens import hop_secret
from gateway.reach.tunnels import Tunnels
from gateway.reach.ways import Ways
from gateway.records import TurnRecords
from gateway.relay.tokenize import count_prompt
from gateway.relay.tokens import count_tokens
from gateway.relay.upstream import ConnectFailed
from gateway.relay.upstreams import Upstreams
from gateway.reputation import ReputationChore
from gateway.request_limits import RequestLimits, limited
from gateway.starting import ModelStarts, wish_by_command
from gateway.tally import Tally
from gateway.tls import TlsFiles
from gateway.waiting.sharing import QueueShare
from nodes.commands import CommandStore
from nodes.events import EventStore
from nodes.heartbeats import NodeStore
from nodes.load import LoadShare
from nodes.networks import AllowedNetworks
from nodes.placements import PlacementShare
from nodes.providers import ProviderStore
from nodes.reaching import ReachStore
from nodes.registry import Registry
from nodes.reputation import ReputationStore
from nodes.routing.snapshot import Engine
from nodes.wishes import WishStore

log = logging.getLogger("poolgate.gateway")

ROUTES: tuple[RouteSet, ...] = (
    chat.routes,
    embeddings.routes,
    responses.routes,
    complete.routes,
    models.routes,
    heartbeat.routes,
    account.routes,
    control.routes,
    telling.routes,
    history.routes,
    marketplace.routes,
    marketplace.renter_routes,
    admin_providers.routes,
    control_socket.routes,
    downloads.routes,
    setup.routes,
    node_commands.routes,
    tunnel.routes,
    routing.routes,
    health.routes,
)

TURN_ROUTES: dict[bytes, AskOf] = {
    b"/v1/chat/completions": asks.chat_ask,
    b"/v1/completions": asks.completion_ask,
    b"/v1/embeddings": embeddings.embeddings_ask,
    b"/v1/responses": responses.responses_ask,
    b"/v1/complete": complete.complete_ask,
    b"/v1/complete/stream": complete.complete_stream_ask,
}
"""What the edge serves itself where a request is plain."""

PROBE_BYTES_MAX = 65536
"""Of an engine's answer to /health, which is empty."""

GAUGES_S = 1.0
"""How often gauges are set."""

STOP_POLL_S = 0.05
CUT_S = 2.0
"""What turns that are cut get to tell their clients."""

TALLY_S = 5.0
"""How often PostgreSQL is told what turns say about nodes."""

WATCHERS = 2
"""The change feed, and the caretaker, which keeps its connection while it is the caretaker."""


@cache
def api_docs() -> docs.ApiDocs:
    """The document of all routes and its pages: written once in a process, which takes a fourth of a second."""
    pages = docs.ApiDocs()
    route_sets = (*ROUTES, pages.routes)
    pages.publish(openapi_document(route_sets, title="poolgate", version=VERSION, server_url="/"))
    return pages


class Gateway:
    """One worker. `start` builds and begins, `stop` ends begun turns and writes what they used."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._tasks: list[asyncio.Task[None]] = []
        self._tls = TlsFiles.of(settings)
        self.failed = asyncio.Event()

    async def start(self, sock: socket.socket, *, accepts: bool = True) -> None:
        """Serve on `sock`, which listens already or is bound. Without `accepts`, only when `acceptor` is started."""
        await self._open_stores()
        app = self._build(own_port=sock.getsockname()[1])
        self.tunnels.worker = await self._hops.start(self.settings.hop_host)
        await self.health.check()
        await self.money.register()
        # Before it listens: clients may be queued on the socket of a worker that died.
        await self.registry.reload(self._nodes)
        self.registry.node_changed(
            EVERYTHING
        )  # once more, when the change feed runs: nothing in between is missed
        await asyncio.to_thread(count_tokens, "")  # the table takes a second to load
        self._begin(*self._parts())
        await self._listen(app, sock)
        if accepts:
            await self.acceptor.start()

    async def _open_stores(self) -> None:
        settings = self.settings
        self._pool = await open_pool(
            settings.database_url, max_size=settings.database_pool_max, timeout_s=settings.database_timeout_s,
            resets=False,
        )  # fmt: skip
        # A connection of its own for each: they must not wait behind a flood of keys or heartbeats.
        self._watch_pool = await open_pool(
            settings.database_url, max_size=WATCHERS, timeout_s=settings.database_timeout_s
        )
        self._valkey = open_valkey(settings.redis_url, timeout_s=settings.valkey_timeout_s)

    def _build(self, own_port: int) -> web.Application:
        """Every part, given what it needs; none has begun. The application has what handlers need."""
        settings = self.settings
        clock = SystemClock()
        worker = f"{socket.gethostname()}-{os.getpid()}"
        self.metrics = Metrics()
        pepper = load_pepper(settings)
        prices = PriceBook.load(Path(settings.price_book) if settings.price_book else None)

        keys = KeyStore(self._pool, pepper, self._valkey)
        keyring = KeyRing(keys, pepper, settings, clock)
        networks = AllowedNetworks(settings.node_networks, own_ports=(own_port,))
        self.registry = Registry(settings, networks, clock)
        nodes = self._nodes = NodeStore(
            self._pool, credit_s=settings.heartbeat_grace_s, nodes_max=settings.provider_nodes_max
        )
        reaching = ReachStore(self._pool)
        self.tunnels = Tunnels(settings, reaching)
        self._hops = HopServer(hop_secret(pepper), self.tunnels)
        ways = Ways(pepper, self.tunnels)
        upstreams = Upstreams(settings, ways)
        self._checks = ListenerChecks(settings, store=reaching, networks=networks, ways=ways, pepper=pepper)
        self._load = LoadShare(self._valkey, self.registry, settings, worker)
        feed = self._feed = ChangeFeed(self._watch_pool, self._valkey, settings)
        feed.on("key", keyring.forget_key)
        feed.on("account", keyring.forget_account)
        feed.on("node", self.registry.node_changed)
        feed.on("account", self.registry.account_changed)
        self._commands = CommandStore(self._pool)
        self._control = ControlHub(self._commands, self._load)
        feed.on("node_command", self._control.node_news)
        feed.on("key", self._control.key_news)
        feed.on("key", self.tunnels.key_news)
        feed.on("account", self._control.account_news)

        self.money = Money(
            settings, pool=self._pool, valkey=self._valkey, feed=feed, clock=clock, metrics=self.metrics,
            pepper=pepper,
        )  # fmt: skip
        self.placement = Placement(settings, registry=self.registry, metrics=self.metrics)
        self._placement_share = PlacementShare(self._valkey, self.registry, settings, worker)
        self._queue_share = QueueShare(self._valkey, self.placement.queue, settings, worker)
        wish = partial(wish_by_command, WishStore(self._pool), self._commands, self._valkey)
        starts = ModelStarts(settings, registry=self.registry, wish=wish, metrics=self.metrics)

        journal = self.money.journal
        self._tally = Tally(ReputationStore(self._pool), TALLY_S)
        self.registry.on_failure.append(self._tally.count_fault)
        self._records = TurnRecords(self.metrics, journal.append, self._tally.count)
        admission = Admission(
            settings, registry=self.registry, prices=prices, clock=clock, limiter=self.money.limiter,
            leases=self.money.leases, journal=journal,
            count_prompt=partial(count_prompt, upstreams, settings), starts=starts,
        )  # fmt: skip
        self.lifecycle = Lifecycle(
            settings, registry=self.registry, admission=admission, placement=self.placement, pepper=pepper,
            record=self._records.add, upstreams=upstreams,
        )  # fmt: skip
        self.keyed_turns = KeyedTurns(
            self.money.claims, self.lifecycle.run, settings, self.money.incarnation.id
        )
        self.registry.on_change.append(lambda snapshot: self.lifecycle.upstreams.keep(snapshot.engines))
        self.health = Health(
            settings, pool=self._pool, valkey=self._valkey, feed=feed, registry=self.registry,
            usage_pending=lambda: journal.pending, is_full=lambda: journal.is_full,
        )  # fmt: skip

        mailer = mailer_of(settings)
        self.logins = None if mailer is None else Logins(self._pool, pepper, mailer, settings)
        app = self._application(keyring, nodes, networks, prices)
        self._add_providers(app, keys)
        app[services.TUNNELS] = self.tunnels
        app[services.LISTENER_CHECKS] = self._checks
        return app

    def _parts(self) -> list[Coroutine[Any, Any, None]]:
        """What runs for as long as the worker does."""
        reputation = ReputationChore(self._pool, self.settings, self.metrics)
        return [
            self._feed.run(),
            self.registry.run(self._nodes),
            self.registry.run_probes(self._probe),
            self._load.run(),
            self.tunnels.run(),
            self.placement.queue.run(),
            self._queue_share.run(),
            self._placement_share.run(),
            self._records.run(),
            self.health.run(),
            self.lifecycle.run_clock(),
            Caretaker(
                self._watch_pool, self._pool, self.settings, {reputation.run: self.settings.reputation_s}
            ).run(),
            self._tally.run(),
            *([self.logins.run()] if self.logins else []),
            self._set_gauges(),
            self._watch_leases(),
            *self.money.parts(),
            *([self._tls.run()] if self._tls else []),
        ]

    def _application(
        self, keyring: KeyRing, nodes: NodeStore, networks: AllowedNetworks, prices: PriceBook
    ) -> web.Application:
        """The routes, and under typed keys what their handlers need."""
        settings = self.settings
        limits = RequestLimits(self._valkey, settings)
        app = web.Application(middlewares=[edge, limited(limits)], client_max_size=settings.body_bytes_max)
        app[services.REQUEST_LIMITS] = limits
        app[services.SETTINGS] = settings
        app[services.KEYRING] = keyring
        app[services.ACCOUNTS] = AccountStore(self._pool, self._valkey)
        app[services.LIFECYCLE] = self.lifecycle
        app[services.KEYED_TURNS] = self.keyed_turns
        app[services.REGISTRY] = self.registry
        app[services.NODES] = nodes
        app[services.VALKEY] = self._valkey
        app[services.COMMANDS] = self._commands
        app[services.CONTROL] = self._control
        app[services.NETWORKS] = networks
        app[services.LOAD] = self._load
        app[services.PLACEMENT] = self.placement
        app[services.PRICES] = prices
        app[services.HEALTH] = self.health
        app[services.METRICS] = self.metrics
        app[services.CORS] = Cors(settings)
        app[services.REFUSED_KEYS] = RefusedKeys(settings, time.monotonic)
        add_to(app, (*ROUTES, api_docs().routes))
        return app

    def _add_providers(self, app: web.Application, keys: KeyStore) -> None:
        """What the provider API's handlers need."""
        providers = ProviderStore(self._pool)
        app[services.PROVIDERS] = providers
        app[services.PROVIDER_ACCOUNTS] = ProviderAccounts(self._pool, keys, self.settings, self._valkey)
        app[services.MARKETPLACE] = self.marketplace = Marketplace(providers)
        app[services.EVENTS] = EventStore(self._pool)
        app[services.LOGINS] = self.logins

    def _begin(self, *coroutines: Coroutine[Any, Any, None]) -> None:
        for coroutine in coroutines:
            task = asyncio.create_task(coroutine)
            task.add_done_callback(self._ended)
            self._tasks.append(task)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        """A background part never ends by itself: without it this worker is not whole, so it makes room for another."""
        if task.cancelled() or task.exception() is None:
            return
        log.critical(
            "a part of the gateway failed; this worker ends",
            exc_info=task.exception(),
            extra={"action": "worker_failed"},
        )
        self.failed.set()

    async def _listen(self, app: web.Application, sock: socket.socket) -> None:
        """From here on connections are taken: by the edge, which lends aiohttp what it does not serve itself."""
        settings = self.settings
        options: dict[str, Any] = {
            "access_log": None,
            "max_line_size": settings.header_bytes_max,
            "max_field_size": settings.header_bytes_max,
            "auto_decompress": False,  # a small body must not become a large one in memory
            "keepalive_timeout": settings.client_idle_s,
        }
        self._runner = web.AppRunner(app, handler_cancellation=True, **options)
        await self._runner.setup()
        loop = asyncio.get_running_loop()
        handler = partial(
            ClientProtocol, self._runner.server, loop=loop, on_bad_request=bad_request_handler(self.metrics),
            buffer_bytes=settings.stream_buffer_bytes, **options,
        )  # fmt: skip
        turns = EdgeTurns(
            settings, routes=TURN_ROUTES, keyring=app[services.KEYRING], lifecycle=self.lifecycle,
            keyed_turns=self.keyed_turns, metrics=self.metrics,
        )  # fmt: skip
        self.door = Door(
            settings, turns=turns, handler=handler, cors=app[services.CORS],
            refused_keys=app[services.REFUSED_KEYS], metrics=self.metrics,
        )  # fmt: skip
        self._begin(self.door.run())
        self.acceptor = Acceptor(
            sock,
            self.door,
            tls=self._tls.context if self._tls else None,
            handshake_s=settings.tls_handshake_s,
        )

    async def _probe(self, engine: Engine) -> bool:
        """One question to an engine whose breaker is open."""
        pool = self.lifecycle.upstreams.pool(engine)
        timeout_s = self.settings.connect_timeout_s
        try:
            status, _ = await ask(pool, pool.bare("/health"), timeout_s=timeout_s, bytes_max=PROBE_BYTES_MAX)
        except (ConnectFailed, NoAnswer):
            return False
        return status == 200

    async def _set_gauges(self) -> None:
        while True:
            snapshot, metrics = self.registry.snapshot, self.metrics
            metrics.in_flight.set(self.lifecycle.in_flight)
            self.money.set_gauges()
            metrics.nodes_online.set(snapshot.nodes_online)
            metrics.tunnels.set(len(self.tunnels))
            metrics.engines_ready.set(len(snapshot.engines))
            metrics.breakers_open.set(sum(engine.breaker.is_open for engine in snapshot.engines))
            await asyncio.sleep(GAUGES_S)

    async def _watch_leases(self) -> None:
        """A process that was taken for dead has no money any more: it makes room for another, and its turns are told."""
        await self.money.leases.is_lost.wait()
        log.critical("this worker was given up while it lived; it ends", extra={"action": "worker_given_up"})
        self.failed.set()

    async def stop(self) -> None:
        """No new connections; begun turns may end within `shutdown_grace_s`; then their usage is written."""
        self.health.is_draining = True
        self.door.drain()
        self._control.close()
        self.tunnels.drain()
        await self.acceptor.drain_and_close()
        manager = self._runner.server
        assert manager is not None
        if not await self._ended_within(self.settings.shutdown_grace_s):
            log.warning(
                "%d turns outlive the grace and are cut",
                self.lifecycle.in_flight,
                extra={"action": "turns_cut"},
            )
            self.lifecycle.cut_all()
            await self._ended_within(CUT_S)
        await self.tunnels.close()
        self._hops.close()
        await manager.shutdown(CUT_S)
        self.door.close()
        await self._runner.cleanup()
        await self.keyed_turns.close(CUT_S)
        await self._end_tasks()
        await self._checks.close()
        self._records.flush()
        await self._tally.flush()
        await self.money.close()
        await self._load.leave()
        await self._queue_share.leave()
        self.lifecycle.upstreams.close()
        await self._valkey.aclose()
        for pool in (self._watch_pool, self._pool):
            try:
                async with asyncio.timeout(self.settings.database_timeout_s):
                    await pool.close()
            except TimeoutError:
                pool.terminate()

    async def _end_tasks(self) -> None:
        """Cancel the background parts until all have ended: Python 3.11 loses a cancellation that comes at the very moment
        at which what a task waits for does (`asyncio.wait_for`, in redis-py and asyncpg)."""
        going = set(self._tasks)
        while going:
            for task in going:
                task.cancel()
            _, going = await asyncio.wait(going, timeout=CUT_S)

    async def _ended_within(self, limit_s: float) -> bool:
        """Wait for all turns to end."""
        loop = asyncio.get_running_loop()
        ends_s = loop.time() + limit_s
        while self._is_busy and loop.time() < ends_s:
            if not self.lifecycle.in_flight:
                self.lifecycle.upstreams.close()  # idle ones keep tunnels open, whose agents wait to be told
            await asyncio.sleep(STOP_POLL_S)
        return not self._is_busy

    @property
    def _is_busy(self) -> bool:
        """A keyed request may be at its claim, or at its turn's ending, which the lifecycle does not see; and an idle
        connection may bring a last request for a little while."""
        return bool(self.lifecycle.in_flight or self.keyed_turns.in_flight) or not self.door.is_idle
