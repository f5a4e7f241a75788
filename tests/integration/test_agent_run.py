"""The whole agent against real engine processes (stand-ins) and a gateway that takes its heartbeats."""

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from config.defaults import Settings
from nodes.agent import engine as engine_module
from nodes.agent.arguments import CannotStart
from nodes.agent.main import AgentOptions, run_agent
from nodes.protocol import EngineLoad, EngineReport, Heartbeat
from tests.fakes.engine import FakeEngine
from tests.fakes.heartbeats import HeartbeatGateway, heartbeat_gateway
from tests.fakes.processes import all_gone
from tests.fakes.tree_engine import __file__ as TREE_ENGINE

ROOT = Path(__file__).parents[2]
QUICK = Settings(engine_poll_s=0.05, engine_restart_s=0.05, engine_restart_max_s=0.2, engine_drain_s=60.0)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "toy"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
async def gateway() -> AsyncIterator[HeartbeatGateway]:
    async with heartbeat_gateway() as gateway:
        yield gateway


@pytest.fixture(autouse=True)
def _no_process_left() -> Iterator[None]:
    before = set(psutil.Process().children(recursive=True))
    yield
    all_gone(process.pid for process in set(psutil.Process().children(recursive=True)) - before)


def options(gateway: str, model: Path, **changes: Any) -> AgentOptions:
    steering = model.parent
    values: dict[str, Any] = {
        "gateway": gateway,
        "key": "dc1-provider-test",
        "data_dir": steering / "data",
        "models": (model,),
        "engine_command": (sys.executable, TREE_ENGINE, "{port}", "{model}", str(steering)),
        "settings": QUICK,
    }
    return AgentOptions(**{**values, **changes})


@asynccontextmanager
async def running(agent: AgentOptions) -> AsyncIterator["asyncio.Task[None]"]:
    """An agent in this process; it gets SIGTERM at the end."""
    task = asyncio.create_task(run_agent(agent))
    try:
        yield task
        if not task.done():  # without an agent the signal would end pytest
            stop()
    except BaseException:
        task.cancel()
        raise
    finally:
        await asyncio.wait({task})
    await task


def stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def only(beat: Heartbeat) -> EngineReport:
    (engine,) = beat.engines
    return engine


def pids(model: Path) -> dict[str, int]:
    lines = (model.parent / "pids").read_text().splitlines()
    return {name: int(pid) for name, pid in (line.split() for line in lines)}


async def test_a_started_engine_is_reported_with_what_it_serves(
    gateway: HeartbeatGateway, model: Path
) -> None:
    async with running(options(gateway.url, model)):
        first = await gateway.until(lambda _: True)
        assert (first.epoch, first.api_key, first.cached_models) == (0, "dc1-provider-test", ("toy",))
        ready = await gateway.until(lambda beat: only(beat).state == "ready" and beat.epoch == 7)
        engine = only(ready)
        assert (engine.engine_id, engine.restarts, engine.block_size, engine.kv_tokens) == (
            "toy",
            0,
            32,
            4096,
        )
        assert [(model.id, model.context_length) for model in engine.models] == [("toy", 64)]
        assert engine.url.startswith("http://127.0.0.1:")
        assert ready.load == {"toy": EngineLoad()}
        assert ready.node_id == first.node_id == (model.parent / "data" / "node_id").read_text().strip()
    assert only(gateway.beats[-1]).state == "stopped"


async def test_an_engine_drains_until_its_turns_have_ended(gateway: HeartbeatGateway, model: Path) -> None:
    load = model.parent / "running"
    load.write_text("2")
    async with running(options(gateway.url, model)) as agent:
        await gateway.until(lambda beat: beat.load.get("toy", EngineLoad()).running == 2)
        stop()
        await gateway.until_state("draining")
        seen = len(gateway.beats)
        await gateway.until_state("draining", after=seen + 5)  # it goes on draining, and its processes live
        assert psutil.pid_exists(pids(model)["engine"])
        load.write_text("0")
        await asyncio.wait({agent})
        load.unlink()
    states = [only(beat).state for beat in gateway.beats]
    assert states[-1] == "stopped"
    assert "failed" not in states


async def test_a_second_signal_cuts_the_drain(gateway: HeartbeatGateway, model: Path) -> None:
    (model.parent / "running").write_text("1")
    async with running(options(gateway.url, model)):
        await gateway.until_state("ready")
        stop()
        await gateway.until_state("draining")
    assert only(gateway.beats[-1]).state == "stopped"


async def test_an_engine_that_ignores_sigterm_is_killed(
    gateway: HeartbeatGateway, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "END_GRACE_S", 0.2)
    (model.parent / "stubborn").touch()
    async with running(options(gateway.url, model)):
        await gateway.until_state("ready")
        all_pids = pids(model)
    all_gone(all_pids.values())


@pytest.mark.parametrize("victim", ["engine", "watchdog"])
async def test_a_killed_engine_is_reported_and_started_again(
    gateway: HeartbeatGateway, model: Path, victim: str
) -> None:
    async with running(options(gateway.url, model)):
        await gateway.until_state("ready")
        old = pids(model)
        engine = psutil.Process(old["engine"])
        (engine if victim == "engine" else engine.parent()).kill()
        failed = only(await gateway.until(lambda beat: "was killed by signal 9" in only(beat).reason))
        assert failed.state in (
            "failed",
            "starting",
        )  # the pause between them may be shorter than a heartbeat's gap
        again = only(
            await gateway.until(lambda beat: only(beat).state == "ready" and only(beat).restarts == 1)
        )
        assert again.engine_id == failed.engine_id
        all_gone(old.values())


async def test_the_last_words_of_an_engine_that_does_not_start_are_reported(
    gateway: HeartbeatGateway, model: Path
) -> None:
    broken = model.parent / "broken"
    broken.touch()
    async with running(options(gateway.url, model)):
        failed = await gateway.until(lambda beat: "code 3" in only(beat).reason and only(beat).restarts >= 3)
        assert "exited with code 3" in only(failed).reason
        assert "RuntimeError: the tree is broken" in only(failed).reason
        broken.unlink()
        await gateway.until_state("ready")


async def test_an_engine_that_is_never_ready_is_ended_and_says_so(
    gateway: HeartbeatGateway, model: Path
) -> None:
    unwell = model.parent / "unwell"
    unwell.touch()
    slow = Settings(engine_poll_s=0.05, engine_restart_s=0.05, engine_start_timeout_s=1.0)
    async with running(options(gateway.url, model, settings=slow)):
        failed = only(await gateway.until(lambda beat: "was not ready after" in only(beat).reason))
        assert "/health answered 503" in failed.reason
        assert "tree engine is starting" in failed.reason
        unwell.unlink()
        await gateway.until_state("ready")


async def test_an_engine_that_stops_being_healthy_is_replaced(gateway: HeartbeatGateway, model: Path) -> None:
    async with running(options(gateway.url, model)):
        await gateway.until_state("ready")
        old = pids(model)
        (model.parent / "unwell").touch()
        words = "failed 3 checks in a row (/health answered 503)"
        await gateway.until(lambda beat: words in only(beat).reason)
        all_gone(old.values())
        (model.parent / "unwell").unlink()
        await gateway.until(lambda beat: only(beat).state == "ready" and only(beat).restarts == 1)


async def test_an_engine_that_does_not_answer_is_replaced(
    gateway: HeartbeatGateway, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nodes.agent.probe.PROBE_TIMEOUT_S", 0.3)
    async with running(options(gateway.url, model)):
        await gateway.until_state("ready")
        (model.parent / "silent").touch()
        await gateway.until(lambda beat: "no answer within" in only(beat).reason)
        (model.parent / "silent").unlink()
        await gateway.until(lambda beat: only(beat).state == "ready" and only(beat).restarts >= 1)


async def test_an_engine_outlives_a_gateway_that_goes_and_comes(model: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    async with running(options(f"http://127.0.0.1:{port}", model)):
        async with heartbeat_gateway(port) as first:
            ready = await first.until_state("ready")
            engine = pids(model)["engine"]
        async with heartbeat_gateway(port) as second:
            again = await second.until(lambda _: True)
            assert only(again).state == "ready"
            assert (again.node_id, only(again).restarts) == (ready.node_id, 0)
            assert pids(model)["engine"] == engine


async def test_a_refused_key_is_said_once_and_ends_nothing(
    gateway: HeartbeatGateway, model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("nodes.agent.reporter.REFUSED_RETRY_S", 0.05)
    monkeypatch.setattr("nodes.agent.main.LAST_WORD_S", 0.1)
    gateway.status = 401
    with caplog.at_level(logging.INFO, logger="poolgate.agent"):
        async with running(options(gateway.url, model)):
            await gateway.until(lambda beat: only(beat).state == "ready", after=3)
            gateway.status = 200
            await gateway.until(lambda beat: beat.epoch == 7)
    refusals = [record for record in caplog.records if getattr(record, "action", "") == "key_refused"]
    assert len(refusals) == 1
    assert "refuses the key (as told)" in refusals[0].getMessage()
    assert "dc1-provider-test" not in caplog.text


async def test_an_attached_engine_is_watched_and_left_alone(gateway: HeartbeatGateway, model: Path) -> None:
    async with FakeEngine() as engine:
        agent = options(gateway.url, model, models=(), engine_urls=(engine.url,))
        async with running(agent):
            ready = only(await gateway.until_state("ready"))
            assert (ready.url, ready.engine_id) == (engine.url, f"127.0.0.1-{engine.port}")
            assert ready.models
            assert ready.models[0].kind == "generate"
            await engine.kill()
            assert engine.url in only(await gateway.until_state("failed")).reason
            seen = len(gateway.beats)
            await engine.start()
            await gateway.until_state("ready", after=seen)
        assert engine.is_alive
        states = [only(beat).state for beat in gateway.beats]
        assert "draining" in states
        assert states[-1] == "stopped"


async def test_an_agent_without_engines_reports_its_node(gateway: HeartbeatGateway, model: Path) -> None:
    async with running(options(gateway.url, model, models=())):
        beat = await gateway.until(lambda beat: beat.epoch == 7)
        assert beat.engines == ()
        assert beat.resource_spec["cpu_count"] > 0


async def test_a_second_agent_on_the_same_data_is_refused(gateway: HeartbeatGateway, model: Path) -> None:
    async with running(options(gateway.url, model, models=())):
        await gateway.until(lambda _: True)
        with pytest.raises(CannotStart, match="another agent runs on"):
            await run_agent(options(gateway.url, model, models=()))


async def test_a_folder_without_a_model_is_refused_at_the_start(model: Path) -> None:
    (model / "config.json").unlink()
    with pytest.raises(CannotStart, match=r"no config\.json"):
        await run_agent(options("http://127.0.0.1:1", model))


AGENT = """
import asyncio, sys
from pathlib import Path
from config.defaults import Settings
from nodes.agent.main import AgentOptions, run_agent
gateway, model, data, *command = sys.argv[1:]
asyncio.run(run_agent(AgentOptions(
    gateway=gateway, key="k", data_dir=Path(data), models=(Path(model),), engine_command=tuple(command),
    settings=Settings(engine_poll_s=0.05),
)))
"""


async def test_no_engine_outlives_a_killed_agent(gateway: HeartbeatGateway, model: Path) -> None:
    told = options(gateway.url, model)
    command = [sys.executable, "-c", AGENT, gateway.url, str(model), str(told.data_dir), *told.engine_command]
    agent = await asyncio.create_subprocess_exec(*command, cwd=ROOT)
    await gateway.until_state("ready")
    processes = pids(model)
    agent.kill()
    await agent.wait()
    all_gone(processes.values())
