"""Which addresses a gateway may call because a node named them: never its own, a cloud's metadata or another network's.

An address is judged as what it is in the end, and what was judged is what is connected to: names are resolved once, by
whoever asks. Engines that are called directly must lie in the networks that the operator lists; an agent's listener may also
have any public address, since it must prove whose it is before anything is sent there (`gateway.reach.check`).
"""

import ipaddress
import socket
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from urllib.parse import urlsplit

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

METADATA = frozenset(
    map(
        ipaddress.ip_address,
        ("169.254.169.254", "fd00:ec2::254", "100.100.100.200", "168.63.129.16", "192.0.0.192"),
    )
)
"""Where clouds answer every host with its secrets: AWS, Azure, Google and most others; AWS over IPv6; Alibaba; Azure's wire
server, whose address looks public; Oracle."""

TRANSLATED = tuple(map(ipaddress.ip_network, ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32")))
"""IPv6 addresses that routers turn into an IPv4 address (NAT64, 6to4, Teredo), which may be anybody's."""


class EngineUrlRefused(ValueError):
    """An address is not one that this gateway may call."""


@dataclass(frozen=True, slots=True)
class EngineAddress:
    """Where an engine listens; `host` is an IP address, so that no name can point elsewhere later."""

    host: str
    port: int

    @property
    def url(self) -> str:
        """The one spelling of it, by which two can be compared."""
        return f"http://[{self.host}]:{self.port}" if ":" in self.host else f"http://{self.host}:{self.port}"


def is_of_this_host(ip: IpAddress) -> bool:
    """Only an address of this host can be bound to."""
    family = socket.AF_INET6 if ip.version == 6 else socket.AF_INET
    try:
        with closing(socket.socket(family, socket.SOCK_DGRAM)) as probe:
            probe.bind((str(ip), 0))
    except OSError:
        return False
    return True


class AllowedNetworks:
    """The networks that the operator lists (setting `node_networks`), and what is refused in whichever."""

    def __init__(
        self,
        networks: str,
        *,
        own_ports: Sequence[int] = (),
        is_own: Callable[[IpAddress], bool] = is_of_this_host,
    ) -> None:
        """`own_ports`: ports of this gateway, which on an address of this host (`is_own`) are never an engine."""
        self._networks = tuple(
            ipaddress.ip_network(part.strip()) for part in networks.split(",") if part.strip()
        )
        self._own_ports = frozenset(own_ports)
        self._is_own = is_own

    def address(self, url: str) -> EngineAddress:
        """The address in an engine's `url`. Raises EngineUrlRefused with what is allowed."""
        try:
            parts = urlsplit(url)
            host, port = parts.hostname or "", parts.port or 80
            ip = ip_address("127.0.0.1" if host == "localhost" else host)
        except ValueError:
            raise EngineUrlRefused("an engine's url must be http://IP-ADDRESS:PORT") from None
        if (
            parts.scheme != "http"
            or parts.path not in {"", "/"}
            or parts.query
            or parts.fragment
            or parts.username
        ):
            raise EngineUrlRefused("an engine's url must be http://IP-ADDRESS:PORT")
        self._check(ip, port)
        if not self._lists(ip):
            raise EngineUrlRefused(
                "the engine's address is outside the gateway's node_networks; an agent with --reach agent needs none"
            )
        return EngineAddress(str(ip), port)

    def check_listener(self, host: str, port: int) -> EngineAddress:
        """The address of an agent's listener, `host` being an IP address. Raises EngineUrlRefused."""
        try:
            ip = ip_address(host)
        except ValueError:
            raise EngineUrlRefused("no IP address") from None
        self._check(ip, port)
        if not (self._lists(ip) or (ip.is_global and not self._is_own(ip))):
            raise EngineUrlRefused("the address is not public, and outside the gateway's node_networks")
        return EngineAddress(str(ip), port)

    def _lists(self, ip: IpAddress) -> bool:
        return any(ip in network for network in self._networks)

    def _check(self, ip: IpAddress, port: int) -> None:
        """What is refused even in a network that is listed: it is nobody's host, or nobody's to name."""
        if (
            ip.is_unspecified  # it would reach this very host
            or ip.is_multicast
            or ip.is_link_local
            or ip in METADATA
            or any(ip in network for network in TRANSLATED)
            or ip == ipaddress.ip_address("255.255.255.255")
        ):
            raise EngineUrlRefused("the address is never a node's")
        if port in self._own_ports and (ip.is_loopback or self._is_own(ip)):
            raise EngineUrlRefused("the engine's address is the gateway's own")


def ip_address(host: str) -> IpAddress:
    """An IPv4 address in IPv6's clothes is judged as what it is. Raises ValueError."""
    ip = ipaddress.ip_address(host)
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.scope_id is not None:
            raise ValueError(host)
        return ip.ipv4_mapped or ip
    return ip
