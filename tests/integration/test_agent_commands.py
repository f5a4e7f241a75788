"""The agent does what it is told, each thing once: models come and make room, engines stop, sleep and wake, adapters load.

Engines are stand-ins, commands ride in heartbeats' replies; GPUs are a telemetry file.
"""

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from nodes.agent.download import DownloadFailed, download_model
from nodes.agent.main import AgentOptions
from nodes.control_messages import Command
from nodes.protocol import EngineReport, Heartbeat
from tests.fakes.heartbeats import HeartbeatGateway, heartbeat_gateway
from tests.fakes.hub import NAME, model_hub
from tests.integration.test_agent_run import QUICK, running


@pytest.fixture
async def gateway() -> AsyncIterator[HeartbeatGateway]:
    async with heartbeat_gateway() as gateway:
        yield gateway


def model_in(folder: Path, name: str, **described: Any) -> Path:
    path = folder / name
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    (path / "poolgate.json").write_text(json.dumps({"name": name} | described))
    return path


def gpus(tmp_path: Path, count: int = 1, *, temp_c: int = 40) -> Path:
    file = tmp_path / "telemetry.json"
    part = file.with_suffix(".part")
    part.write_text(json.dumps([{"name": "Stand-in", "vram_mib": 10_000, "temp_c": temp_c}] * count))
    part.replace(file)
    return file


def options(gateway: HeartbeatGateway, tmp_path: Path, *models: Path, **settings: Any) -> AgentOptions:
    engine = (sys.executable, "-m", "bench.fake_engine", "--port", "{port}", "--served-model-name", "{model}")
    return AgentOptions(
        gateway=gateway.url, key="k", data_dir=tmp_path / "data", models=models,
        engine_command=(*engine, "--enable-lora", "--dev-mode"),
        settings=replace(QUICK, engine_drain_s=5.0, model_source="", **settings),
    )  # fmt: skip


@asynccontextmanager
async def serving(agent: AgentOptions, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    """The stand-in is a module of this repository, which engines' own folders are not."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    async with running(agent):
        yield


class Boss:
    """Gives commands in the replies, and waits for what comes of them."""

    def __init__(self, gateway: HeartbeatGateway) -> None:
        self.gateway = gateway
        self.given = 0

    async def says(self, name: str, *, until: str = "done", **arguments: str) -> str:
        """What the agent said at the end; the command is repeated in every reply, as gateways do."""
        self.given += 1
        command, seen = Command(self.given, name, arguments), len(self.gateway.beats)
        self.gateway.reply = replace(self.gateway.reply, commands=(command.to_json(),))
        beat = await self.gateway.until(lambda beat: has_ended(beat, command.id), after=seen)
        self.gateway.reply = replace(self.gateway.reply, commands=())
        last = next(report for report in beat.progress if report["id"] == command.id)
        assert last["status"] == until, last
        return str(last["detail"])

    async def until_states(self, **states: str) -> Heartbeat:
        seen = max(0, len(self.gateway.beats) - 1)
        return await self.gateway.until(lambda beat: states_of(beat) == states, after=seen)

    async def wants(self, **changes: Any) -> None:
        """From the next reply on."""
        self.gateway.reply = replace(self.gateway.reply, **changes)


def has_ended(beat: Heartbeat, command_id: int) -> bool:
    return any(
        report["id"] == command_id and report["status"] in ("done", "failed") for report in beat.progress
    )


def states_of(beat: Heartbeat) -> dict[str, str]:
    return {engine.engine_id: engine.state for engine in beat.engines}


def engine_of(beat: Heartbeat, name: str) -> EngineReport:
    return next(engine for engine in beat.engines if engine.engine_id == name)


async def test_engines_stop_start_and_restart_by_command(gateway, tmp_path, monkeypatch):
    boss = Boss(gateway)
    async with serving(options(gateway, tmp_path, model_in(tmp_path, "toy")), monkeypatch):
        await boss.until_states(toy="ready")
        await boss.says("stop_engine", engine_id="toy")
        stopped = await boss.until_states(toy="stopped")
        assert engine_of(stopped, "toy").reason == "stopped by command"
        refused = await boss.says("restart_engine", until="failed", engine_id="toy")
        assert refused == "engine toy does not run: stopped by command"
        await boss.says("start_engine", engine_id="toy")
        await boss.until_states(toy="ready")
        before = engine_of(gateway.beats[-1], "toy").restarts
        await boss.says("restart_engine", engine_id="toy")
        again = await boss.until_states(toy="ready")
        assert engine_of(again, "toy").restarts == before + 1
        assert "no engine ghost" in await boss.says("stop_engine", until="failed", engine_id="ghost")


async def test_a_command_that_comes_again_and_again_is_done_once(gateway, tmp_path, monkeypatch):
    boss = Boss(gateway)
    async with serving(options(gateway, tmp_path, model_in(tmp_path, "toy")), monkeypatch):
        await boss.until_states(toy="ready")
        before = engine_of(gateway.beats[-1], "toy").restarts
        command = Command(1, "restart_engine", {"engine_id": "toy"})
        await boss.wants(commands=(command.to_json(),))
        await gateway.until(lambda beat: has_ended(beat, 1))
        seen = len(gateway.beats)
        repeated = await gateway.until(lambda beat: has_ended(beat, 1), after=seen + 3)
        assert engine_of(repeated, "toy").restarts == before + 1


async def test_a_model_on_disk_is_loaded_and_the_idle_one_makes_room_asleep_until_it_is_wanted(
    gateway, tmp_path, monkeypatch
):
    boss = Boss(gateway)
    first = model_in(tmp_path, "first")
    model_in(tmp_path / "data" / "models", "second")
    agent = options(gateway, tmp_path, first, telemetry_file=str(gpus(tmp_path)))
    async with serving(agent, monkeypatch):
        beat = await boss.until_states(first="ready")
        assert set(beat.cached_models) == {"first", "second"}
        assert beat.gpu_status["all_gpus"][0]["name"] == "Stand-in"
        assert await boss.says("preload_model", model_name="second") == "second is served"
        swapped = await boss.until_states(first="stopped", second="ready")
        assert engine_of(swapped, "first").reason == "asleep: makes room for second"
        await boss.says("preload_model", model_name="first")
        back = await boss.until_states(first="ready", second="stopped")
        assert engine_of(back, "first").restarts == 0, "it only woke"


async def test_two_models_that_fit_are_served_beside_each_other(gateway, tmp_path, monkeypatch):
    boss = Boss(gateway)
    for name in ("one", "two", "huge"):
        model_in(tmp_path / "data" / "models", name, vram_gb=99 if name == "huge" else 3)
    async with serving(options(gateway, tmp_path, telemetry_file=str(gpus(tmp_path))), monkeypatch):
        await boss.says("preload_model", model_name="one")
        await boss.says("preload_model", model_name="two")
        await boss.until_states(one="ready", two="ready")
        refused = await boss.says("preload_model", until="failed", model_name="huge")
        assert "no room for huge: it needs 101376 MiB and this host has 9000 MiB" in refused
        assert "not on this host" in await boss.says("preload_model", until="failed", model_name="absent")


async def test_the_contracts_own_preload_works_without_commands(gateway, tmp_path, monkeypatch):
    boss = Boss(gateway)
    model_in(tmp_path / "data" / "models", "toy")
    await boss.wants(preload_model={"model_name": "toy", "status": "downloading"})
    async with serving(options(gateway, tmp_path), monkeypatch):
        await boss.until_states(toy="ready")


async def test_a_model_is_downloaded_with_progress_and_then_served(gateway, tmp_path, monkeypatch):
    boss = Boss(gateway)
    monkeypatch.setattr("nodes.agent.deeds.TELL_S", 0.0)
    async with model_hub() as hub:
        hub.held.clear()
        agent = options(gateway, tmp_path)
        agent = replace(agent, settings=replace(agent.settings, model_source=hub.url))
        async with serving(agent, monkeypatch):
            told = asyncio.create_task(boss.says("preload_model", model_name=NAME))
            half = await gateway.until(lambda beat: any(r["percent"] in range(40, 60) for r in beat.progress))
            assert half.progress[0]["status"] == "downloading"
            assert "MiB" in half.progress[0]["detail"]
            hub.held.set()
            assert await told == f"{NAME} is served"
            beat = await boss.until_states(**{"org-tiny": "ready"})
            assert beat.cached_models == (NAME,)
            assert [model.id for model in engine_of(beat, "org-tiny").models] == [NAME]
    assert "pytorch_model.bin" not in hub.asked, "pickles run code"
    assert not any("escape" in name for name in hub.asked)


async def test_a_download_goes_on_where_it_was_cut(tmp_path):
    async with model_hub() as hub, aiohttp.ClientSession() as session:
        hub.cuts = 1
        hub.held.clear()

        def tell(percent: int, _words: str) -> None:
            if percent >= 50:  # that half has arrived, so that it is not cut as well
                hub.held.set()

        await download_model(session, hub.url, NAME, tmp_path / "tiny", tell)
        assert (tmp_path / "tiny" / "model.safetensors").read_bytes() == hub.files["model.safetensors"]
        assert hub.ranges == [f"bytes={len(hub.files['model.safetensors']) // 2}-"]
        assert {path.name for path in (tmp_path / "tiny").iterdir()} == {
            "config.json", "model.safetensors", "poolgate.json",
        }  # fmt: skip


async def test_what_is_not_as_the_hub_described_it_is_not_taken(tmp_path):
    async with model_hub() as hub, aiohttp.ClientSession() as session:
        hub.lies = True
        with pytest.raises(DownloadFailed, match="did not come as the hub describes"):
            await download_model(session, hub.url, NAME, tmp_path / "tiny", lambda *_: None)
        assert not (tmp_path / "tiny").exists()
        with pytest.raises(DownloadFailed, match="no name of a model"):
            await download_model(session, hub.url, "../../etc", tmp_path / "tiny", lambda *_: None)
        with pytest.raises(DownloadFailed, match="404"):
            await download_model(session, hub.url, "org/other", tmp_path / "tiny", lambda *_: None)


async def test_adapters_are_loaded_and_unloaded_and_reported(gateway, tmp_path, monkeypatch):
    boss = Boss(gateway)
    monkeypatch.setattr("nodes.agent.engine.MODELS_POLL_S", 0.0)
    adapter = tmp_path / "data" / "adapters" / "polite"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "toy"}')
    async with serving(options(gateway, tmp_path, model_in(tmp_path, "toy")), monkeypatch):
        await boss.until_states(toy="ready")
        await boss.says("load_lora", engine_id="toy", adapter="polite")
        beat = await gateway.until(lambda beat: any(len(engine.models) == 2 for engine in beat.engines))
        assert [(model.id, model.parent) for model in engine_of(beat, "toy").models][1] == ("polite", "toy")
        seen = len(gateway.beats)
        await boss.says("unload_lora", engine_id="toy", adapter="polite")
        await gateway.until(lambda beat: all(len(engine.models) == 1 for engine in beat.engines), after=seen)
        assert "no adapter rude" in await boss.says(
            "load_lora", until="failed", engine_id="toy", adapter="rude"
        )


async def test_pause_holds_engines_and_drain_ends_them(gateway, tmp_path, monkeypatch):
    boss = Boss(gateway)
    async with serving(options(gateway, tmp_path, model_in(tmp_path, "toy")), monkeypatch):
        await boss.until_states(toy="ready")
        await boss.wants(wanted="pause")
        paused = await boss.until_states(toy="draining")
        assert engine_of(paused, "toy").reason == "paused"
        await boss.wants(wanted="serve")
        back = await boss.until_states(toy="ready")
        assert engine_of(back, "toy").restarts == 0
        await boss.wants(wanted="drain")
        ended = await boss.until_states(toy="stopped")
        assert engine_of(ended, "toy").reason == "drained"
        await boss.wants(wanted="serve")
        await boss.until_states(toy="ready")


async def test_a_gpu_too_hot_sheds_load_then_ends_engines_and_says_why(gateway, tmp_path, monkeypatch):
    boss = Boss(gateway)
    agent = options(gateway, tmp_path, model_in(tmp_path, "toy"), telemetry_file=str(gpus(tmp_path)))
    await boss.wants(preferences={"temp_limit_c": 85})
    async with serving(agent, monkeypatch):
        await boss.until_states(toy="ready")
        gpus(tmp_path, temp_c=86)
        shed = await boss.until_states(toy="draining")
        assert "too hot, its limit is 85 °C: no new turns until it has 80 °C" in engine_of(shed, "toy").reason
        gpus(tmp_path, temp_c=95)
        ended = await boss.until_states(toy="stopped")
        assert "engines end until it has 80 °C" in engine_of(ended, "toy").reason
        gpus(tmp_path, temp_c=60)
        await boss.until_states(toy="ready")
    kinds = [event["event_type"] for event in gateway.events]
    assert kinds.count("overheated") == 2
    assert "serving" in kinds


async def test_a_crash_is_told_as_an_event_and_the_start_as_readiness(gateway, tmp_path, monkeypatch):
    agent = options(gateway, tmp_path, model_in(tmp_path, "toy"))
    agent = replace(agent, engine_command=(sys.executable, "-c", "raise SystemExit('the model is broken')"))
    async with serving(agent, monkeypatch):
        await gateway.until(lambda beat: engine_of(beat, "toy").restarts >= 2)
        await gateway.until(lambda _: any(event["event_type"] == "crash" for event in gateway.events))
    crash = next(event for event in gateway.events if event["event_type"] == "crash")
    assert (crash["severity"], crash["api_key"]) == ("error", "k")
    assert "the model is broken" in crash["details"]
    (ready,) = gateway.readiness
    assert {told["node_id"] for told in (*gateway.events, ready)} == {gateway.beats[-1].node_id}
    assert ready["checks"].keys() == {"cuda", "pytorch", "vram_gb", "driver"}


async def test_manual_mode_waits_for_a_person(gateway, tmp_path, monkeypatch):
    boss = Boss(gateway)
    await boss.wants(preferences={"run_mode": "manual"})
    async with serving(options(gateway, tmp_path, model_in(tmp_path, "toy")), monkeypatch):
        rests = await boss.until_states(toy="stopped")
        assert "manual" in engine_of(rests, "toy").reason
        await boss.says("start_engine", engine_id="toy")
        await boss.until_states(toy="ready")


async def test_an_owner_who_keeps_more_of_his_gpu_gets_it(gateway, tmp_path, monkeypatch):
    boss = Boss(gateway)
    agent = options(gateway, tmp_path, model_in(tmp_path, "toy"), telemetry_file=str(gpus(tmp_path)))
    async with serving(agent, monkeypatch):
        await boss.until_states(toy="ready")
        await boss.wants(preferences={"gpu_usage_cap_pct": 50})
        again = await gateway.until(
            lambda beat: engine_of(beat, "toy").restarts == 1 and states_of(beat) == {"toy": "ready"}
        )
        assert engine_of(again, "toy").engine_id == "toy"
        await boss.wants(preferences={"gpu_usage_cap_pct": 0})
        rests = await boss.until_states(toy="stopped")
        assert "gpu_usage_cap_pct is 0" in engine_of(rests, "toy").reason


async def test_after_its_lease_an_agent_takes_no_new_turns_until_it_is_heard_again(
    gateway, tmp_path, monkeypatch
):
    gateway.reply = replace(gateway.reply, lease_s=1.0)
    monkeypatch.setattr("nodes.agent.reporter.RETRY_MOST_S", 0.5)
    boss = Boss(gateway)
    async with serving(options(gateway, tmp_path, model_in(tmp_path, "toy")), monkeypatch):
        await boss.until_states(toy="ready")
        gateway.status = 503
        held = await gateway.until(lambda beat: states_of(beat) == {"toy": "draining"})
        assert "lease ran out" in engine_of(held, "toy").reason
        gateway.status = 200
        back = await boss.until_states(toy="ready")
        assert engine_of(back, "toy").restarts == 0, "the engine was up all the while"


async def test_a_fenced_agent_ends_and_does_not_take_the_node_back(gateway, tmp_path, monkeypatch):
    from nodes.agent.main import run_agent

    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    agent = asyncio.create_task(run_agent(options(gateway, tmp_path, model_in(tmp_path, "toy"))))
    await gateway.until(lambda beat: states_of(beat) == {"toy": "ready"})
    gateway.status = 409
    assert await agent == 78
