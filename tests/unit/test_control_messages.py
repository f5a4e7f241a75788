"""The control websocket's messages: they survive the wire, and what is wrong is refused by its name."""

import json
from typing import Any

import pytest

from nodes.agent.main import commands_of
from nodes.control_messages import (
    ARGUMENTS,
    MESSAGE_BYTES_MAX,
    Command,
    Progress,
    load_message,
    read_loads,
    read_wanted,
    wanted_message,
)
from nodes.protocol import ENGINES_MAX, BadMessage, EngineLoad, Heartbeat, HeartbeatReply


def wired(message: Any) -> Any:
    return json.loads(json.dumps(message))


@pytest.mark.parametrize("name", ARGUMENTS)
def test_every_command_survives_the_wire(name: str) -> None:
    command = Command(7, name, dict.fromkeys(ARGUMENTS[name], "x"))
    assert Command.from_json(wired(command.to_json())) == command


def test_progress_loads_and_wishes_survive_the_wire() -> None:
    progress = Progress(7, "downloading", 40, "400 of 1000 MiB")
    assert Progress.from_json(wired(progress.to_json())) == progress
    loads = {"a": EngineLoad(running=3, kv_usage=0.5), "b": EngineLoad(sleeping=True)}
    assert read_loads(wired(load_message(loads))) == loads
    assert read_wanted(wired(wanted_message("drain"))) == "drain"


def test_the_largest_load_fits_a_message() -> None:
    loads = {
        f"{number:03}-{'x' * 100}": EngineLoad(running=2**40, waiting=2**40) for number in range(ENGINES_MAX)
    }
    assert len(json.dumps(load_message(loads))) < MESSAGE_BYTES_MAX


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ([], "object"),
        ({"name": "format_disk"}, "name"),
        ({"name": "stop_engine"}, "engine_id"),
        ({"name": "stop_engine", "arguments": {"engine_id": 5}}, "engine_id"),
        ({"name": "update", "arguments": {"url": "http://elsewhere"}}, "arguments of update are none"),
        ({"name": "preload_model", "arguments": {"model_name": "x" * 600}}, "model_name"),
        ({"name": "update", "id": -1}, "id"),
    ],
)
def test_a_wrong_command_is_refused_by_name(given: Any, named: str) -> None:
    with pytest.raises(BadMessage, match=named):
        Command.from_json(given)


def test_a_reply_brings_commands_and_the_contracts_own_preload() -> None:
    stop = Command(3, "stop_engine", {"engine_id": "toy"})
    reply = HeartbeatReply(
        commands=(stop.to_json(), {"id": 4, "name": "from_the_future"}),
        preload_model={"model_name": "llama", "status": "downloading"},
    )
    reply = HeartbeatReply.from_json(wired(reply.to_json()))
    assert commands_of(reply) == [stop, Command(0, "preload_model", {"model_name": "llama"})]
    same = HeartbeatReply(
        commands=(Command(5, "preload_model", {"model_name": "llama"}).to_json(),),
        preload_model={"model_name": "llama"},
    )
    assert [command.id for command in commands_of(same)] == [5]


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({}, "serve"),
        ({"state": "paused"}, "pause"),
        ({"state": "draining"}, "drain"),
        ({"wanted": "drain"}, "drain"),
    ],
)
def test_what_is_wanted_is_told_by_name_or_by_the_nodes_state(fields: dict[str, str], wanted: str) -> None:
    assert HeartbeatReply.from_json(fields).wanted == wanted


@pytest.mark.parametrize(
    "fields",
    [
        {"run_mode": "manual"},
        {"preferences": {"run_mode": "manual"}},
        {"preferences": {"run_mode": "x"}, "run_mode": "manual"},
    ],
)
def test_preferences_are_taken_from_wherever_they_stand(fields: dict[str, Any]) -> None:
    assert HeartbeatReply.from_json(fields).preferences["run_mode"] == "manual"


def test_a_heartbeat_carries_the_agents_instance_and_progress() -> None:
    beat = Heartbeat(
        api_key="k", instance="0192f1a0-0000-7000-8000-000000000001", progress=(Progress(4, "done").to_json(),)
    )  # fmt: skip
    assert Heartbeat.from_json(wired(beat.to_json())) == beat
    for bad in ({"instance": "x"}, {"progress": [{}] * 65}, {"progress": ["x"]}):
        with pytest.raises(BadMessage):
            Heartbeat.from_json({**beat.to_json(), **bad})
