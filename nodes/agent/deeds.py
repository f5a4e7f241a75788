"""Does what commands ask, each once, and tells how far it is.

Commands come by the control websocket or in a heartbeat's reply, often by both; how they come and how their progress leaves
is `control`'s and `reporter`'s affair.
"""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable

import aiohttp

from nodes.agent.catalog import Catalog
from nodes.agent.download import DownloadFailed, download_model
from nodes.agent.engine import Engine
from nodes.agent.probe import EngineProbe, ProbeFailed
from nodes.agent.supervisor import CannotServe, Supervisor
from nodes.control_messages import DONE, DOWNLOADING, FAILED, LOADING, QUEUED, Command, Progress
from nodes.protocol import READY, REASON_MAX

log = logging.getLogger("poolgate.agent")

KNOWN_MAX = 512
"""Commands that are remembered, so that none is done twice: a gateway has 32 at a time."""

TELL_S = 1.0
"""A download tells its progress so often."""


class CannotDo(RuntimeError):
    """The command can't be carried out; the text says why."""


class Deeds:
    """`on_progress(progress)` is called at each step; `unheard()` are those that nobody has confirmed to have heard."""

    def __init__(
        self,
        supervisor: Supervisor,
        catalog: Catalog,
        *,
        session: aiohttp.ClientSession,
        source: str,
        was_started: Callable[[], None],
        update: Callable[[], Awaitable[str]],
        probe: Callable[[str], EngineProbe],
    ) -> None:
        """`session` and `source` are for downloads; `was_started` tells that a person wants engines."""
        self._supervisor, self._catalog = supervisor, catalog
        self._session, self._source = session, source
        self._was_started, self._update, self._probe = was_started, update, probe
        self.on_progress: list[Callable[[Progress], None]] = []
        self._known: OrderedDict[tuple[int, str], Progress] = OrderedDict()
        self._unheard: dict[int, Progress] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._downloading = asyncio.Lock()

    def take(self, command: Command) -> None:
        """Begin it, or tell again how it stands."""
        key = (command.id, command.arguments.get("model_name", "") if command.id == 0 else "")
        known = self._known.get(key)
        if known is not None and not (command.id == 0 and known.has_ended):
            self._unheard[command.id] = known
            self._told(known)
            return
        log.info(
            "told to %s %s", command.name, " ".join(command.arguments.values()),
            extra={"action": "command_taken", "command": command.id},
        )  # fmt: skip
        self._move(key, Progress(command.id, QUEUED))
        task = asyncio.create_task(self._do(key, command), name=f"command {command.id}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def unheard(self) -> tuple[Progress, ...]:
        """What the next heartbeat is to carry."""
        return tuple(progress for progress in self._unheard.values() if progress.id)

    def heard(self, reports: tuple[Progress, ...]) -> None:
        """The gateway has these."""
        for report in reports:
            if self._unheard.get(report.id) == report:
                del self._unheard[report.id]

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _do(self, key: tuple[int, str], command: Command) -> None:
        def tell(status: str, percent: int = 0, detail: str = "") -> None:
            self._move(key, Progress(command.id, status, percent, detail[-REASON_MAX:]))

        try:
            words = await self._act(command, tell)
        except (CannotDo, CannotServe, DownloadFailed, ProbeFailed, OSError) as error:
            log.warning("%s failed: %s", command.name, error, extra={"action": "command_failed"})
            tell(FAILED, 0, str(error))
        except Exception:
            log.exception("%s failed", command.name, extra={"action": "command_failed"})
            tell(FAILED, 0, "an error inside the agent; its log has it")
        else:
            tell(DONE, 100, words)

    async def _act(self, command: Command, tell: Callable[[str, int, str], None]) -> str:
        """What was done, in words."""
        arguments, supervisor = command.arguments, self._supervisor
        engine_id = arguments.get("engine_id", "")
        match command.name:
            case "preload_model":
                return await self._preload(arguments["model_name"], tell)
            case "start_engine" | "wake_engine":
                self._was_started()
                tell(LOADING, 0, "")
                await supervisor.serve(engine_id)
            case "restart_engine":
                tell(LOADING, 0, "")
                await supervisor.restart(engine_id)
            case "stop_engine":
                supervisor.stop(engine_id)
            case "sleep_engine":
                supervisor.sleep(engine_id)
            case "load_lora":
                return await self._load_adapter(engine_id, arguments["adapter"])
            case "unload_lora":
                await self._probe_of(engine_id).unload_adapter(arguments["adapter"])
                return f"unloaded {arguments['adapter']}"
            case "update":
                return await self._update()
            case _:
                raise CannotDo(f"this agent does not know {command.name}")
        return ""

    async def _preload(self, name: str, tell: Callable[[str, int, str], None]) -> str:
        model = self._catalog.model(name)
        if model is None:
            async with self._downloading:  # one after the other: together they would only be later both
                await self._download(name, tell)
            model = self._catalog.model(name)
        if model is None:
            raise CannotDo(f"what came as {name} is no model that can be served")
        self._was_started()
        tell(LOADING, 100, "")
        await self._supervisor.load(model)
        return f"{name} is served"

    async def _download(self, name: str, tell: Callable[[str, int, str], None]) -> None:
        if self._catalog.model(name) is not None:
            return
        if not self._source:
            raise CannotDo(
                f"{name} is not on this host, and the setting model_source names no hub to get it from"
            )
        told_s = float("-inf")

        def moved(percent: int, words: str) -> None:
            nonlocal told_s
            now_s = asyncio.get_running_loop().time()
            if now_s - told_s >= TELL_S:
                told_s = now_s
                tell(DOWNLOADING, percent, words)

        tell(DOWNLOADING, 0, "")
        await download_model(self._session, self._source, name, self._catalog.place_for(name), moved)

    async def _load_adapter(self, engine_id: str, name: str) -> str:
        adapter = self._catalog.adapter(name)
        if adapter is None:
            raise CannotDo(f"there is no adapter {name} in {self._catalog.folder / 'adapters'}")
        await self._probe_of(engine_id).load_adapter(name, str(adapter.folder))
        return f"loaded {name}"

    def _probe_of(self, engine_id: str) -> EngineProbe:
        engine = self._supervisor.engine(engine_id)
        if engine.slot.state != READY:
            raise CannotDo(f"engine {engine_id} is {engine.slot.state}")
        if not isinstance(engine, Engine):
            raise CannotDo(f"engine {engine_id} is run by others: its adapters are theirs")
        return self._probe(engine.slot.url)

    def _move(self, key: tuple[int, str], progress: Progress) -> None:
        self._known[key] = progress
        self._known.move_to_end(key)
        while len(self._known) > KNOWN_MAX:
            self._known.popitem(last=False)
        self._unheard[progress.id] = progress
        self._told(progress)

    def _told(self, progress: Progress) -> None:
        for callback in self.on_progress:
            callback(progress)
