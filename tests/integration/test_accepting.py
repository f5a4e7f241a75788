"""Listening sockets at their end: nothing that was connected is reset, whoever closes when."""

import asyncio
import os
import socket
import ssl
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from config.settings import load_settings
from gateway import accepting
from gateway.accepting import Acceptor
from gateway.sockets import PortInUse, deafen, exclusive_socket, has_queued, joining, listening_sockets
from gateway.tls import TlsFiles
from tests.certificates import write_pair

SETTINGS = load_settings(environ={}, host="127.0.0.1")
BURST = 1500


class Echo(asyncio.Protocol):
    """Answers what it gets."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._transport.write(data)


@pytest.fixture
def sock() -> Iterator[socket.socket]:
    (listening,) = group(1)
    with listening:
        yield listening


def group(count: int) -> list[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    return listening_sockets(replace(SETTINGS, port=port, workers=count))


def connected(sock: socket.socket, timeout_s: float = 10.0) -> socket.socket:
    client = socket.create_connection(sock.getsockname(), timeout=timeout_s)
    client.sendall(b"hello")
    return client


async def answers(client: socket.socket) -> bytes:
    with client:
        return await asyncio.to_thread(client.recv, 100)


async def test_connections_that_are_queued_when_it_ends_are_answered(sock: socket.socket):
    clients = [connected(sock) for _ in range(100)]
    acceptor = Acceptor(sock, Echo)
    await acceptor.start()  # and before the loop turns:
    assert await acceptor.drain_and_close() == 100
    assert [await answers(client) for client in clients] == [b"hello"] * 100


async def test_one_that_never_accepted_takes_them_too(sock: socket.socket):
    client = connected(sock)
    assert await Acceptor(sock, Echo).drain_and_close() == 1
    assert await answers(client) == b"hello"


async def test_afterwards_clients_are_refused(sock: socket.socket):
    acceptor, address = Acceptor(sock, Echo), sock.getsockname()
    await acceptor.start()
    await acceptor.drain_and_close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address, timeout=5)


async def test_another_holder_of_the_socket_goes_on_accepting(sock: socket.socket):
    mine, others = Acceptor(sock.dup(), Echo), Acceptor(sock.dup(), Echo)
    await mine.start()
    await others.start()
    await mine.drain_and_close()
    assert await answers(connected(sock)) == b"hello"
    await others.drain_and_close()


async def test_a_burst_is_accepted_whole(sock: socket.socket):
    acceptor = Acceptor(sock, Echo)
    await acceptor.start()
    clients = await asyncio.to_thread(lambda: [connected(sock) for _ in range(BURST)])
    assert [await answers(client) for client in clients] == [b"hello"] * BURST
    await acceptor.drain_and_close()


async def test_connections_wait_for_descriptors_that_ending_turns_give_back(
    sock: socket.socket, monkeypatch: pytest.MonkeyPatch
):
    client = connected(sock)
    real, tries = accepting.take_queued, iter([([], False), ([], False)])
    monkeypatch.setattr(accepting, "take_queued", lambda taken_from: next(tries, None) or real(taken_from))
    assert await Acceptor(sock, Echo).drain_and_close() == 1
    assert await answers(client) == b"hello"


async def test_the_queue_is_emptied_into_tls_too_and_who_speaks_none_holds_nobody_up(
    sock: socket.socket, tmp_path: Path
):
    files = TlsFiles(*write_pair(tmp_path))
    trusting = ssl.create_default_context(cafile=tmp_path / "chain.pem")

    def ask(client: socket.socket) -> bytes:
        with trusting.wrap_socket(client, server_hostname="localhost") as secure:
            secure.sendall(b"hello")
            return secure.recv(100)

    plain = connected(sock)
    client = socket.create_connection(sock.getsockname(), timeout=10)
    asking = asyncio.create_task(asyncio.to_thread(ask, client))
    silent = socket.create_connection(sock.getsockname(), timeout=10)
    acceptor = Acceptor(sock, Echo, tls=files.context, handshake_s=0.5)
    await acceptor.start()
    assert await acceptor.drain_and_close() == 3
    assert await asking == b"hello"
    plain.close()
    silent.close()


# --- deaf sockets ----------------------------------------------------------------------------------------------------


async def test_a_deaf_socket_keeps_what_is_queued_and_lets_nothing_new_in(sock: socket.socket):
    client = connected(sock)
    deafen(sock)
    with pytest.raises(TimeoutError):
        socket.create_connection(sock.getsockname(), timeout=0.2)
    assert has_queued(sock)
    acceptor = Acceptor(sock, Echo)
    assert await acceptor.drain_and_close() == 1
    assert await answers(client) == b"hello"


async def test_who_came_to_a_deaf_socket_is_served_by_the_rest_of_the_group_once_it_is_closed():
    first, second = group(2)
    deafen(first)
    acceptor = Acceptor(second, Echo)
    await acceptor.start()
    address = first.getsockname()

    def ask() -> bytes:
        with socket.create_connection(address, timeout=20) as client:
            client.sendall(b"hello")
            return client.recv(100)

    asking = [asyncio.create_task(asyncio.to_thread(ask)) for _ in range(12)]
    await asyncio.sleep(0.1)  # those that hash to the first now wait to try again
    assert not all(task.done() for task in asking)
    first.close()
    assert await asyncio.gather(*asking) == [b"hello"] * 12
    await acceptor.drain_and_close()


async def test_a_socket_that_joins_a_group_gets_nobody_until_it_listens(sock: socket.socket):
    joined = joining(sock)
    assert not has_queued(joined)
    acceptor = Acceptor(sock.dup(), Echo)
    await acceptor.start()
    assert [await answers(connected(sock)) for _ in range(12)] == [b"hello"] * 12
    await acceptor.drain_and_close()
    second = Acceptor(joined, Echo)
    await second.start()
    clients = [connected(sock) for _ in range(24)]
    await asyncio.sleep(0.1)
    taken = sum([os.read(client.fileno(), 5) == b"hello" for client in clients if readable(client)])
    assert 0 < taken < 24
    assert has_queued(sock)
    for client in clients:
        client.close()
    await second.drain_and_close()


def readable(client: socket.socket) -> bool:
    client.setblocking(False)
    try:
        return bool(client.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return False


def test_an_address_is_taken_by_one_gateway_only(sock: socket.socket):
    host, port = sock.getsockname()
    with pytest.raises(PortInUse, match="choose another --port"):
        listening_sockets(replace(SETTINGS, port=port))
    with pytest.raises(PortInUse, match="choose another probe_port"):
        exclusive_socket(host, port, option="probe_port")
