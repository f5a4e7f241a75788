"""Listening sockets: a group on one address, one socket a worker, and how a group stops listening without a reset.

They belong to the supervisor, which outlives workers. Who accepts from them is `gateway.accepting`'s.
"""

import ctypes
import errno
import select
import socket
import struct
import sys
from contextlib import ExitStack, suppress
from typing import Any

from config.defaults import Settings

BACKLOG = 4096
"""Connections that may wait on one socket; the kernel allows no more by default (net.core.somaxconn)."""

_SO_ATTACH_FILTER = 26
_FLAGS_BYTE = 13
_SYN, _SYN_OR_ACK = 0x02, 0x12
# Classic BPF over the TCP header: drop a segment that opens a connection (SYN without ACK), let all others pass.
_NO_NEW_CONNECTIONS = (
    (0x30, 0, 0, _FLAGS_BYTE),  # load the byte of flags
    (0x54, 0, 0, _SYN_OR_ACK),  # of which these two
    (0x15, 0, 1, _SYN),  # SYN alone?
    (0x06, 0, 0, 0),  # then nothing of it is kept
    (0x06, 0, 0, 0xFFFFFFFF),  # else all
)


class PortInUse(OSError):
    """Another program listens on the address, or it can't be listened on."""


def listening_sockets(settings: Settings) -> list[socket.socket]:
    """One for each worker on the same address; the kernel spreads connections over them (SO_REUSEPORT). Raises PortInUse."""
    host, port = settings.host, settings.port
    # With SO_REUSEPORT alone, a second gateway of the same user would quietly get half of the connections.
    exclusive_socket(host, port, option="--port").close()
    family, kind, proto, address = _address(host, port)
    with ExitStack() as stack:
        made = []
        for _ in range(settings.workers):
            made.append(stack.enter_context(_in_group(family, kind, proto, address)))
            made[-1].listen(BACKLOG)
        stack.pop_all()
    return made


def joining(sock: socket.socket) -> socket.socket:
    """One more socket for the group of `sock`. It gets no connections until its worker listens on it."""
    return _in_group(sock.family, sock.type, sock.proto, sock.getsockname())


def exclusive_socket(host: str, port: int, *, option: str) -> socket.socket:
    """A bound socket that shares its address with nobody; PortInUse names the `option` to change."""
    try:
        family, kind, proto, address = _address(host, port)
        with ExitStack() as stack:
            sock = stack.enter_context(socket.socket(family, kind, proto))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
            stack.pop_all()
    except OSError as error:
        raise PortInUse(f"can't listen on {host}:{port}: {error.strerror}; choose another {option}") from None
    return sock


def deafen(sock: socket.socket) -> None:
    """Let no new connection begin on `sock`; those queued on it and those half open go on. Only Linux can do it.

    Closing a listening socket resets what came in since it was last emptied. On a deaf one nothing new comes in, and the
    clients whose attempts are dropped try again: elsewhere in the group, or to be refused, once it is closed.
    """
    if not sys.platform.startswith("linux"):
        return
    program = b"".join(struct.pack("=HBBI", *line) for line in _NO_NEW_CONNECTIONS)
    held = ctypes.create_string_buffer(program)
    option = struct.pack("HP", len(_NO_NEW_CONNECTIONS), ctypes.addressof(held))
    with suppress(OSError):  # a sandbox without socket filters
        sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, option)


def has_queued(sock: socket.socket) -> bool:
    """Connections wait on it."""
    poller = select.poll()
    poller.register(sock, select.POLLIN)
    return any(event & select.POLLIN for _, event in poller.poll(0))  # one that never listened says POLLHUP


def take_queued(sock: socket.socket) -> tuple[list[socket.socket], bool]:
    """All connections that wait on a non-blocking `sock`; False beside them: some were left for want of descriptors or
    memory."""
    taken: list[socket.socket] = []
    while True:
        try:
            connection, _ = sock.accept()
        except BlockingIOError:
            return taken, True
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                return taken, False
            continue  # this one was given up by its client while it waited; the kernel has taken it off the queue
        connection.setblocking(False)
        taken.append(connection)


_Address = tuple[socket.AddressFamily, socket.SocketKind, int, Any]


def _address(host: str, port: int) -> _Address:
    family, kind, proto, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    return family, kind, proto, address


def _in_group(family: int, kind: int, proto: int, address: Any) -> socket.socket:
    sock = socket.socket(family, kind, proto)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock.bind(address)
    sock.setblocking(False)
    return sock
