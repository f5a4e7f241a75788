"""Runs one engine: starts vLLM, waits until it is ready, watches it, restarts it, drains it.

How it is started is decided in `command`; its processes are tied to ours by `tied`; what it tells goes
into its `Slot`.
"""

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from config.defaults import Settings
from nodes.agent.backoff import Backoff
from nodes.agent.command import Command
from nodes.agent.engine_log import EngineLog
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

    async def run(self) -> None:
        reason = ""
        while not self._stopping.asked.is_set():
            reason = await self._live(reason)
            if not self._stopping.asked.is_set():
                pause_s = self._backoff.next_s()
                self.slot.restarts += 1
                self.slot.move(FAILED, f"{reason}\nnext start in {pause_s:.1f} s")
                await self._stopping.pause(pause_s)
        self.slot.move(STOPPED)

    async def _live(self, before: str) -> str:
        """One process from its start to its end; why it ended. `before` is why the one before it did."""
        port = _free_port()
        self.slot.url = f"http://127.0.0.1:{port}"
        self.slot.move(STARTING, f"again, because the last one {before}" if before else "")
        try:
            process = self._start(port)
        except OSError as error:
            return f"could not be started: {error}"
        life = _Life(process, self._probe_of(self.slot.url))
        try:
            reason = await self._until_ready(life)
            return await self._while_ready(life) if life.ready_at else reason
        finally:
            await self._end(life)

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
            self.slot.move(READY, f"ready {life.ready_at - began:.1f} s after its start")
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

    async def _drain(self, life: "_Life") -> None:
        """Say that it is draining, then let its turns end, for `engine_drain_s` or until we are hurried."""
        self.slot.move(DRAINING)
        deadline = asyncio.get_running_loop().time() + self._settings.engine_drain_s
        await self._announce()
        idle = 0
        while idle < IDLE_POLLS and asyncio.get_running_loop().time() < deadline and not life.has_exited:
            try:
                self.slot.metrics = await life.probe.metrics()
            except ProbeFailed:
                return
            idle = idle + 1 if self.slot.load.is_idle else 0
            if await happens(self._stopping.hurried, DRAIN_POLL_S):
                return
        if idle < IDLE_POLLS and not life.has_exited:
            log.warning(
                "engine %s still had %d turns when its drain ended",
                self.slot.engine_id,
                self.slot.load.running + self.slot.load.waiting,
                extra={"action": "engine_drain_cut", "engine": self.slot.engine_id},
            )

    async def _end(self, life: "_Life") -> None:
        """No process of it is left when this returns."""
        try:
            is_orderly = life.ready_at and not life.is_hung and not self._stopping.hurried.is_set()
            if is_orderly and not life.has_exited:
                life.process.terminate()
                await life.exits_within(END_GRACE_S, unless=self._stopping.hurried)
        finally:
            life.process.kill()
        await life.exited
        self._scratch.remove()

    async def _pause(self, life: "_Life", seconds: float) -> bool:
        """Wait; True when there is nothing more to wait for: it exited, or stopping was asked."""
        return await life.exits_within(seconds, unless=self._stopping.asked) or self._stopping.asked.is_set()

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
        self.is_hung = False

    @property
    def has_exited(self) -> bool:
        return self.exited.done()

    async def exits_within(self, seconds: float, *, unless: asyncio.Event) -> bool:
        """Wait for the exit, but not longer than that, and not once the event is set."""
        waiting = asyncio.ensure_future(unless.wait())
        try:
            either: set[asyncio.Future[Any]] = {self.exited, waiting}
            await asyncio.wait(either, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiting.cancel()
        return self.exited.done()


def _free_port() -> int:
    """A port of loopback that nobody has now. If someone takes it first, the engine's start fails and the
    next start has another."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
