"""Keeps one engine in each slot of the host: one a model folder, and one an engine that others run.

Divides the hardware among them and names them. How an engine lives is `engine`'s and `attached`'s affair.
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
from nodes.agent.command import Command, Hardware, ModelSpec, engine_command, share_hardware
from nodes.agent.engine import Engine
from nodes.agent.probe import EngineProbe
from nodes.agent.slot import Slot
from nodes.agent.stopping import Stopping
from nodes.protocol import EngineLoad, EngineReport


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
        override: Sequence[str] = (),
    ) -> None:
        names = _unique([_slug(model.name) for model in models])
        shares = share_hardware(len(models), gpus=gpus, cores=cores, openmp=find_openmp(python))
        self._engines: list[Engine | AttachedEngine] = [
            Engine(
                Slot(name, "http://127.0.0.1:0", changed),
                command=partial(_command, model, share, python, tuple(override)),
                probe=partial(EngineProbe, session),
                announce=announce,
                stopping=stopping,
                settings=settings,
                folder=folder,
                kind=model.kind,
            )
            for name, model, share in zip(names, models, shares, strict=True)
        ]
        names = _unique([*names, *(_slug(urlsplit(url).netloc) for url in engine_urls)])[len(models) :]
        self._engines += [
            AttachedEngine(
                Slot(name, url, changed),
                probe=EngineProbe(session, url),
                announce=announce,
                stopping=stopping,
                settings=settings,
            )
            for name, url in zip(names, engine_urls, strict=True)
        ]

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for engine in self._engines:
                group.create_task(engine.run(), name=f"engine {engine.slot.engine_id}")

    def reports(self) -> tuple[EngineReport, ...]:
        return tuple(engine.slot.report() for engine in self._engines)

    def loads(self) -> dict[str, EngineLoad]:
        return {engine.slot.engine_id: engine.slot.load for engine in self._engines}


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


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.-]+", "-", name).strip("-.")[:100] or "engine"


def _unique(names: Sequence[str]) -> list[str]:
    """A second `llama` becomes `llama-2`."""
    unique: list[str] = []
    for name in names:
        number, candidate = 1, name
        while candidate in unique:
            number += 1
            candidate = f"{name}-{number}"
        unique.append(candidate)
    return unique
