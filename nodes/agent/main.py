"""Puts the agent together and runs it: identity, inventory, engines, heartbeats, signals.

`poolgate agent` and `poolgate up` call it; every part is built here and gets what it needs from here.
"""

import asyncio
import contextlib
import importlib.util
import logging
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp

from config.defaults import Settings
from config.procs import die_with_parent
from nodes.agent.command import BadModel, ModelSpec, read_model
from nodes.agent.environment import engine_status
from nodes.agent.identity import NodeInUse, node_identity
from nodes.agent.inventory import Inventory, local_address
from nodes.agent.listener import CannotListen
from nodes.agent.probe import probe_session
from nodes.agent.reach import AgentReach
from nodes.agent.reporter import Reporter
from nodes.agent.stopping import Stopping
from nodes.agent.supervisor import Supervisor
from nodes.protocol import AGENT_VERSION, Heartbeat

log = logging.getLogger("poolgate.agent")

LAST_WORD_S = 3.0  # for the heartbeat that says that all engines are stopped
PARENT_GONE_S = 8.0  # without a parent nobody waits for turns to end


class CannotStart(RuntimeError):
    """The agent can't run as it was asked to; the text says what to change."""


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


async def run_agent(options: AgentOptions) -> None:
    """Run until SIGTERM, SIGINT or the parent's death; then drain, stop the engines and say so. A second
    signal hurries. Raises `CannotStart`."""
    models = _read_models(options.models)
    python = options.engine_python or find_engine_python()
    if models and python is None and not options.engine_command:
        raise CannotStart(
            "no vLLM here: run `make engine`, install poolgate[node] on a GPU host, or use --engine-url"
        )
    try:
        with node_identity(options.data_dir) as node_id:
            await _Agent(options, models, (python or Path(sys.executable)).absolute(), node_id).run()
    except (NodeInUse, CannotListen) as error:
        raise CannotStart(str(error)) from error


def run_to_end(options: AgentOptions) -> None:
    """`run_agent` on uvloop where it is installed: turns that go through the agent cost it less than half as much."""
    try:
        import uvloop
    except ImportError:
        asyncio.run(run_agent(options))
    else:
        uvloop.run(run_agent(options))


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
        self._inventory = Inventory()
        self._stopping = Stopping()
        self._began = time.monotonic()
        self._spec = self._inventory.resource_spec()

    async def run(self) -> None:
        options = self._options
        die_with_parent(_from_thread(self._stopping.hurry), bound_s=PARENT_GONE_S)
        async with _gateway_session(options.gateway) as gateway, probe_session() as engines:
            self._reach = AgentReach(options, self._node_id, gateway, engine_at=self._engine_at)
            reporter = Reporter(
                gateway, gateway=options.gateway, describe=self._describe, settings=options.settings,
                heard=lambda reply: self._reach.heard(reply.reach, reporter.changed),
            )  # fmt: skip
            self._supervisor = Supervisor(
                models=self._models,
                engine_urls=options.engine_urls,
                python=self._python,
                gpus=self._inventory.gpu_indexes,
                cores=self._inventory.cores,
                folder=options.data_dir,
                settings=options.settings,
                session=engines,
                stopping=self._stopping,
                changed=reporter.changed,
                announce=reporter.announce,
                override=options.engine_command,
            )
            with _signals(self._stopping.ask):
                async with self._reach:
                    await self._serve(reporter)

    def _engine_at(self, engine_id: str) -> str | None:
        """The URL of one of this host's engines."""
        return next((one.url for one in self._supervisor.reports() if one.engine_id == engine_id), None)

    async def _serve(self, reporter: Reporter) -> None:
        reporting = asyncio.create_task(reporter.run(), name="reporter")
        try:
            await self._supervisor.run()
            await self._stopping.asked.wait()  # an agent without engines only reports
            await reporter.announce(LAST_WORD_S)
        finally:
            reporting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reporting
        log.info("agent stopped", extra={"action": "agent_stopped"})

    async def _describe(self, epoch: int) -> Heartbeat:
        gpu_status = await asyncio.to_thread(self._inventory.gpu_status)  # a driver may take its time
        address = await asyncio.to_thread(local_address, self._options.gateway)
        return Heartbeat(
            api_key=self._options.key,
            gpu_status=gpu_status,
            uptime=time.monotonic() - self._began,
            provider_ip=address,
            provider_hostname=self._spec["hostname"],
            cached_models=tuple(model.name for model in self._models),
            resource_spec=self._spec,
            node_id=self._node_id,
            epoch=epoch,
            agent_version=AGENT_VERSION,
            engines=self._supervisor.reports(),
            load=self._supervisor.loads(),
            reach=self._reach.asked(),
        )


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
