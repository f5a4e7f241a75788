"""Two nodes with a real engine each, one of them killed under load: who got nothing yet is served by the other."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
from openai import AsyncOpenAI

from nodes.agent.build import engine_status
from tests.engine.system import MODEL, EngineRow, System, now
from tests.fakes.processes import all_gone, eventually
from tests.fakes.up import ROOT, clean_environment

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

MESSAGES: list[Any] = [{"role": "user", "content": "Tell a story."}]
# Long enough to be under way when the engine is killed; two engines on two cores make 100 tokens a second each.
LONG, SHORT = 160, 32
TURNS = 8
END_BOUND_S = 180.0


@pytest.fixture
def second(system: System, tmp_path: Path) -> Iterator[EngineRow]:
    """The ready engine of a second agent, which joins as on a host of its own."""
    made = subprocess.run(
        [sys.executable, "-m", "gateway", "key", "create", "--account", "this machine", "--scope", "node", "--json",
         "--data-dir", str(system.up.folder)],
        cwd=ROOT, env=clean_environment(), capture_output=True, check=True, timeout=60,
    )  # fmt: skip
    (model,) = engine_status(Path(sys.prefix) / "engine").models
    agent = subprocess.Popen(
        [sys.executable, "-m", "gateway", "agent", "--gateway", system.base_url, "--data-dir", str(tmp_path / "node"),
         "--model", str(model)],
        cwd=ROOT, env=clean_environment() | {"POOLGATE_AGENT_KEY": json.loads(made.stdout)["key"]},
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    processes = [agent.pid]
    try:
        first, joined = system.await_ready(2)
        assert first.node_id != joined.node_id
        eventually(lambda: engines_in_use(system) == 2)
        processes += [process.pid for process in psutil.Process(agent.pid).children(recursive=True)]
        yield joined
        agent.send_signal(signal.SIGTERM)
        assert agent.wait(60) == 0
        all_gone(processes)
    finally:
        if agent.poll() is None:
            os.kill(agent.pid, signal.SIGKILL)
            agent.wait()


def engines_in_use(system: System) -> int:
    """How many engines the gateway sends turns to."""
    with urllib.request.urlopen(f"{system.base_url}/metrics", timeout=30) as answer:
        found = re.search(r"^poolgate_engines_ready (\S+)$", answer.read().decode(), re.MULTILINE)
    assert found
    return int(float(found[1]))


@dataclass
class Turn:
    """How one turn went as its client saw it; `chunks` is 0 for one that is not streamed."""

    chunks: int = 0
    tokens: int = 0
    error: openai.APIError | None = None


async def streamed(client: AsyncOpenAI, turn: Turn, tokens: int) -> Turn:
    try:
        stream = await client.chat.completions.create(
            model=MODEL, messages=MESSAGES, max_tokens=tokens, extra_body={"ignore_eos": True}, stream=True,
            stream_options={"include_usage": True},
        )  # fmt: skip
        async with stream:
            async for chunk in stream:
                turn.chunks += bool(chunk.choices and chunk.choices[0].delta.content)
                turn.tokens = chunk.usage.completion_tokens if chunk.usage else 0
    except openai.APIError as error:
        turn.error = error
    return turn


async def whole(client: AsyncOpenAI) -> Turn:
    try:
        chat = await client.chat.completions.create(
            model=MODEL, messages=MESSAGES, max_tokens=SHORT, extra_body={"ignore_eos": True}
        )
    except openai.APIError as error:
        return Turn(error=error)
    assert chat.usage is not None
    return Turn(tokens=chat.usage.completion_tokens)


async def test_only_begun_turns_of_a_killed_engine_see_an_error(
    async_client: AsyncOpenAI, system: System, second: EngineRow
) -> None:
    def running() -> float:
        return second.metric("num_requests_running")

    begun_at, server = now(), second.server()
    begun = [Turn() for _ in range(TURNS)]
    streams = [asyncio.create_task(streamed(async_client, turn, LONG)) for turn in begun]
    await asyncio.to_thread(eventually, lambda: all(turn.chunks for turn in begun))
    begun_there = await asyncio.to_thread(running)
    wholes: list[asyncio.Task[Turn]] = []
    async with asyncio.timeout(END_BOUND_S):
        while (
            await asyncio.to_thread(running) <= begun_there
        ):  # until some are there too, wherever the first ones went
            wholes += [asyncio.create_task(whole(async_client)) for _ in range(TURNS)]
            await asyncio.sleep(0.2)
    server.kill()
    late = [asyncio.create_task(streamed(async_client, Turn(), SHORT)) for _ in range(TURNS)]
    late += [asyncio.create_task(whole(async_client)) for _ in range(TURNS)]
    async with asyncio.timeout(END_BOUND_S):
        await asyncio.gather(*streams)
        unbegun = await asyncio.gather(*wholes, *late)

    assert [turn.error for turn in unbegun if turn.error] == []
    assert {turn.tokens for turn in unbegun} == {SHORT}
    cut = [turn for turn in begun if turn.error]
    assert cut
    assert {(turn.error.type, turn.error.code) for turn in cut if turn.error} == {
        ("server_error", "engine_failed")
    }
    assert {turn.tokens for turn in begun if not turn.error} <= {LONG}

    rows = await asyncio.to_thread(system.rows, begun_at, len(begun) + len(unbegun))
    failed = [row for row in rows if row.outcome != "finished"]
    assert {(row.outcome, row.node_id) for row in failed} == {("engine_failed", second.node_id)}
    assert len(failed) == len(cut)
    # What a client saw is charged: a chunk carries at least a token.
    charged = sorted(row.completion_tokens for row in failed)
    seen = sorted(turn.chunks for turn in cut)
    assert all(tokens >= chunks > 0 for tokens, chunks in zip(charged, seen, strict=True))
