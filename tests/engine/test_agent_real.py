"""The agent with the real vLLM: it gets ready, serves, survives each kill, and nothing is left when it ends."""

import asyncio
import os
import signal
import sys
from pathlib import Path

import aiohttp
import psutil
import pytest

from config.defaults import Settings
from nodes.agent.build import engine_status
from nodes.agent.main import AgentOptions, run_agent
from nodes.protocol import EngineReport, Heartbeat
from tests.fakes.heartbeats import heartbeat_gateway
from tests.fakes.processes import all_gone

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

ENGINE = engine_status(Path(sys.prefix) / "engine")
START_S = 240.0  # 23-32 s on two idle cores
QUICK = Settings(engine_restart_s=0.5, engine_poll_s=0.5)


def only(beat: Heartbeat) -> EngineReport:
    (engine,) = beat.engines
    return engine


def engine_processes(root: psutil.Process) -> dict[str, psutil.Process]:
    """By what they are: watchdog, api, core, worker, and whatever else vLLM has (its resource tracker)."""
    found = {}
    for process in root.children(recursive=True):
        command = " ".join(process.cmdline())
        if "watchdog.py" in command:
            found["watchdog"] = process
        elif "EngineCore" in command:
            found["core"] = process
        elif "Worker" in command:
            found["worker"] = process
        elif "vllm.entrypoints.cli.main" in command:
            found["api"] = process
        else:
            found[f"other-{process.pid}"] = process
    return found


async def chat(url: str, tokens: int) -> dict[str, object]:
    body = {
        "model": "smollm2-135m",
        "messages": [{"role": "user", "content": "Hello"}],
        "max_tokens": tokens,
        "ignore_eos": True,
    }
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{url}/v1/chat/completions", json=body) as response,
    ):
        assert response.status == 200
        answer: dict[str, object] = await response.json()
        return answer


async def test_vllm_serves_survives_each_kill_and_drains(tmp_path: Path) -> None:
    assert ENGINE.is_ready, ENGINE.detail
    async with heartbeat_gateway() as gateway:
        options = AgentOptions(
            gateway=gateway.url, key="k", data_dir=tmp_path, models=ENGINE.models, settings=QUICK
        )
        agent = asyncio.create_task(run_agent(options))
        ready = only(await gateway.until_state("ready", within_s=START_S))
        (model,) = ready.models
        assert (model.id, model.context_length, model.kind) == ("smollm2-135m", 8192, "generate")
        assert (ready.block_size, ready.kv_tokens > 40_000) == (32, True)

        for number, victim in enumerate(("worker", "core", "api", "watchdog"), start=1):
            processes = engine_processes(psutil.Process())
            assert set(processes) >= {"watchdog", "api", "core", "worker"}
            processes[victim].kill()
            again = await gateway.until(
                lambda beat, number=number: only(beat).state == "ready" and only(beat).restarts == number,
                within_s=START_S,
            )
            all_gone(process.pid for process in processes.values())

        turn = asyncio.create_task(chat(only(again).url, 200))
        await gateway.until(lambda beat: beat.load["smollm2-135m"].running == 1)
        processes = engine_processes(psutil.Process())
        os.kill(os.getpid(), signal.SIGTERM)
        answer = await turn  # begun before the drain, so it ends well
        assert answer["usage"]["completion_tokens"] == 200  # type: ignore[index]
        await agent
        assert only(gateway.beats[-1]).state == "stopped"
        assert any(only(beat).state == "draining" for beat in gateway.beats)
        all_gone(process.pid for process in processes.values())


AGENT = """
import asyncio, sys
from pathlib import Path
from nodes.agent.main import AgentOptions, run_agent
gateway, model, data = sys.argv[1:]
asyncio.run(run_agent(AgentOptions(gateway=gateway, key="k", data_dir=Path(data), models=(Path(model),))))
"""


async def test_no_process_of_vllm_outlives_a_killed_agent(tmp_path: Path) -> None:
    assert ENGINE.is_ready, ENGINE.detail
    async with heartbeat_gateway() as gateway:
        command = [sys.executable, "-c", AGENT, gateway.url, str(ENGINE.models[0]), str(tmp_path)]
        agent = await asyncio.create_subprocess_exec(*command, cwd=Path(__file__).parents[2])
        await gateway.until_state("ready", within_s=START_S)
        processes = engine_processes(psutil.Process(agent.pid))
        assert set(processes) >= {"watchdog", "api", "core", "worker"}
        agent.kill()
        await agent.wait()
        all_gone(process.pid for process in processes.values())
