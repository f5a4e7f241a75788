"""Asks one vLLM server over HTTP how it is (health, models, metrics), and to sleep, wake, and load adapters.

Every question has a time-out and a bounded answer. What the answers mean for the engine's state is left to
`engine` and `attached`.
"""

import asyncio
import json
from typing import Any

import aiohttp

from nodes.agent.metrics import EngineMetrics, parse_metrics
from nodes.protocol import GENERATE, MODELS_MAX, POOLING, TEXT_MAX, ModelInfo

PROBE_TIMEOUT_S = 10.0  # a server on fully used cores answers in seconds; a hung one never
CHANGE_TIMEOUT_S = 120.0  # waking moves all weights back to the GPU
ANSWER_BYTES_MAX = 4 * 2**20  # /metrics has 50-80 KB
IDLE_CONNECTION_S = 3.0  # vLLM's server closes idle connections at 5 s


class ProbeFailed(Exception):
    """The engine did not answer as it should; the text says how."""


def probe_session() -> aiohttp.ClientSession:
    """One for all engines of an agent. No proxies: engines are on this host or its own network."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(keepalive_timeout=IDLE_CONNECTION_S),
        timeout=aiohttp.ClientTimeout(total=PROBE_TIMEOUT_S),
        cookie_jar=aiohttp.DummyCookieJar(),
    )


class EngineProbe:
    """Questions to the server at `url`; each raises `ProbeFailed`."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session = session
        self._url = url

    async def check_health(self) -> None:
        await self._get("/health")

    async def metrics(self) -> EngineMetrics:
        return parse_metrics(await self._get("/metrics"))

    async def models(self, kind: str) -> tuple[ModelInfo, ...]:
        """What it serves, LoRA adapters among it, without the paths that vLLM tells."""
        try:
            listed: Any = json.loads(await self._get("/v1/models"))
            return tuple(_model(entry, kind) for entry in listed["data"][:MODELS_MAX])
        except (ValueError, KeyError, TypeError) as error:
            raise ProbeFailed("/v1/models is not a list of models") from error

    async def kind(self) -> str:
        """A pooling server has no chat route: 404 there, where a generating one says 405 to a GET."""
        if await self._status("/v1/chat/completions") == 404 and await self._status("/v1/embeddings") == 405:
            return POOLING
        return GENERATE

    # --- and requests -------------------------------------------------------------------------------------------

    async def sleep(self) -> None:
        """Give back the memory of weights and KV cache; turns would wait until it wakes."""
        await self._post("/sleep?level=1")

    async def wake(self) -> None:
        await self._post("/wake_up")

    async def load_adapter(self, name: str, folder: str) -> None:
        await self._post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": folder})

    async def unload_adapter(self, name: str) -> None:
        await self._post("/v1/unload_lora_adapter", {"lora_name": name})

    async def _post(self, path: str, body: object = None) -> None:
        timeout = aiohttp.ClientTimeout(total=CHANGE_TIMEOUT_S)
        try:
            async with self._session.post(
                self._url + path, json=body, timeout=timeout, allow_redirects=False
            ) as answer:
                if answer.status != 200:
                    said = (await answer.content.read(2000)).decode(errors="replace")
                    raise ProbeFailed(f"{path.partition('?')[0]} answered {answer.status}: {said[:300]}")
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            raise ProbeFailed(f"{path}: {_words(error)}") from error

    async def _status(self, path: str) -> int:
        try:
            async with self._session.get(self._url + path, allow_redirects=False) as response:
                return response.status
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            raise ProbeFailed(f"{path}: {_words(error)}") from error

    async def _get(self, path: str) -> bytes:
        body = bytearray()
        try:
            async with self._session.get(self._url + path, allow_redirects=False) as response:
                if response.status != 200:
                    raise ProbeFailed(f"{path} answered {response.status}")
                async for chunk in response.content.iter_any():
                    body += chunk
                    if len(body) > ANSWER_BYTES_MAX:
                        raise ProbeFailed(f"{path} answered more than {ANSWER_BYTES_MAX} bytes")
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            raise ProbeFailed(f"{path}: {_words(error)}") from error
        return bytes(body)


def _model(entry: dict[str, Any], kind: str) -> ModelInfo:
    name, length, parent = entry["id"], entry.get("max_model_len"), entry.get("parent")
    if not isinstance(name, str) or not 0 < len(name) <= TEXT_MAX:
        raise ValueError(name)
    return ModelInfo(
        id=name,
        context_length=length if isinstance(length, int) and length > 0 else 0,
        kind=kind,
        parent=parent if isinstance(parent, str) and parent else None,
    )


def _words(error: BaseException) -> str:
    if isinstance(error, asyncio.TimeoutError):
        return f"no answer within {PROBE_TIMEOUT_S:.0f} s"
    return str(error) or type(error).__name__
