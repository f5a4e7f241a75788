"""The heartbeat and its reply: they survive the wire, and what is wrong is refused by its name."""

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from nodes.protocol import (
    AGENT_VERSION,
    BadMessage,
    EngineLoad,
    EngineReport,
    Heartbeat,
    HeartbeatReply,
    ModelInfo,
)

NODE = "0192f1a0-0000-7000-8000-000000000001"
ENGINE = EngineReport(
    engine_id="toy",
    url="http://127.0.0.1:8000",
    state="ready",
    restarts=2,
    models=(ModelInfo(id="toy", context_length=64), ModelInfo(id="ft", parent="toy")),
    block_size=32,
    kv_tokens=4096,
    prompt_tokens=100,
    completion_tokens=0,
)
BEAT = Heartbeat(
    api_key="dc1-provider-x",
    gpu_status={"gpu_name": "H100"},
    uptime=3.5,
    cached_models=("toy",),
    node_id=NODE,
    epoch=4,
    agent_version="0.1.0",
    engines=(ENGINE,),
    load={"toy": EngineLoad(running=1, waiting=2, kv_usage=0.5, sleeping=True)},
)


def test_a_heartbeat_survives_the_wire() -> None:
    assert Heartbeat.from_json(json.loads(json.dumps(BEAT.to_json()))) == BEAT


def test_a_reply_survives_the_wire() -> None:
    reply = HeartbeatReply(
        node_id=NODE,
        epoch=3,
        lease_s=90.0,
        heartbeat_interval_s=30.0,
        needs_update=True,
        state="paused",
        preferences={"temp_limit_c": 70},
    )
    assert HeartbeatReply.from_json(json.loads(json.dumps(reply.to_json()))) == reply


def test_a_reply_has_the_contracts_fields() -> None:
    assert set(HeartbeatReply().to_json()) >= {
        "success", "message", "timestamp", "needs_update", "latest_version", "update_available", "min_version",
        "approval_status", "approved", "preload_model",
    }  # fmt: skip


def test_the_contracts_least_heartbeat_is_accepted() -> None:
    assert Heartbeat.from_json({"api_key": "k"}) == Heartbeat(api_key="k")
    assert Heartbeat.from_json({"api_key": "k", "engines": None, "node_id": None}) == Heartbeat(api_key="k")


def test_a_reply_of_a_gateway_that_knows_only_the_contract_is_accepted() -> None:
    reply = HeartbeatReply.from_json({"success": True, "approved": True, "preload_model": None})
    assert (reply.lease_s, reply.heartbeat_interval_s) == (0.0, 0.0)


def test_the_key_does_not_show_in_a_representation() -> None:
    assert "dc1-provider-x" not in repr(BEAT)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"api_key": None}, "api_key"),
        ({"api_key": ""}, "api_key"),
        ({"api_key": 5}, "api_key"),
        ({"api_key": "k" * 513}, "api_key"),
        ({"node_id": "not-a-uuid"}, "node_id"),
        ({"uptime": -1}, "uptime"),
        ({"uptime": float("nan")}, "uptime"),
        ({"uptime": True}, "uptime"),
        ({"epoch": 1.5}, "epoch"),
        ({"cached_models": "toy"}, "cached_models"),
        ({"cached_models": [5]}, "cached_models"),
        ({"gpu_status": []}, "gpu_status"),
        ({"engines": [{}] * 65}, "engines"),
        ({"engines": ["x"]}, "engines"),
        ({"engines": [{**ENGINE.to_json(), "state": "fine"}]}, "state"),
        ({"engines": [{**ENGINE.to_json(), "url": "file:///etc"}]}, "url"),
        ({"engines": [{**ENGINE.to_json(), "models": [{"id": ""}]}]}, "id"),
        ({"engines": [{**ENGINE.to_json(), "models": [{"id": "x", "kind": "odd"}]}]}, "kind"),
        ({"engines": [ENGINE.to_json(), ENGINE.to_json()]}, "engine_id"),
        ({"load": {"toy": {"running": -1}}}, "running"),
        ({"load": {"toy": {"sleeping": 1}}}, "sleeping"),
    ],
)
def test_a_wrong_field_is_refused_by_its_name(change: dict[str, Any], named: str) -> None:
    with pytest.raises(BadMessage, match=named):
        Heartbeat.from_json({**BEAT.to_json(), **change})


@pytest.mark.parametrize("body", [None, [], "x", 5])
def test_a_body_that_is_no_object_is_refused(body: object) -> None:
    with pytest.raises(BadMessage, match="object"):
        Heartbeat.from_json(body)


def test_load_of_an_unknown_engine_is_dropped() -> None:
    beat = Heartbeat.from_json({**BEAT.to_json(), "load": {"stranger": {"running": 1}}})
    assert beat.load == {}


def test_the_agents_version_is_the_packages() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["version"] == AGENT_VERSION
