"""Puts the agent together and runs it: identity, inventory, engines, heartbeats, control connection, signals.

`poolgate agent` and `poolgate up` call it; every part is built here and gets what it needs from here.
"""

import asyncio
import contextlib
import importlib.util
import logging
import signal
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp

from config.defaults import Settings
from config.procs import die_with_parent
from nodes.agent.arguments import CannotStart
from nodes.agent.catalog import Catalog
from nodes.agent.command import BadModel, ModelSpec, read_model
from nodes.agent.conduct import Conduct
from nodes.agent.control import Control
from nodes.agent.deeds import Deeds
from nodes.agent.environment import engine_status
from nodes.agent.events import Events
from nodes.agent.identity import NodeInUse, node_identity
from nodes.agent.inventory import Inventory, local_address
from nodes.agent.launcher import FENCED_CODE
from nodes.agent.lease import Lease
from nodes.agent.listener import CannotListen
from nodes.agent.probe import EngineProbe, probe_session
from nodes.agent.reach import AgentReach
from nodes.agent.reporter import Reporter
from nodes.agent.stopping import Stopping
from nodes.agent.supervisor import Supervisor
from nodes.agent.update import Updater
from nodes.control_messages import Command, Progress
from nodes.protocol import AGENT_VERSION, READY, BadMessage, Heartbeat, HeartbeatReply

log = logging.getLogger("poolgate.agent")

LAST_WORD_S = 3.0  # for the heartbeat that says that all engines are stopped
ONLINE = "online"  # a file of the data folder that is there once the gateway has taken this node: the installer waits for it
PROGRESS_MAX = 32  # of commands, in one heartbeat
PARENT_GONE_S = 8.0  # without a parent nobody waits for turns to end


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentOptions:
    """What one agent is to do."""

    gateway: str  # base URL
    key: str = field(repr=False)  # provider key
    data_dir: Path
    models: tuple[Path, ...] = ()  # folders; each gets an engine of its own
    engine_urls: tuple[str, ...] = ()  # engines that run already; only watched
    engine_python: Path | None = None  # interpreter that has vLLM; None: `find_engine_python`
    engine_command: tuple[str, ...] = ()  # instead of vLLM, with {port} and {model} filled in
    reach: str = "direct"  # how the gateway gets to the engines: straight, or through this `agent`
    advertise: str = ""  # HOST:PORT at which this agent's listener can be reached; empty: the tunnel alone
    listen: str = ""  # HOST:PORT that the listener listens on; empty: every address, the port of `advertise`
    settings: Settings = field(default_factory=Settings)


async def run_agent(options: AgentOptions) -> int:
    """Run until SIGTERM, SIGINT or the parent's death; then drain, stop the engines and say so. A second
    signal hurries. The exit code: 0, or the launcher's for a restart or for a node that another agent has. Raises
    `CannotStart`."""
    models = _read_models(options.models)
    python = options.engine_python or find_engine_python()
    if models and python is None and not options.engine_command:
        raise CannotStart(
            "no vLLM here: run `make engine`, install poolgate[node] on a GPU host, or use --engine-url"
        )
    try:
        with node_identity(options.data_dir) as node_id:
            return await _Agent(options, models, (python or Path(sys.executable)).absolute(), node_id).run()
    except (NodeInUse, CannotListen) as error:
        raise CannotStart(str(error)) from error


def run_to_end(options: AgentOptions) -> int:
    """`run_agent` on uvloop where it is installed: turns that go through the agent cost it less than half as much."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(run_agent(options))
    return uvloop.run(run_agent(options))


def find_engine_python() -> Path | None:
    """Our own interpreter if it has vLLM, as on GPU hosts, else the CPU engine's (`<our environment>/engine`)."""
    if importlib.util.find_spec("vllm") is not None:
        return Path(sys.executable)
    status = engine_status(Path(sys.prefix) / "engine")
    return status.python if status.is_ready else None


class _Agent:
    def __init__(
        self, options: AgentOptions, models: tuple[ModelSpec, ...], python: Path, node_id: str
    ) -> None:
        self._options = options
        self._models = models
        self._python = python
        self._node_id = node_id
        self._instance = str(uuid.uuid4())
        self._inventory = Inventory(options.settings.telemetry_file)
        self._catalog = Catalog(options.data_dir, models)
        self._stopping = Stopping()
        self._began = time.monotonic()
        self._spec = self._inventory.resource_spec()
        self._lease = Lease(options.settings.heartbeat_grace_s, asyncio.get_running_loop().time)
        self._is_known = asyncio.Event()  # a heartbeat has arrived
        self._is_outdated = False
        self._is_fenced = False

    async def run(self) -> int:
        options = self._options
        die_with_parent(_from_thread(self._stopping.hurry), bound_s=PARENT_GONE_S)
        (options.data_dir / ONLINE).unlink(missing_ok=True)
        async with (
            _gateway_session(options.gateway) as gateway,
            aiohttp.ClientSession(trust_env=True, cookie_jar=aiohttp.DummyCookieJar()) as downloads,
            probe_session() as engines,
        ):
            self._reach = AgentReach(options, self._node_id, gateway, engine_at=self._engine_at)
            self._build(gateway, downloads, engines)
            with _signals(self._stopping.ask):
                async with self._reach:
                    await self._serve()
        if self._is_fenced:
            return FENCED_CODE
        return self._updater.exit_code if self._updater.has_replaced else 0

    def _engine_at(self, engine_id: str) -> str | None:
        """The URL of one of this host's engines that takes work: none does without the lease, in a pause or in heat."""
        for engine in self._supervisor.reports():
            if engine.engine_id == engine_id and engine.state == READY:
                return engine.url
        return None

    def _build(
        self, gateway: aiohttp.ClientSession, downloads: aiohttp.ClientSession, engines: aiohttp.ClientSession
    ) -> None:
        options, settings, url = self._options, self._options.settings, self._options.gateway
        self._events = Events(gateway, gateway=url, key=options.key, node_id=self._node_id)
        self._updater = Updater(gateway, gateway=url, key=options.key, restart=self._stopping.ask)
        self._reporter = Reporter(
            gateway, gateway=url, describe=self._describe, settings=settings, lease=self._lease,
            accepted=self._accepted, fenced=self._fenced,
        )  # fmt: skip
        self._conduct = Conduct(
            inventory=self._inventory, lease=self._lease, settings=settings, event=self._events.note,
            conduct=lambda side, duty: self._supervisor.conduct(side, duty),
            refit=lambda: self._supervisor.refit(), stopping=self._stopping,
        )  # fmt: skip
        self._supervisor = Supervisor(
            models=self._models,
            engine_urls=options.engine_urls,
            python=self._python,
            gpus=self._inventory.gpu_indexes,
            cores=self._inventory.cores,
            folder=options.data_dir,
            settings=settings,
            session=engines,
            stopping=self._stopping,
            changed=self._reporter.changed,
            announce=self._reporter.announce,
            devices=self._conduct.devices,
            failed=self._events.crashed,
            override=options.engine_command,
        )
        self._deeds = Deeds(
            self._supervisor, self._catalog, session=downloads, source=settings.model_source.rstrip("/"),
            was_started=self._conduct.was_started, update=self._updater.update,
            probe=lambda engine_url: EngineProbe(engines, engine_url),
        )  # fmt: skip
        self._control = Control(
            gateway, gateway=url, key=options.key, node_id=self._node_id, instance=self._instance,
            settings=settings, lease=self._lease, loads=self._supervisor.loads, take=self._deeds.take,
            want=self._conduct.want, sent=self._deeds.heard, fenced=self._fenced, is_ready=self._is_known,
        )  # fmt: skip
        self._deeds.on_progress += [self._control.tell, self._news_of]

    async def _serve(self) -> None:
        parts = [
            asyncio.create_task(part, name=name)
            for name, part in (
                ("reporter", self._reporter.run()),
                ("conduct", self._conduct.run()),
                ("control", self._control.run()),
                ("events", self._events.run()),
            )
        ]
        self._events.note("started", "info", f"agent {AGENT_VERSION} started")
        self._events.ready(self._inventory.checks(self._python))
        try:
            await self._supervisor.run()
            await self._reporter.announce(0.0 if self._is_fenced else LAST_WORD_S)
        finally:
            await self._deeds.close()
            await self._updater.close()
            for part in parts:
                part.cancel()
            await asyncio.gather(*parts, return_exceptions=True)
        log.info("agent stopped", extra={"action": "agent_stopped"})

    def _accepted(self, heartbeat: Heartbeat, reply: HeartbeatReply) -> None:
        """A heartbeat has arrived; its reply brings what a websocket may not have brought."""
        if not self._is_known.is_set():
            self._is_known.set()
            (self._options.data_dir / ONLINE).touch()
        self._updater.came_up()
        self._deeds.heard(tuple(Progress.from_json(report) for report in heartbeat.progress))
        self._reach.heard(reply.reach, self._reporter.changed)
        self._conduct.learn(reply)
        for command in commands_of(reply):
            self._deeds.take(command)
        if reply.needs_update and not self._updater.wanted() and not self._is_outdated:
            log.warning(
                "this agent is older than the gateway wants (%s): update poolgate on this host",
                reply.min_version,
                extra={"action": "agent_outdated"},
            )
        self._is_outdated = reply.needs_update

    def _fenced(self) -> None:
        """Another agent has this node: what runs here drains and ends, and nothing takes it back."""
        if not self._is_fenced:
            self._is_fenced = True
            log.error(
                "another agent has taken this node: this one ends. If it is another machine, remove the file node_id "
                "in %s there or here",
                self._options.data_dir,
                extra={"action": "node_fenced"},
            )
            self._stopping.ask()

    def _news_of(self, progress: Progress) -> None:
        """Where no websocket carries it, a heartbeat does; a model that has come is news for everybody."""
        if progress.has_ended or not self._control.is_up:
            self._reporter.changed()

    async def _describe(self, epoch: int) -> Heartbeat:
        gpu_status = await asyncio.to_thread(self._inventory.gpu_status)  # a driver may take its time
        address = await asyncio.to_thread(local_address, self._options.gateway)
        cached = await asyncio.to_thread(self._catalog.models)
        return Heartbeat(
            api_key=self._options.key,
            gpu_status=gpu_status,
            uptime=time.monotonic() - self._began,
            provider_ip=address,
            provider_hostname=self._spec["hostname"],
            cached_models=tuple(model.name for model in cached),
            resource_spec=self._spec,
            node_id=self._node_id,
            epoch=epoch,
            instance=self._instance,
            agent_version=AGENT_VERSION,
            engines=self._supervisor.reports(),
            load=self._supervisor.loads(),
            progress=tuple(progress.to_json() for progress in self._deeds.unheard()[:PROGRESS_MAX]),
            reach=self._reach.asked(),
        )


def commands_of(reply: HeartbeatReply) -> list[Command]:
    """Those that this agent understands, and the contract's `preload_model`, which has no id."""
    commands = []
    for given in reply.commands:
        try:
            commands.append(Command.from_json(given))
        except BadMessage as error:
            log.debug("a command was not understood: %s", error, extra={"action": "command_odd"})
    name = (reply.preload_model or {}).get("model_name")
    if isinstance(name, str) and name and not any(name in command.arguments.values() for command in commands):
        commands.append(Command(0, "preload_model", {"model_name": name}))
    return commands


def _read_models(folders: tuple[Path, ...]) -> tuple[ModelSpec, ...]:
    try:
        return tuple(read_model(folder) for folder in folders)
    except BadModel as error:
        raise CannotStart(str(error)) from error


def _gateway_session(gateway: str) -> aiohttp.ClientSession:
    """A proxy of the environment is for gateways out there, not for one on this host."""
    is_local = urlsplit(gateway).hostname in ("127.0.0.1", "::1", "localhost")
    return aiohttp.ClientSession(trust_env=not is_local, cookie_jar=aiohttp.DummyCookieJar())


def _from_thread(callback: Callable[[], None]) -> Callable[[], None]:
    loop = asyncio.get_running_loop()

    def call() -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended: so have the engines
            loop.call_soon_threadsafe(callback)

    return call


@contextlib.contextmanager
def _signals(callback: Callable[[], None]) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGTERM, signal.SIGINT)
    for number in numbers:
        loop.add_signal_handler(number, callback)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
