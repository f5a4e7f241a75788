"""Fixtures of the tests against the real engine: one system for all of them, started as its users start it."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from openai import AsyncOpenAI, OpenAI

from tests.engine.system import CHUNK_TIMEOUT_S, KEY, START_BOUND_S, System
from tests.fakes.processes import eventually
from tests.fakes.up import Up


@pytest.fixture(scope="package")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """The system of every module here; at the end it stops at a signal and leaves nothing."""
    folder: Path = tmp_path_factory.mktemp("system") / "data"
    with Up(folder, "--key", KEY, POOLGATE_CHUNK_TIMEOUT_S=str(CHUNK_TIMEOUT_S)) as up:
        up.await_ready(within_s=START_BOUND_S)
        yield System(up)
        assert up.stop() == 0
        assert eventually(up.leaves_nothing)


@pytest.fixture
def system(started: System) -> System:
    """The system, with its one engine ready and at rest: nothing of an earlier test still runs in it."""
    (engine,) = started.await_ready()
    eventually(engine.is_idle)
    return started


@pytest.fixture
def client(system: System) -> Iterator[OpenAI]:
    """The official SDK. It retries nothing, so that a test sees the first answer."""
    with OpenAI(base_url=f"{system.base_url}/v1", api_key=KEY, max_retries=0, timeout=120) as opened:
        yield opened


@pytest.fixture
async def async_client(system: System) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(
        base_url=f"{system.base_url}/v1", api_key=KEY, max_retries=0, timeout=120
    ) as opened:
        yield opened
