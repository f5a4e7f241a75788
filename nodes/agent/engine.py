"""Runs one engine: starts vLLM, waits until it is ready, watches it, restarts it, drains it, and obeys its orders.

How it is started is decided in `command`, what it is to do in `orders`; its processes are tied to ours by `tied`; what it
tells goes into its `Slot`.
"""

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from config.defaults import Settings
from nodes.agent.backoff import Backoff
from nodes.agent.command import Command
from nodes.agent.engine_log import EngineLog
from nodes.agent.orders import HOLD, REST, SERVE, SLEEP, Orders
from nodes.agent.probe import EngineProbe, ProbeFailed
from nodes.agent.scratch import Scratch
from nodes.agent.slot import Slot
from nodes.agent.stopping import Stopping, happens
from nodes.agent.tied import TiedProcess
from nodes.protocol import DRAINING, FAILED, GENERATE, READY, STARTING, STOPPED

log = logging.getLogger("poolgate.agent")

START_POLL_S = 0.25
POLL_FAILURES_MAX = 3  # polls in a row without a good answer (each waits 10 s at most): it hangs
STEADY_S = 60.0  # ready for this long: the next death starts the doubling of pauses anew
MODELS_POLL_S = 5.0  # LoRA adapters come and go at run time
DRAIN_POLL_S = 0.5
IDLE_POLLS = 3  # in a row: until every worker knows of the drain, within a second, turns may come
END_GRACE_S = 8.0  # from SIGTERM to SIGKILL: a stopped vLLM can wait for its clients for ever


class Engine:
    """One slot with an engine of ours. `run()` returns when stopping was asked and no process is left."""

    def __init__(
        self,
        slot: Slot,
        *,
        command: Callable[[int], Command],
        probe: Callable[[str], EngineProbe],
        announce: Callable[[], Awaitable[None]],
        stopping: Stopping,
        settings: Settings,
        folder: Path,
        kind: str = GENERATE,
    ) -> None:
        self.slot = slot
        self.orders = Orders()
        self.life: _Life | None = None  # the process that runs now
        self._command = command
        self._probe_of = probe
        self._announce = announce
        self._stopping = stopping
        self._settings = settings
        self._folder = folder
        self._kind = kind
        self._log = EngineLog(folder / "logs" / f"engine-{slot.engine_id}.log")
        self._scratch = Scratch(folder / "engines" / slot.engine_id / "tmp")
        self._backoff = Backoff(settings.engine_restart_s, settings.engine_restart_max_s)

    @property
    def is_up(self) -> bool:
        """It has a process, and so a seat."""
        return self.life is not None

    async def run(self) -> None:
        reason = ""
        while not self._stopping.asked.is_set():
            if self._rests:
                await self._rest()
                reason = ""
                continue
            self.orders.wants_restart = ""
            reason = await self._live(reason)
            if not self._stopping.asked.is_set():
                self.slot.restarts += 1
                if reason:
                    await self._fail(reason)
        self.slot.move(STOPPED)

    @property
    def _rests(self) -> bool:
        level = self.orders.now.level
        return level == REST or (level == SLEEP and (self.life is None or self.life.cannot_sleep))

    async def _rest(self) -> None:
        """Without a process, until orders change or stopping was asked."""
        self.orders.news.clear()
        self.slot.move(STOPPED, self.orders.now.reason)
        await _either(self.orders.news, self._stopping.asked)

    async def _fail(self, reason: str) -> None:
        pause_s = self._backoff.next_s()
        self.slot.move(FAILED, f"{reason}\nnext start in {pause_s:.1f} s")
        await self._stopping.pause(pause_s)

    async def _live(self, before: str) -> str:
        """One process from its start to its end; why it ended, empty when it was to. `before` is why the last one did."""
        port = _free_port()
        self.slot.url = f"http://127.0.0.1:{port}"
        self.slot.move(STARTING, f"again, because the last one {before}" if before else "")
        try:
            process = self._start(port)
        except OSError as error:
            return f"could not be started: {error}"
        life = self.life = _Life(process, self._probe_of(self.slot.url))
        try:
            reason = await self._until_ready(life)
            return await self._while_ready(life) if life.ready_at else reason
        finally:
            await self._end(life)
            self.life = None

    def _start(self, port: int) -> TiedProcess:
        command = self._command(port)
        self._scratch.make()
        # A folder of its own: python -m puts the current one on the import path, and ours has a `config`.
        workplace = self._folder / "engines" / self.slot.engine_id
        workplace.mkdir(parents=True, exist_ok=True)
        with self._log.open() as output:
            env = {**command.env, "TMPDIR": str(self._scratch.path)}
            return TiedProcess(command.argv, env=env, output=output, cwd=workplace)

    async def _until_ready(self, life: "_Life") -> str:
        """Empty when it is ready or stopping was asked, else why it did not get ready."""
        began = asyncio.get_running_loop().time()
        while not await self._pause(life, START_POLL_S):
            try:
                await life.probe.check_health()
                await self._look(life, with_models=True)
            except ProbeFailed as failure:
                waited = asyncio.get_running_loop().time() - began
                if waited > self._settings.engine_start_timeout_s:
                    words = self._log.last_words()
                    return f"was not ready after {waited:.0f} s ({failure}); last words:\n{words}"
                continue
            life.ready_at = asyncio.get_running_loop().time()
            life.words = f"ready {life.ready_at - began:.1f} s after its start"
            await self._obey(life)
            return ""
        return self._death(life)

    async def _while_ready(self, life: "_Life") -> str:
        """Until it dies or hangs (then: how), or stopping was asked (then: empty, after the drain)."""
        failures = 0
        models_at = life.ready_at
        while not await self._pause(life, self._settings.engine_poll_s):
            now = asyncio.get_running_loop().time()
            if now - life.ready_at > STEADY_S:
                self._backoff.reset()
            try:
                await life.probe.check_health()
                await self._look(life, with_models=now - models_at > MODELS_POLL_S)
            except ProbeFailed as failure:
                failures += 1
                if failures >= POLL_FAILURES_MAX and not life.has_exited:
                    life.is_hung = True
                    return f"failed {failures} checks in a row ({failure})"
                continue
            failures = 0
            await self._obey(life)
            models_at = now if now - models_at > MODELS_POLL_S else models_at
            self._log.keep_bounded()
        if not life.has_exited:
            await self._drain(life)
        return self._death(life)

    async def _look(self, life: "_Life", *, with_models: bool) -> None:
        metrics = await life.probe.metrics()
        if with_models:
            self.slot.learn_models(await life.probe.models(self._kind))
        self.slot.metrics = metrics
        if not metrics.load.is_idle:
            self.slot.used_s = asyncio.get_running_loop().time()

    async def _obey(self, life: "_Life") -> None:
        """What it may do without ending its process: serve, hold, sleep and wake."""
        duty = self.orders.now
        if life.is_asleep and duty.level != SLEEP:
            await self._wake(life)
        if duty.level == SERVE:
            self.slot.move(READY, life.words)
        elif duty.level in (HOLD, SLEEP) and not life.is_asleep:
            self.slot.move(DRAINING, duty.reason)
            if duty.level == SLEEP:
                await self._sleep(life, duty.reason)

    async def _sleep(self, life: "_Life", reason: str) -> None:
        """Once its turns have ended; an engine that can't sleep, or does not get idle, will rest instead."""
        await self._announce()
        is_idle = await self._until_idle(life)
        if self.orders.now.level != SLEEP or life.has_exited or self._stopping.asked.is_set():
            return
        why_not = "" if is_idle else "its turns don't end"
        try:
            if is_idle:
                await life.probe.sleep()
        except ProbeFailed as failure:
            why_not = str(failure)
        if why_not:
            log.info(
                "engine %s can't sleep (%s): it is stopped instead", self.slot.engine_id, why_not,
                extra={"action": "engine_sleepless", "engine": self.slot.engine_id},
            )  # fmt: skip
            life.cannot_sleep = True
            return
        life.is_asleep = True
        self.slot.move(STOPPED, f"asleep: {reason}")

    async def _wake(self, life: "_Life") -> None:
        try:
            await life.probe.wake()
        except ProbeFailed as failure:
            self.orders.restart(f"did not wake ({failure})")
            return
        life.is_asleep = False

    async def _drain(self, life: "_Life") -> None:
        """Say that it is draining, then let its turns end, for `engine_drain_s` or until we are hurried."""
        if life.is_asleep:
            return
        self.slot.move(DRAINING, self.orders.wants_restart or self.orders.now.reason)
        await self._announce()
        if await self._until_idle(life) or life.has_exited or self._stopping.hurried.is_set():
            return
        log.warning(
            "engine %s still had %d turns when its drain ended",
            self.slot.engine_id,
            self.slot.load.running + self.slot.load.waiting,
            extra={"action": "engine_drain_cut", "engine": self.slot.engine_id},
        )

    async def _until_idle(self, life: "_Life") -> bool:
        """True once its turns have ended; False when it takes too long, dies, does not tell, or we are hurried."""
        deadline = asyncio.get_running_loop().time() + self._settings.engine_drain_s
        idle = 0
        while asyncio.get_running_loop().time() < deadline and not life.has_exited:
            try:
                self.slot.metrics = await life.probe.metrics()
            except ProbeFailed:
                return False
            idle = idle + 1 if self.slot.load.is_idle else 0
            if idle >= IDLE_POLLS or await happens(self._stopping.hurried, DRAIN_POLL_S):
                break
        return idle >= IDLE_POLLS

    async def _end(self, life: "_Life") -> None:
        """No process of it is left when this returns."""
        try:
            is_orderly = life.ready_at and not life.is_hung and not self._stopping.hurried.is_set()
            if is_orderly and not life.has_exited:
                life.process.terminate()
                await life.exits_within(END_GRACE_S, unless=(self._stopping.hurried,))
        finally:
            life.process.kill()
        await life.exited
        self._scratch.remove()

    async def _pause(self, life: "_Life", seconds: float) -> bool:
        """Wait, less long when there are new orders; True when it is to end or has: nothing more is to be waited for."""
        await life.exits_within(seconds, unless=(self._stopping.asked, self.orders.news))
        self.orders.news.clear()  # what may be done without ending is done at each look
        is_to_end = self._stopping.asked.is_set() or self._rests or bool(self.orders.wants_restart)
        return life.has_exited or is_to_end

    def _death(self, life: "_Life") -> str:
        if not life.has_exited:
            return ""
        code = life.exited.result()
        how = f"was killed by signal {code - 128}" if code > 128 else f"exited with code {code}"
        return f"{how}; last words:\n{self._log.last_words()}"


class _Life:
    """One process of an engine, with what is known of it."""

    def __init__(self, process: TiedProcess, probe: EngineProbe) -> None:
        self.process = process
        self.probe = probe
        self.exited = process.exit_future(asyncio.get_running_loop())
        self.ready_at = 0.0  # loop time; 0: not yet
        self.words = ""  # how it got ready
        self.is_hung = False
        self.is_asleep = False
        self.cannot_sleep = False

    @property
    def has_exited(self) -> bool:
        return self.exited.done()

    async def exits_within(self, seconds: float, *, unless: Sequence[asyncio.Event]) -> bool:
        """Wait for the exit, but not longer than that, and not once one of the events is set."""
        waiting = [asyncio.ensure_future(event.wait()) for event in unless]
        try:
            any_of: set[asyncio.Future[Any]] = {self.exited, *waiting}
            await asyncio.wait(any_of, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for each in waiting:
                each.cancel()
        return self.exited.done()


async def _either(first: asyncio.Event, second: asyncio.Event) -> None:
    """Until one of them is set."""
    waiting = [asyncio.ensure_future(event.wait()) for event in (first, second)]
    try:
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for each in waiting:
            each.cancel()


def _free_port() -> int:
    """A port of loopback that nobody has now. If someone takes it first, the engine's start fails and the
    next start has another."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
