"""Which addresses may be called because a node named them."""

import pytest

from nodes.networks import AllowedNetworks, EngineUrlRefused, is_of_this_host
from nodes.networks import ip_address as ip
from nodes.reach import Listener, Tunnelled, reach_behind_agent

ANYWHERE = "0.0.0.0/0,::/0"
NEVER = [
    "169.254.169.254", "fd00:ec2::254", "::ffff:169.254.169.254", "100.100.100.200", "168.63.129.16",
    "169.254.1.1", "fe80::1", "0.0.0.0", "::", "224.0.0.1", "ff02::1", "255.255.255.255",
    "64:ff9b::a9fe:a9fe", "2002:a9fe:a9fe::1", "2001:0:1::1",
]  # fmt: skip


def networks(
    listed: str = "", *, own: tuple[str, ...] = (), ports: tuple[int, ...] = (8080,)
) -> AllowedNetworks:
    return AllowedNetworks(listed, own_ports=ports, is_own=lambda address: str(address) in own)


@pytest.mark.parametrize("host", NEVER)
def test_some_addresses_are_nobodys_even_where_every_network_is_listed(host: str) -> None:
    with pytest.raises(EngineUrlRefused):
        networks(ANYWHERE).check_listener(host, 8443)
    with pytest.raises(EngineUrlRefused):
        networks(ANYWHERE).address(f"http://[{host}]:8000" if ":" in host else f"http://{host}:8000")


@pytest.mark.parametrize(
    "host",
    ["10.0.0.5", "192.168.1.1", "172.16.0.1", "127.0.0.1", "::1", "fd12::1", "100.64.0.1", "::ffff:10.0.0.5"],
)
def test_a_private_address_needs_to_be_listed(host: str) -> None:
    with pytest.raises(EngineUrlRefused, match="not public"):
        networks().check_listener(host, 8443)
    assert networks(ANYWHERE).check_listener(host, 8443).host == str(ip(host))


@pytest.mark.parametrize("host", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8"])
def test_a_listener_may_have_a_public_address_but_plain_http_only_a_listed_one(host: str) -> None:
    assert networks().check_listener(host, 8443).port == 8443
    with pytest.raises(EngineUrlRefused, match="node_networks"):
        networks().address(f"http://[{host}]:8000" if ":" in host else f"http://{host}:8000")


def test_an_address_of_the_gateways_own_host_is_not_a_nodes_unless_it_is_listed():
    with pytest.raises(EngineUrlRefused):
        networks(own=("8.8.8.8",)).check_listener("8.8.8.8", 8443)
    assert networks("8.8.8.8/32", own=("8.8.8.8",)).check_listener("8.8.8.8", 8443).host == "8.8.8.8"
    with pytest.raises(EngineUrlRefused, match="gateway's own"):
        networks("8.8.8.8/32", own=("8.8.8.8",)).check_listener("8.8.8.8", 8080)
    with pytest.raises(EngineUrlRefused, match="gateway's own"):
        networks("10.0.0.0/8", own=("10.0.0.1",)).address("http://10.0.0.1:8080")
    assert networks("10.0.0.0/8", own=("10.0.0.1",)).address("http://10.0.0.2:8080").port == 8080


@pytest.mark.parametrize("name", ["example.com", "localhost", "1.2.3", "0x7f.1", "", "::1%lo"])
def test_a_name_is_no_address(name: str) -> None:
    with pytest.raises(EngineUrlRefused):
        networks(ANYWHERE).check_listener(name, 8443)


def test_this_host_knows_its_own_addresses():
    assert is_of_this_host(ip("127.0.0.1"))
    assert not is_of_this_host(ip("8.8.8.8"))


def test_two_spellings_of_an_address_are_one():
    found = networks("127.0.0.0/8,::1/128")
    assert found.address("http://localhost:9001/").url == found.address("http://[::ffff:127.0.0.1]:9001").url
    assert found.address("http://[0:0::1]:9001").url == "http://[::1]:9001"


def test_a_listener_goes_before_a_tunnel_and_without_either_there_is_no_way():
    listener = ("8.8.8.8", 8443, "0" * 64)
    both = reach_behind_agent(1, "n", "e0", listener=listener, tunnel="127.0.0.1:5")
    assert both == Listener("8.8.8.8", 8443, "0" * 64, 1, "n", "e0")
    assert reach_behind_agent(1, "n", "e0", listener=None, tunnel="127.0.0.1:5") == Tunnelled(
        "n", "e0", "127.0.0.1:5"
    )
    assert reach_behind_agent(1, "n", "e0", listener=None, tunnel="") is None


@pytest.mark.parametrize("name", ["", "e 0", "e\r\nx: y", "é", "x" * 129])
def test_an_engine_behind_its_agent_needs_a_name_that_can_stand_in_a_header(name: str) -> None:
    assert reach_behind_agent(1, "n", name, listener=("8.8.8.8", 1, "0" * 64), tunnel="") is None
