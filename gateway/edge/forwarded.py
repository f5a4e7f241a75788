"""Whose address a request came from, through which proxies (setting `trusted_proxies`). Pure.

X-Forwarded-For is what anybody writes: only what a trusted proxy appended is believed, read from its right end.
"""

import ipaddress
from collections.abc import Sequence

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
_Address = ipaddress.IPv4Address | ipaddress.IPv6Address

HOPS_MAX = 16
"""Proxies in a row; nobody has so many, and a long header is not worth reading to its end."""


def networks(text: str) -> tuple[Network, ...]:
    """Those of the setting. Raises ValueError."""
    return tuple(ipaddress.ip_network(part.strip()) for part in text.split(",") if part.strip())


def client_address(peer: str, forwarded_for: str, trusted: Sequence[Network]) -> str:
    """The rightmost hop that is no trusted proxy; the last trusted one where what is left of it makes no sense.

    `peer` is who connected; `forwarded_for` the header's value, several of them joined by commas.
    """
    address = _address(peer)
    if address is None:
        return peer
    for hop in reversed(forwarded_for.rsplit(",", HOPS_MAX)[-HOPS_MAX:]):
        if not _is_in(address, trusted):
            break
        before = _address(hop.strip(" \t"))
        if before is None:
            break
        address = before
    return str(address)


def _is_in(address: _Address, trusted: Sequence[Network]) -> bool:
    return any(address in network for network in trusted)


def _address(text: str) -> _Address | None:
    """An address, with or without a port; IPv4 inside of IPv6 is IPv4."""
    if text.startswith("["):
        text, _, _ = text[1:].partition("]")
    elif text.count(":") == 1:
        text, _, _ = text.partition(":")
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address):
        if address.scope_id is not None:
            return None  # a scope may be any text, and means nothing elsewhere
        return address.ipv4_mapped or address
    return address
