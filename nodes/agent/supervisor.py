"""Keeps one engine in each slot of the host: one a model that is served, and one an engine that others run.

Gives engines their seats as `plan` decides, makes room for a model that is wanted now, and passes on what the node is to do.
How an engine lives is `engine`'s and `attached`'s affair.
"""

import asyncio
import os
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp

from config.defaults import Settings
from nodes.agent.attached import AttachedEngine
from nodes.agent.catalog import slug, unique, weights_bytes
from nodes.agent.command import Command, Hardware, ModelSpec, engine_command, share_hardware
from nodes.agent.engine import END_GRACE_S, Engine
from nodes.agent.orders import REST, SERVE, SERVING, SLEEP, Duty
from nodes.agent.plan import Device, Need, Plan, Seat, Sitter, need_of, overfull, place
from nodes.agent.probe import PROBE_TIMEOUT_S, EngineProbe
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
        self._devices = devices
        self._override = tuple(override)
        self._openmp = find_openmp(python)
        self._planning = asyncio.Lock()
        self._group: asyncio.TaskGroup | None = None
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._duties: dict[str, Duty] = {}  # of the node, by who wants them
        self._hardware: dict[str, Hardware] = {}
        self._seats: dict[str, Seat] = {}
        self._models: dict[str, ModelSpec] = {}
        self._engines: list[Engine | AttachedEngine] = []
        names = unique([slug(model.name) for model in models])
        shares = share_hardware(len(models), gpus=gpus, cores=cores, openmp=self._openmp)
        for name, model, share in zip(names, models, shares, strict=True):
            self._add(name, model, share, self._shared_seat(model, share))
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

    @property
    def has_processes(self) -> bool:
        return any(isinstance(engine, Engine) and engine.is_up for engine in self._engines)

    # --- what is wanted of the node -----------------------------------------------------------------------------

    def conduct(self, side: str, duty: Duty) -> None:
        """Every engine, also one that comes later, is to do this; `side` is who says so."""
        self._duties[side] = duty
        for engine in self._engines:
            engine.orders.give(side, duty)

    def refit(self) -> None:
        """What engines may take has changed: those on devices that are too full now start again with less."""
        if not self._gpus:
            return
        for name in overfull(self._sitters(), self._devices()):
            engine = self._own(name)
            seat = self._seats[name]
            budget = min(device.budget_mib for device in self._devices() if device.index in seat.devices)
            self._sit(name, replace(seat, mib_each=budget // max(1, self._sharers(seat))))
            engine.orders.restart("its owner keeps more of the GPU for himself")

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
            engine = self._add(name, model, Hardware(cores=self._cores, openmp=self._openmp), None)
            engine.orders.give("plan", Duty(REST, "waits for room"))
            self._begin(engine)
        await self.serve(name)

    # --- seats --------------------------------------------------------------------------------------------------

    async def _make_room(self, name: str, model: ModelSpec) -> None:
        async with self._planning:
            engine = self._own(name)
            if not self._takes_memory(engine):
                plan = self._plan_for(name, model, engine)
                if plan.seat is None:
                    raise CannotServe(f"there is no room for {model.name}: {plan.reason}")
                for leaver in plan.leave:
                    level = SLEEP if self._gpus else REST  # a CPU engine that sleeps gives nothing back
                    self._own(leaver).orders.give("plan", Duty(level, f"makes room for {model.name}"))
                await self._until_gone(plan.leave)
                if not engine.is_up:
                    self._sit(name, plan.seat)
            engine.orders.give("person", SERVING)
            engine.orders.give("plan", SERVING)

    def _plan_for(self, name: str, model: ModelSpec, engine: Engine) -> Plan:
        devices, sitters = self._devices(), self._sitters()
        if engine.is_up:  # it wakes where it fell asleep
            seat = self._seats[name]
            mine = [device for device in devices if device.index in seat.devices]
            return place(Need(seat.mib_each * len(mine), exact=True), sitters, mine)
        return place(self._need(model), sitters, devices)

    def _need(self, model: ModelSpec) -> Need:
        return need_of(weights_bytes(model.folder), model.vram_gb, on_gpu=bool(self._gpus))

    async def _until_gone(self, names: Sequence[str]) -> None:
        try:
            async with asyncio.timeout(self._ending_s):
                while any(self._takes_memory(self._own(name)) for name in names):  # noqa: ASYNC110 - seconds
                    await asyncio.sleep(LOOK_S)
        except TimeoutError:
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
            for name, seat in self._seats.items()
            if self._takes_memory(self._own(name))
        ]

    def _takes_memory(self, engine: Engine) -> bool:
        """Also one that is about to start, which has its seat already."""
        if engine.life is not None:
            return not engine.life.is_asleep
        return engine.orders.now.level not in (REST, SLEEP)

    def _shared_seat(self, model: ModelSpec, share: Hardware) -> Seat:
        """What models of the command line get, which are all started: on a CPU what they need, even if that is too much."""
        if not share.gpus:
            return Seat((0,), self._need(model).mib)
        budget_mib = min(device.budget_mib for device in self._devices() if device.index in share.gpus)
        return Seat(share.gpus, budget_mib // share.gpu_sharers)

    def _sit(self, name: str, seat: Seat) -> None:
        """The next start is in this seat."""
        self._seats[name] = seat
        if self._gpus:
            total_mib = min(device.total_mib for device in self._devices() if device.index in seat.devices)
            share = int(100 * seat.mib_each / max(1, total_mib)) / 100  # rounded down: shares add up
            self._hardware[name] = replace(self._hardware[name], gpus=seat.devices, gpu_share=share)

    def _sharers(self, seat: Seat) -> int:
        return sum(bool(set(other.devices) & set(seat.devices)) for other in self._seats.values())

    # --- engines come and go ------------------------------------------------------------------------------------

    def _add(self, name: str, model: ModelSpec, hardware: Hardware, seat: Seat | None) -> Engine:
        self._models[name], self._hardware[name] = model, hardware
        if seat is not None:
            self._sit(name, seat)
        engine = Engine(
            Slot(name, "http://127.0.0.1:0", self._changed, self._failed),
            command=lambda port: _command(model, self._hardware[name], self._python, self._override, port),
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
        for known in (self._models, self._hardware, self._seats):
            known.pop(name, None)

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
