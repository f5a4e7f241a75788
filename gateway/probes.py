"""The supervisor's own listener: /ready, /health and /metrics, answered by a process that serves no turns.

A probe that goes to the main port waits behind the turns of a worker; this one asks nobody. It runs in a thread beside the
supervisor's, and reads from it only what the `Board` shows. One request a connection, each within named bounds.
"""

import asyncio
import json
import logging
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Self

from config import metrics
from gateway.worker_process import WorkerState

log = logging.getLogger("poolgate.supervisor")

HEAD_BYTES_MAX = 8192
"""Probes send some 200 bytes; a scraper some 500."""

REQUEST_S = 2.0
"""For a whole head to arrive; a probe gives up after a second or two itself."""

ANSWER_S = 10.0
"""For an answer to be read: metrics of many models are some 100 KB."""

CONNECTIONS_MAX = 64
"""At once; further ones are closed unanswered. Nobody has so many probes."""

JSON = "application/json"


@dataclass(slots=True)
class Board:
    """What the supervisor shows; each field is set as a whole, so that another thread may read it at any moment."""

    workers: Sequence[WorkerState] = ()
    is_stopping: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """What is sent back."""

    status: HTTPStatus
    content_type: str
    body: bytes


def readiness(board: Board, now_s: float) -> Answer:
    """503 unless a worker serves, and from the beginning of a stop."""
    ready = sum(worker.is_ready(now_s) for worker in board.workers)
    is_ready = ready > 0 and not board.is_stopping
    body = {"ready": is_ready, "workers": len(board.workers), "workers_ready": ready}
    return _json(HTTPStatus.OK if is_ready else HTTPStatus.SERVICE_UNAVAILABLE, body)


def health(board: Board, now_s: float) -> Answer:
    """`healthy`: all workers serve; `unhealthy`, 503: none has a loop that turns; `degraded`: anything between."""
    workers = board.workers
    if not any(worker.is_alive(now_s) for worker in workers):
        status = "unhealthy"
    else:
        status = "healthy" if all(worker.is_ready(now_s) for worker in workers) else "degraded"
    body = {
        "overall_status": status,
        "is_stopping": board.is_stopping,
        "workers": [
            {
                "pid": worker.pid,
                "ready": worker.is_ready(now_s),
                "silent_seconds": round(now_s - worker.heard_at_s, 1),
            }
            for worker in workers
        ],
    }
    return _json(HTTPStatus.SERVICE_UNAVAILABLE if status == "unhealthy" else HTTPStatus.OK, body)


class Probes:
    """`with Probes(sock, board):`; serves on a bound socket until the block ends."""

    def __init__(
        self, sock: socket.socket, board: Board, *, render: Callable[[], bytes] = metrics.merged
    ) -> None:
        self._sock = sock
        self._board = board
        self._metrics = metrics.Shared(render)
        self._open = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="probes", daemon=True)

    def __enter__(self) -> Self:
        self._sock.setblocking(False)
        self._sock.listen(CONNECTIONS_MAX)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(ANSWER_S)
        self._sock.close()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        serving = asyncio.start_server(self._answered, sock=self._sock, limit=HEAD_BYTES_MAX)
        server = self._loop.run_until_complete(serving)
        self._loop.run_forever()
        server.close()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()

    async def _answered(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, to its end."""
        self._open += 1
        try:
            if self._open <= CONNECTIONS_MAX:
                await self._answer(reader, writer)
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # too slow, too long, or gone: nothing to tell
        except Exception:
            log.exception("a probe failed", extra={"action": "probe_failed"})
        finally:
            self._open -= 1
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with asyncio.timeout(REQUEST_S):
            head = await reader.readuntil(b"\r\n\r\n")
        method, target = (*head.split(b"\r\n", 1)[0].split(b" "), b"", b"")[:2]
        answer = await self._of(method, target.partition(b"?")[0])
        lines = (
            f"HTTP/1.1 {answer.status.value} {answer.status.phrase}", f"content-type: {answer.content_type}",
            f"content-length: {len(answer.body)}", "connection: close", "", "",
        )  # fmt: skip
        writer.write("\r\n".join(lines).encode() + (b"" if method == b"HEAD" else answer.body))
        async with asyncio.timeout(ANSWER_S):
            await writer.drain()

    async def _of(self, method: bytes, path: bytes) -> Answer:
        if method not in (b"GET", b"HEAD"):
            return _json(HTTPStatus.METHOD_NOT_ALLOWED, {"error": "GET"})
        routes: dict[bytes, Callable[[], Awaitable[Answer]]] = {
            b"/ready": self._ready,
            b"/health": self._health,
            b"/metrics": self._rendered,
        }
        route = routes.get(path)
        if route is None:
            return _json(HTTPStatus.NOT_FOUND, {"error": "/ready, /health, /metrics"})
        return await route()

    async def _ready(self) -> Answer:
        return readiness(self._board, time.monotonic())

    async def _health(self) -> Answer:
        return health(self._board, time.monotonic())

    async def _rendered(self) -> Answer:
        return Answer(HTTPStatus.OK, metrics.CONTENT_TYPE, await self._metrics())


def _json(status: HTTPStatus, body: object) -> Answer:
    return Answer(status, JSON, json.dumps(body).encode())
