"""Starts and steers the stand-in vLLM (`bench.fake_engine`) as a process of its own.

What it can be told is in `bench/fake_engine/knobs.py`; fixtures are in `tests.fakes.engine_fixtures`.
"""

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROOT = Path(__file__).resolve().parents[2]
CAPTURES = ROOT / "tests" / "captures"
POLL_S = 0.01
START_WAIT_S = 20.0
STOP_WAIT_S = 10.0


class FakeEngine:
    """`async with FakeEngine("--block-size", "32", tokens=8) as engine:`; flags first, knobs by name.

    The process ends with this one, whatever happens: it reads our pipe as its standard input.
    """

    def __init__(self, *flags: str, **knobs: Any) -> None:
        self._flags = flags
        self._knobs = knobs
        self._process: subprocess.Popen[bytes] | None = None
        self.port = 0

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.kill()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        assert self._process is not None, "not started"
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    async def start(self) -> None:
        """Start, on the port of the last time if there was one."""
        command = [sys.executable, "-m", "bench.fake_engine", "--parent-stdin", "--port", str(self.port)]
        if "--replay" not in self._flags:
            command += ["--replay", str(CAPTURES)]
        command += ["--knobs", json.dumps(self._knobs), *self._flags]
        self._process = _spawn(command)
        assert self._process.stdout is not None
        line = await asyncio.wait_for(asyncio.to_thread(self._process.stdout.readline), START_WAIT_S)
        assert line, f"the stand-in engine did not start: {command}"
        self.port = int(json.loads(line)["port"])

    async def kill(self) -> None:
        """SIGKILL, and wait until the process is gone."""
        if self._process is not None:
            self._process.kill()
            await self.wait()

    def terminate(self) -> None:
        """SIGTERM; what follows is the `sigterm` knob's choice."""
        assert self._process is not None
        self._process.terminate()

    async def wait(self) -> int:
        """The exit code, once the process is gone."""
        process = self._process
        assert process is not None
        code = await asyncio.to_thread(process.wait, STOP_WAIT_S)
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
        return code

    async def restart(self) -> None:
        """Kill and start again on the same port, with the flags and knobs of the beginning."""
        await self.kill()
        await self.start()

    async def knobs(self, **changes: Any) -> dict[str, Any]:
        """Change knobs now; answers all of them."""
        status, answer = await self.ask("POST", "/_fake/knobs", changes)
        assert status == 200, answer
        return dict(answer)

    async def fault(self, kind: str, **rest: Any) -> None:
        """The next matching requests fail; `times` 1 unless given, `times=None` for every one."""
        await self.knobs(faults=[{"kind": kind, "times": 1, **rest}])

    async def record(self) -> dict[str, Any]:
        """Live counts, and under `requests` one entry a request in the order of arrival."""
        _, answer = await self.ask("GET", "/_fake/record")
        return dict(answer)

    async def requests(self) -> list[dict[str, Any]]:
        return list((await self.record())["requests"])

    async def reset(self) -> None:
        await self.ask("POST", "/_fake/reset", {})

    async def until(self, is_so: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The record, once it satisfies the condition. The test's own time-out bounds the wait."""
        while not is_so(record := await self.record()):  # noqa: ASYNC110 - the state is in another process
            await asyncio.sleep(POLL_S)
        return record

    async def ask(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """One small request outside of any client under test: (status, decoded body)."""
        data = b"" if body is None else json.dumps(body).encode()
        head = (
            f"{method} {path} HTTP/1.1\r\nhost: fake\r\nconnection: close\r\n"
            f"content-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
        )
        raw = await self.send(head.encode() + data)
        head_bytes, _, answer = raw.partition(b"\r\n\r\n")
        is_json = b"content-type: application/json" in head_bytes
        return int(head_bytes.split()[1]), json.loads(answer) if is_json else answer.decode()

    async def send(self, data: bytes) -> bytes:
        """Write bytes on a fresh connection and read until the engine closes it."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(data)
            await writer.drain()
            return await reader.read()
        finally:
            writer.close()
            await writer.wait_closed()


def _spawn(command: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
