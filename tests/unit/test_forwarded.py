"""Whose address a request came from, and what of refused keys is in the log."""

import ipaddress
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.settings import BadSetting, load_settings
from gateway.edge.forwarded import HOPS_MAX, client_address, networks
from gateway.edge.refused import LINE_S, RefusedKeys

TRUSTED = networks("10.0.0.0/8, 2001:db8::/32")


@pytest.mark.parametrize(
    ("peer", "forwarded_for", "client"),
    [
        ("192.0.2.1", "", "192.0.2.1"),
        ("192.0.2.1", "198.51.100.7", "192.0.2.1"),
        ("10.0.0.1", "", "10.0.0.1"),
        ("10.0.0.1", "198.51.100.7", "198.51.100.7"),
        ("10.0.0.1", "203.0.113.9, 198.51.100.7", "198.51.100.7"),
        ("10.0.0.1", "203.0.113.9,198.51.100.7 ,\t10.0.0.2", "198.51.100.7"),
        ("10.0.0.1", "10.0.0.3, 10.0.0.2", "10.0.0.3"),
        ("10.0.0.1", "198.51.100.7:4711", "198.51.100.7"),
        ("10.0.0.1", "[2001:db9::1]:4711", "2001:db9::1"),
        ("2001:db8::1", "2001:db9::7", "2001:db9::7"),
        ("::ffff:10.0.0.1", "198.51.100.7", "198.51.100.7"),
        ("10.0.0.1", "::ffff:198.51.100.7", "198.51.100.7"),
        ("10.0.0.1", "unknown", "10.0.0.1"),
        ("10.0.0.1", "198.51.100.7, rubbish, 10.0.0.2", "10.0.0.2"),
        ("10.0.0.1", "198.51.100.7,", "10.0.0.1"),
        ("10.0.0.1", "fe80::1%\x1b[31m", "10.0.0.1"),
        ("10.0.0.1", "010.0.0.1", "10.0.0.1"),
        ("", "198.51.100.7", ""),
    ],
)
def test_the_rightmost_hop_that_is_no_trusted_proxy_is_the_client(peer: str, forwarded_for: str, client: str):
    assert client_address(peer, forwarded_for, TRUSTED) == client


def test_without_trusted_proxies_the_peer_is_the_client_whatever_it_says():
    assert client_address("10.0.0.1", "198.51.100.7", ()) == "10.0.0.1"


def test_a_header_is_read_for_so_many_hops_and_no_further():
    hops = ", ".join(["198.51.100.7"] + ["10.0.0.2"] * HOPS_MAX)
    assert client_address("10.0.0.1", hops, TRUSTED) == "10.0.0.2"


@given(st.text())
def test_whatever_stands_in_the_header_an_address_comes_out(forwarded_for: str):
    ipaddress.ip_address(client_address("10.0.0.1", forwarded_for, TRUSTED))


def test_a_network_with_host_bits_is_no_setting():
    with pytest.raises(BadSetting, match=r"trusted_proxies = '10\.0\.0\.1/8': must be networks"):
        load_settings(environ={}, trusted_proxies="10.0.0.1/8")


class Peer:
    """A transport of which only the address is asked."""

    def get_extra_info(self, name: str) -> tuple[str, int]:
        assert name == "peername"
        return "10.0.0.1", 1234


def test_a_flood_of_refused_keys_is_one_line_an_interval_that_counts_them(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    now_s = 5.0
    refused = RefusedKeys(load_settings(environ={}, trusted_proxies="10.0.0.0/8"), lambda: now_s)
    for _ in range(1000):
        refused.add(Peer(), "198.51.100.7")
    now_s += LINE_S
    refused.add(Peer(), "203.0.113.9")
    refused.add(None, "")
    lines = [(record.action, record.client, record.count) for record in caplog.records]  # type: ignore[attr-defined]
    assert lines == [("key_refused", "198.51.100.7", 1), ("key_refused", "203.0.113.9", 1000)]
