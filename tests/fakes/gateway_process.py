"""A whole `poolgate serve`, supervisor and workers, that can be killed at one blow and started again on the same port."""

import asyncio
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from bench.processes import ROOT, environment, fetch, free_port
from config.defaults import Settings
from config.procs import Child, spawn_python
from tests.waiting import eventually

STOP_S = 60.0


class GatewayProcess:
    """`async with GatewayProcess(settings, folder) as gateway:`; at the end it is stopped, or killed if it will not."""

    def __init__(
        self, settings: Settings, folder: Path, *, port: int = 0, config: Path | None = None
    ) -> None:
        """`config`: a settings file, in which what a reload is to change stands; the environment wins over it."""
        self.settings = settings
        self._config = config
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / f"serve-{self.port}.log"
        self._process: Child | None = None

    async def __aenter__(self) -> "GatewayProcess":
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        if self.is_alive:
            try:
                await self.stop()
            except subprocess.TimeoutExpired:
                self.kill()

    @property
    def is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        assert self._process is not None, "not started"
        return self._process.pid

    async def start(self) -> None:
        """In a process group of its own; returns when every worker says that it is ready."""
        self.spawn()
        await self.until_ready()

    def spawn(self) -> None:
        """Start it, and don't wait."""
        with self.log.open("ab") as output:
            self._process = spawn_python(
                "gateway", "serve", "--port", str(self.port),
                *(("--config", str(self._config)) if self._config else ()), env=environment(self.settings), cwd=ROOT,
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip

    async def until_ready(self) -> None:
        await eventually(self._is_ready)

    async def until_engines(self, count: int) -> None:
        """Every worker sends turns to so many engines."""
        await eventually(lambda: self._all("/health", lambda told: _engines(told) >= count))

    async def until_just(self, count: int) -> None:
        """Every worker sends turns to so many engines and no more."""
        await eventually(lambda: self._all("/health", lambda told: _engines(told) == count))

    def send_signal(self, number: signal.Signals) -> None:
        """To the supervisor."""
        assert self._process is not None
        self._process.send_signal(number)

    def reload(self) -> None:
        """SIGHUP."""
        self.send_signal(signal.SIGHUP)

    async def until_logged(self, words: str, times: int = 1) -> None:
        """Its log has a line with these words, or so many."""
        await eventually(lambda: self.log.read_text().count(words) >= times)

    def workers(self) -> list[psutil.Process]:
        """The worker processes now, those that are ending and those that are starting included."""
        try:
            children = psutil.Process(self.pid).children()
            return [child for child in children if child.status() != psutil.STATUS_ZOMBIE]
        except psutil.NoSuchProcess:
            return []

    def kill(self) -> None:
        """SIGKILL to all of it at once: nobody hears of another's death first."""
        assert self._process is not None
        workers = self.workers()
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(STOP_S)
        for worker in workers:
            worker.wait(STOP_S)

    async def stop(self) -> int:
        """SIGTERM; the exit code."""
        self.send_signal(signal.SIGTERM)
        return await asyncio.to_thread(self.wait)

    def wait(self) -> int:
        """Its exit code, once it has one."""
        assert self._process is not None
        return self._process.wait(STOP_S)

    def client_ports(self, worker: psutil.Process) -> set[int]:
        """The clients' ends of the connections that a worker serves: the kernel's table knows."""
        return {
            end.raddr.port
            for end in worker.net_connections("tcp")
            if end.laddr.port == self.port and end.raddr
        }

    async def _is_ready(self) -> bool:
        if not self.is_alive:
            raise AssertionError(f"the gateway ended:\n{self.log.read_text()[-4000:]}")
        if len(self.workers()) < self.settings.workers:
            return False
        return await self._all("/ready", lambda told: told["ready"])

    async def _all(self, path: str, is_so: Callable[[Any], bool]) -> bool:
        """Whether all workers say so: each connection reaches one of them by a hash of its port."""
        tries = 6 * self.settings.workers

        def ask() -> bool:
            try:
                return all(is_so(fetch(self.url + path)) for _ in range(tries))
            except (OSError, ValueError):
                return False

        return await asyncio.to_thread(ask)


def _engines(health: Any) -> int:
    details = {part["name"]: part for part in health["components"]}["nodes"]["details"]
    return int(details["engines_ready"]) - int(details["breakers_open"])
