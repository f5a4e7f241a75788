"""Runs `poolgate up` as a person would, and sees every process that comes of it.

What should hold is said by the tests.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Self

import psutil

from config.compiled import SWITCH
from tests.fakes.processes import eventually

ROOT = Path(__file__).resolve().parents[2]
READY = "Ctrl-C stops everything."


class Up:
    """`with Up(folder, "--engine-url", url) as up:`; at the end nothing of it is left, whatever the test did."""

    def __init__(self, folder: Path, *options: str, port: int | None = None, **variables: str) -> None:
        self.folder = folder
        self.port = port or free_port()
        self.out, self.err = folder.parent / f"{folder.name}.out", folder.parent / f"{folder.name}.err"
        self._command = [
            sys.executable, "-m", "gateway", "up", "--port", str(self.port), "--data-dir", str(folder), *options,
        ]  # fmt: skip
        self._environment = clean_environment() | variables
        self._process: subprocess.Popen[bytes] | None = None
        self._seen: dict[int, psutil.Process] = {}

    def __enter__(self) -> Self:
        with self.out.open("wb") as out, self.err.open("wb") as err:
            self._process = subprocess.Popen(
                self._command, cwd=ROOT, env=self._environment, stdin=subprocess.DEVNULL, stdout=out, stderr=err,
                start_new_session=True,
            )  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        self.tree()
        self.process.kill()
        self.process.wait()
        for process in self._seen.values():
            if process.is_running():  # false where the number is another process's by now
                process.kill()

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None
        return self._process

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def told(self) -> str:
        """What it printed so far: results and progress."""
        return self.out.read_text() + self.err.read_text()

    @property
    def key(self) -> str:
        found = re.search(r"API key +(\S+)", self.out.read_text())
        assert found, self.told
        return found[1]

    def await_words(self, words: str, *, within_s: float = 60.0) -> None:
        def said() -> bool:
            assert words in self.told or self.process.poll() is None, self.told
            return words in self.told

        eventually(said, within_s=within_s)

    def await_ready(self, *, within_s: float = 60.0) -> None:
        self.await_words(READY, within_s=within_s)
        self.tree()

    def tree(self) -> list[psutil.Process]:
        """Every process of it now; all that were ever seen are remembered."""
        try:
            top = psutil.Process(self.process.pid)
            found = [top, *top.children(recursive=True)]
        except psutil.NoSuchProcess:
            found = []
        self._seen |= {process.pid: process for process in found}
        return found

    def part(self, name: str) -> psutil.Process | None:
        """supervisor, worker, agent, postgres or valkey; None while there is none."""
        return next((process for process in self.tree() if self._is(process, name)), None)

    def alive(self) -> list[str]:
        """Which of all that were ever seen still run."""
        return [
            f"{process.pid} {' '.join(process.cmdline())[:120]}"
            for process in self._seen.values()
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        ]

    def leaves_nothing(self) -> bool:
        try:
            return not self.alive()
        except psutil.NoSuchProcess:  # it ended between the two questions
            return False

    def stop(self, number: signal.Signals = signal.SIGTERM, *, within_s: float = 60.0) -> int:
        self.tree()
        self.process.send_signal(number)
        return self.process.wait(within_s)

    def chat(self, model: str = "fake-model", key: str | None = None, max_tokens: int = 8) -> tuple[int, Any]:
        """Status and body of a small chat; status 0 while nothing answers."""
        body = {"model": model, "max_tokens": max_tokens, "messages": [{"role": "user", "content": "hello"}]}
        request = urllib.request.Request(
            f"{self.base_url}/v1/chat/completions",
            data=json.dumps(body).encode(),
            headers={"Authorization": f"Bearer {key or self.key}", "Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)
        except OSError:
            return 0, None

    def _is(self, process: psutil.Process, name: str) -> bool:
        try:
            words, parent = process.cmdline(), process.ppid()
        except psutil.NoSuchProcess:
            return False
        if name in ("postgres", "valkey"):
            return bool(words) and name in Path(words[0]).name and parent == self.process.pid
        wanted = {
            "supervisor": ("gateway", "serve"),
            "worker": ("-m", "gateway.worker"),
            "agent": ("gateway", "agent"),
        }
        return words[2:4] == [*wanted[name]] or words[1:3] == [*wanted[name]]


def clean_environment() -> dict[str, str]:
    """Ours without what would change poolgate's settings."""
    return {
        name: value
        for name, value in os.environ.items()
        if name == SWITCH or not (name.startswith("POOLGATE_") or name in ("DATABASE_URL", "REDIS_URL"))
    }


def free_port() -> int:
    """A port that nothing listens on now, chosen by the system."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port
