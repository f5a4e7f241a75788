"""Runs `poolgate serve` with its workers as processes, and reaches each worker through connections of its own."""

import http.client
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Self

import psutil

from tests.fakes.up import ROOT, clean_environment, free_port
from tests.waiting import is_gone, wait_until

PEPPER = "pepper-of-the-tests"
# SO_REUSEPORT spreads connections by a hash: each try reaches a given one of two workers with probability 1/2.
TRIES_MAX = 200


class Connection:
    """One keep-alive connection, and so one worker."""

    def __init__(self, port: int, key: str = "") -> None:
        self._key = key
        self.http = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        self._reply: http.client.HTTPResponse | None = None

    def send(self, method: str, path: str, body: Any = None, key: str | None = None) -> None:
        headers = {"authorization": f"Bearer {key or self._key}", "content-type": "application/json"}
        self.http.request(method, path, None if body is None else json.dumps(body), headers)

    def ask(self, method: str, path: str, body: Any = None, key: str | None = None) -> tuple[int, bytes]:
        self.send(method, path, body, key)
        reply = self.reply()
        return reply.status, reply.read()

    def reply(self) -> http.client.HTTPResponse:
        """The answer's head has come; its body can be read."""
        self._reply = self.http.getresponse()
        return self._reply

    @property
    def local_port(self) -> int:
        port: int = self.http.sock.getsockname()[1]
        return port

    def close(self) -> None:
        if self._reply is not None:
            self._reply.close()
        self.http.close()


class Serving:
    """`with Serving(folder, database_url, redis_url) as serving:`; nothing of it is left afterwards."""

    def __init__(
        self, folder: Path, database_url: str, redis_url: str, *, key: str = "", **settings: Any
    ) -> None:
        self.port, self.key = free_port(), key
        self.log = folder / f"serve-{self.port}.log"
        self._folder = folder
        given = {"change_poll_s": 0.5, "usage_flush_s": 0.05, "heartbeat_grace_s": 600, "log_format": "json"}
        given |= {"node_networks": "127.0.0.0/8,::1/128"}
        named = {f"POOLGATE_{name.upper()}": str(value) for name, value in (given | settings).items()}
        urls = {"DATABASE_URL": database_url, "REDIS_URL": redis_url, "POOLGATE_KEY_PEPPER": PEPPER}
        self._environment = clean_environment() | named | urls | {"POOLGATE_DATA_DIR": str(folder / "data")}
        self._processes: list[psutil.Process] = []
        self._connections: list[Connection] = []
        self.process = self._start()

    def _start(self) -> "subprocess.Popen[bytes]":
        with self.log.open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "gateway", "serve", "--port", str(self.port), "--workers", "2"],
                cwd=ROOT, env=self._environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip

    def __enter__(self) -> Self:
        wait_until(self._is_ready)
        return self

    def __exit__(self, *_: object) -> None:
        for connection in self._connections:
            connection.close()
        self.workers()
        self.process.kill()
        self.process.wait()
        for process in self._processes:
            if process.is_running():
                process.kill()

    def run_another(self) -> "subprocess.CompletedProcess[str]":
        """A second one on the same port, to its end."""
        command = [sys.executable, "-m", "gateway", "serve", "--port", str(self.port)]
        environment = self._environment | {"POOLGATE_LOG_FORMAT": "human"}
        return subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False
        )

    def workers(self) -> list[psutil.Process]:
        """The worker processes now; all that were ever seen are remembered."""
        try:
            children = psutil.Process(self.process.pid).children()
        except psutil.NoSuchProcess:
            return []
        self._processes += [child for child in children if child not in self._processes]
        return [child for child in children if child.status() != psutil.STATUS_ZOMBIE]

    def each_worker(self) -> dict[int, Connection]:
        """A connection to each worker, by its process id."""
        found: dict[int, Connection] = {}
        for _ in range(TRIES_MAX):
            connection = self.connect()
            assert connection.ask("GET", "/api/health")[0] == 200
            pid = self.worker_of(connection)
            if pid in found:
                connection.close()
            else:
                found[pid] = connection
            if len(found) == len(self.workers()):
                return found
        raise AssertionError(f"after {TRIES_MAX} connections only {list(found)} were reached")

    def worker_of(self, connection: Connection) -> int:
        """Which worker has the other end: the kernel's table knows."""
        for worker in self.workers():
            ends = worker.net_connections("tcp")
            if any(end.raddr and end.raddr.port == connection.local_port for end in ends):
                return worker.pid
        raise AssertionError("no worker has this connection")

    def connect(self) -> Connection:
        """A connection that is closed at the end, if not before."""
        self._connections.append(Connection(self.port, self.key))
        return self._connections[-1]

    def metric(self, name: str, connection: Connection | None = None) -> float:
        """The sum of a metric's samples in /metrics, as any worker tells it."""
        asked = connection or self.connect()
        _, text = asked.ask("GET", "/metrics")
        lines = [line for line in text.decode().splitlines() if line.startswith((f"{name}{{", f"{name} "))]
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def leaves_nothing(self) -> bool:
        return all(is_gone(process.pid) for process in self._processes)

    def _is_ready(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        if len(self.workers()) < 2:
            return False
        try:
            found = self.each_worker()
        except (OSError, http.client.HTTPException):
            return False
        answers = [connection.ask("GET", "/ready")[0] for connection in found.values()]
        for connection in found.values():
            connection.close()
        return answers == [200, 200]
