"""Keeps one engine in each slot of the host: one a model that is served, and one an engine that others run.

Gives engines their `seats`, makes room for a model that is wanted now, and passes on what the node is to do.
How an engine lives is `engine`'s and `attached`'s affair.
"""

import asyncio
import os
import re
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp

from config.defaults import Settings
from nodes.agent.attached import AttachedEngine
from nodes.agent.catalog import slug, unique
from nodes.agent.command import Command, Hardware, ModelSpec, engine_command, share_hardware
from nodes.agent.engine import END_GRACE_S, Engine
from nodes.agent.orders import REST, SERVE, SERVING, SLEEP, Duty
from nodes.agent.plan import Device, Sitter
from nodes.agent.probe import PROBE_TIMEOUT_S, EngineProbe
from nodes.agent.seats import Seats
from nodes.agent.slot import Slot
from nodes.agent.stopping import Stopping
from nodes.protocol import ENGINES_MAX, READY, EngineLoad, EngineReport

LOOK_S = 0.1
STARTS_MAX = 3
"""A model whose engine failed so often while it was waited for is given up; the engine itself goes on trying."""


class CannotServe(RuntimeError):
    """The engine or model can't be had; the text says why."""


class Supervisor:
    """All engines of an agent. `run()` returns when stopping was asked and every engine of ours has ended."""

    def __init__(
        self,
        *,
        models: Sequence[ModelSpec],
        engine_urls: Sequence[str],
        python: Path,
        gpus: Sequence[int],
        cores: Sequence[int],
        folder: Path,
        settings: Settings,
        session: aiohttp.ClientSession,
        stopping: Stopping,
        changed: Callable[[], None],
        announce: Callable[[], Awaitable[None]],
        devices: Callable[[], Sequence[Device]],
        failed: Callable[[str, str], None] | None = None,
        override: Sequence[str] = (),
    ) -> None:
        """`devices` tells what engines may take now; `failed(engine_id, reason)` is called at each failure."""
        self._python, self._gpus, self._cores = python, tuple(gpus), tuple(cores)
        self._folder, self._settings, self._session = folder, settings, session
        self._stopping, self._changed, self._announce, self._failed = stopping, changed, announce, failed
        self._seats = Seats(devices, gpus)
        self._override = tuple(override)
        self._openmp = find_openmp(python)
        self._planning = asyncio.Lock()
        self._group: asyncio.TaskGroup | None = None
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._duties: dict[str, Duty] = {}  # of the node, by who wants them
        self._models: dict[str, ModelSpec] = {}
        self._engines: list[Engine | AttachedEngine] = []
        names = unique([slug(model.name) for model in models])
        shares = share_hardware(len(models), gpus=gpus, cores=cores, openmp=self._openmp)
        for name, model, share in zip(names, models, shares, strict=True):
            self._add(name, model, share)
            self._seats.sit(name, self._seats.shared(model, share))
        names = unique([*names, *(slug(urlsplit(url).netloc) for url in engine_urls)])[len(models) :]
        for name, url in zip(names, engine_urls, strict=True):
            slot = Slot(name, url, changed, failed)
            self._engines.append(
                AttachedEngine(
                    slot, probe=EngineProbe(session, url), announce=announce, stopping=stopping, settings=settings
                )
            )  # fmt: skip

    async def run(self) -> None:
        async with asyncio.TaskGroup() as self._group:
            for engine in self._engines:
                self._begin(engine)
            await self._stopping.asked.wait()

    def reports(self) -> tuple[EngineReport, ...]:
        return tuple(engine.slot.report() for engine in self._engines)

    def loads(self) -> dict[str, EngineLoad]:
        return {engine.slot.engine_id: engine.slot.load for engine in self._engines}

    # --- what is wanted of the node -----------------------------------------------------------------------------

    def conduct(self, side: str, duty: Duty) -> None:
        """Every engine, also one that comes later, is to do this; `side` is who says so."""
        self._duties[side] = duty
        for engine in self._engines:
            engine.orders.give(side, duty)

    def refit(self) -> None:
        """What engines may take has changed: those on devices that are too full now start again with less."""
        for name in self._seats.shrink(self._sitters()):
            self._own(name).orders.restart("its owner keeps more of the GPU for himself")

    # --- single engines -----------------------------------------------------------------------------------------

    def engine(self, engine_id: str) -> Engine | AttachedEngine:
        """Raises CannotServe."""
        for engine in self._engines:
            if engine.slot.engine_id == engine_id:
                return engine
        raise CannotServe(f"this node has no engine {engine_id}")

    def own(self, engine_id: str) -> Engine:
        """One of ours. Raises CannotServe."""
        engine = self.engine(engine_id)
        if not isinstance(engine, Engine):
            raise CannotServe(f"engine {engine_id} is run by others: only they start and stop it")
        return engine

    def stop(self, engine_id: str) -> None:
        self.own(engine_id).orders.give("person", Duty(REST, "stopped by command"))

    def sleep(self, engine_id: str) -> None:
        self.own(engine_id).orders.give("person", Duty(SLEEP, "by command"))

    async def serve(self, engine_id: str) -> None:
        """Start or wake it; others leave if they must. Raises CannotServe."""
        engine = self.own(engine_id)
        for duty in self._duties.values():
            if duty.level == REST:  # nobody makes room for an engine that may not run
                raise CannotServe(duty.reason)
        await self._make_room(engine_id, self._models[engine_id])
        await self._until_ready(engine)

    async def restart(self, engine_id: str) -> None:
        """Raises CannotServe."""
        engine = self.own(engine_id)
        if not engine.is_up:
            raise CannotServe(f"engine {engine_id} does not run: {engine.slot.reason or engine.slot.state}")
        before = engine.life
        engine.orders.restart("restarted by command")
        try:
            async with asyncio.timeout(self._ending_s):
                while engine.life is before and not self._stopping.asked.is_set():  # noqa: ASYNC110 - seconds
                    await asyncio.sleep(LOOK_S)
        except TimeoutError:
            raise CannotServe(f"engine {engine_id} did not end in time") from None
        await self._until_ready(engine)

    async def load(self, model: ModelSpec) -> None:
        """Serve a model of this host, in the slot that it has or a new one. Raises CannotServe."""
        name = next((name for name, known in self._models.items() if known.name == model.name), "")
        if not name:
            self._forget_one()
            name = unique([*(engine.slot.engine_id for engine in self._engines), slug(model.name)])[-1]
            engine = self._add(name, model, Hardware(cores=self._cores, openmp=self._openmp))
            engine.orders.give("plan", Duty(REST, "waits for room"))
            self._begin(engine)
        await self.serve(name)

    # --- seats --------------------------------------------------------------------------------------------------

    async def _make_room(self, name: str, model: ModelSpec) -> None:
        async with self._planning:
            engine = self._own(name)
            if not self._takes_memory(engine):
                asleep_in = self._seats.taken()[name] if engine.is_up else None
                plan = self._seats.plan(model, self._sitters(), asleep_in)
                if plan.seat is None:
                    raise CannotServe(f"there is no room for {model.name}: {plan.reason}")
                await self._send_away(plan.leave, f"makes room for {model.name}")
                if not engine.is_up:
                    self._seats.sit(name, plan.seat)
            engine.orders.give("person", SERVING)
            engine.orders.give("plan", SERVING)

    async def _send_away(self, names: Sequence[str], reason: str) -> None:
        """To sleep, if that gives memory back, else to rest; returns once they have gone. If one does not go, all stay."""
        level = SLEEP if self._gpus else REST
        for name in names:
            self._own(name).orders.give("plan", Duty(level, reason))
        try:
            async with asyncio.timeout(self._ending_s):
                while any(self._takes_memory(self._own(name)) for name in names):  # noqa: ASYNC110 - seconds
                    await asyncio.sleep(LOOK_S)
        except TimeoutError:
            for name in names:
                self._own(name).orders.give("plan", SERVING)
            raise CannotServe(f"engines {', '.join(names)} did not end in time") from None

    async def _until_ready(self, engine: Engine) -> None:
        """Raises CannotServe when it fails again and again, takes too long, or is kept from serving."""
        restarts = engine.slot.restarts
        try:
            async with asyncio.timeout(self._settings.engine_start_timeout_s):
                while engine.slot.state != READY:
                    if self._stopping.asked.is_set() or engine.orders.now.level != SERVE:
                        raise CannotServe(engine.orders.now.reason or "the agent ends")
                    if engine.slot.restarts - restarts >= STARTS_MAX:
                        raise CannotServe(engine.slot.reason)
                    await asyncio.sleep(LOOK_S)
        except TimeoutError:
            raise CannotServe(
                f"it is not ready after {self._settings.engine_start_timeout_s:.0f} s"
            ) from None

    @property
    def _ending_s(self) -> float:
        """An engine that is told to end has done so within this, its last turns included."""
        return (
            self._settings.engine_drain_s + END_GRACE_S + self._settings.engine_poll_s + 2 * PROBE_TIMEOUT_S
        )

    def _sitters(self) -> list[Sitter]:
        return [
            Sitter(name, seat, not self._own(name).slot.load.is_idle, self._own(name).slot.used_s)
            for name, seat in self._seats.taken().items()
            if self._takes_memory(self._own(name))
        ]

    def _takes_memory(self, engine: Engine) -> bool:
        """Also one that is about to start, which has its seat already."""
        if engine.life is not None:
            return not engine.life.is_asleep
        return engine.orders.now.level not in (REST, SLEEP)

    # --- engines come and go ------------------------------------------------------------------------------------

    def _add(self, name: str, model: ModelSpec, hardware: Hardware) -> Engine:
        self._models[name] = model
        self._seats.add(name, hardware)
        engine = Engine(
            Slot(name, "http://127.0.0.1:0", self._changed, self._failed),
            command=lambda port: _command(
                model, self._seats.hardware(name), self._python, self._override, port
            ),
            probe=partial(EngineProbe, self._session),
            announce=self._announce,
            stopping=self._stopping,
            settings=self._settings,
            folder=self._folder,
            kind=model.kind,
        )
        for side, duty in self._duties.items():
            engine.orders.give(side, duty)
        self._engines.append(engine)
        return engine

    def _begin(self, engine: Engine | AttachedEngine) -> None:
        assert self._group is not None, "run() makes it"
        name = engine.slot.engine_id
        self._tasks[name] = self._group.create_task(engine.run(), name=f"engine {name}")

    def _forget_one(self) -> None:
        """A node reports so many engines at most: the one that has rested longest makes place. Raises CannotServe."""
        if len(self._engines) < ENGINES_MAX:
            return
        resting = [
            each for each in self._engines
            if isinstance(each, Engine) and each.life is None and each.orders.wanted_by("plan").level != SERVE
        ]  # fmt: skip
        if not resting:
            raise CannotServe(f"a node has {ENGINES_MAX} engines at most")
        oldest = min(resting, key=lambda each: each.slot.used_s)
        name = oldest.slot.engine_id
        self._tasks.pop(name).cancel()
        self._engines.remove(oldest)
        self._seats.forget(name)
        del self._models[name]

    def _own(self, name: str) -> Engine:
        engine = self.engine(name)
        assert isinstance(engine, Engine)
        return engine


def find_openmp(python: Path) -> Path | None:
    """Intel's OpenMP library in the environment of `python`, if it has one. LD_PRELOAD can't name a path with a
    space or a colon; vLLM then takes PyTorch's own OpenMP, which is as right and somewhat slower."""
    library = python.parent.parent / "lib" / "libiomp5.so"
    return library if library.exists() and not re.search(r"[\s:]", str(library)) else None


def _command(
    model: ModelSpec, share: Hardware, python: Path, override: tuple[str, ...], port: int
) -> Command:
    if override:  # a stand-in engine, with {port} and {model} filled in
        filled = tuple(part.replace("{port}", str(port)).replace("{model}", model.name) for part in override)
        return Command(filled, dict(os.environ))
    return engine_command(model, share, python=python, port=port, environ=os.environ)
