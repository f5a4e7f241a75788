"""Fixtures of the stand-in engine, for `pytest_plugins = ["tests.fakes.engine_fixtures"]` in a conftest."""

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from tests.fakes.engine import FakeEngine

EngineFactory = Callable[..., Awaitable[FakeEngine]]


@pytest.fixture
async def engines() -> AsyncIterator[EngineFactory]:
    """Starts engines: `await engines("--block-size", "32", tokens=8)`; all are killed at the end."""
    started: list[FakeEngine] = []

    async def start(*flags: str, **knobs: Any) -> FakeEngine:
        engine = FakeEngine(*flags, **knobs)
        started.append(engine)
        await engine.start()
        return engine

    yield start
    for engine in started:
        await engine.kill()


@pytest.fixture
async def engine(engines: EngineFactory) -> FakeEngine:
    """One engine with default knobs."""
    return await engines()
