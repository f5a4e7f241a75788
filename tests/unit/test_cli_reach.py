"""How `poolgate agent` and `poolgate up` choose the way to engines, and what they refuse."""

import argparse

import pytest

from gateway.cli.plan import LOOPBACK, plan_of
from nodes.agent.arguments import BadArgument, checked_reach


def asked(**given: str) -> argparse.Namespace:
    return argparse.Namespace(**({"reach": "auto", "advertise": "", "listen": ""} | given))


@pytest.mark.parametrize(
    ("given", "gateway", "reach"),
    [
        ({}, "http://127.0.0.1:8080", "direct"),
        ({}, "http://localhost:8080", "direct"),
        ({}, "http://[::1]:8080", "direct"),
        ({}, "https://gateway.example.com", "agent"),
        ({}, "http://10.0.0.1:8080", "agent"),
        ({"reach": "agent"}, "http://127.0.0.1:8080", "agent"),
        ({"reach": "direct"}, "http://10.0.0.1:8080", "direct"),
        ({"advertise": "127.0.0.1:8443"}, "http://127.0.0.1:8080", "agent"),
        ({"advertise": "[::1]:8443", "listen": ":9443"}, "https://gateway.example.com", "agent"),
    ],
)
def test_engines_are_called_straight_only_on_the_gateways_host_or_when_told(given, gateway, reach):
    assert checked_reach(asked(**given), gateway) == reach


@pytest.mark.parametrize(
    "given",
    [
        {"advertise": "gpu-7"}, {"advertise": "gpu-7:"}, {"advertise": ":8443"}, {"advertise": "gpu-7:0"},
        {"advertise": "gpu-7:70000"}, {"advertise": "gpu-7:8443", "listen": "x"}, {"listen": ":8443"},
        {"reach": "direct", "advertise": "gpu-7:8443"},
    ],
)  # fmt: skip
def test_addresses_that_mean_nothing_are_refused_before_anything_is_started(given):
    with pytest.raises(BadArgument):
        checked_reach(asked(**given), "https://gateway.example.com")


@pytest.mark.parametrize(("has_node", "networks"), [(True, f",{LOOPBACK}"), (False, "")])
def test_up_lists_its_own_loopback_for_its_own_node_alone(tmp_path, monkeypatch, has_node, networks):
    monkeypatch.delenv("POOLGATE_NODE_NETWORKS", raising=False)
    args = argparse.Namespace(
        config=None, data_dir=str(tmp_path), host=None, port=None, workers=None, engine_urls=[], models=[],
        no_node=not has_node, key=None,
    )  # fmt: skip
    plan = plan_of(args)
    assert plan.settings.node_networks == networks.strip(",")
    assert plan.agent_arguments(())[3:5] == ["--reach", "direct"]
