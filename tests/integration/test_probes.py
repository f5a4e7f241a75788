"""The supervisor's own listener, over real connections."""

import http.client
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from gateway import probes
from gateway.probes import Board, Probes
from gateway.reports import ALIVE, READY, STALE_S, latest
from gateway.sockets import exclusive_socket
from gateway.worker_process import WorkerState
from tests.waiting import wait_until


class Listener:
    """Probes over a board that the test writes on; `render` may be made to wait."""

    def __init__(self) -> None:
        self.board = Board()
        self.may_render = threading.Event()
        self.may_render.set()
        self.renders = 0
        self.sock = exclusive_socket("127.0.0.1", 0, option="probe_port")
        self.port = self.sock.getsockname()[1]

    def render(self) -> bytes:
        self.renders += 1
        self.may_render.wait(30)
        return b"poolgate_turns_total 7.0\n"

    def ask(self, path: str, method: str = "GET") -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request(method, path)
            reply = connection.getresponse()
            assert reply.getheader("connection") == "close"
            return reply.status, reply.read()
        finally:
            connection.close()

    def show(self, *workers: tuple[bool, float]) -> None:
        """Workers by what they said and how long ago, seconds."""
        now_s = time.monotonic()
        self.board.workers = tuple(
            WorkerState(100 + number, says_ready, now_s - ago_s)
            for number, (says_ready, ago_s) in enumerate(workers)
        )

    def raw(self, data: bytes) -> socket.socket:
        client = socket.create_connection(("127.0.0.1", self.port), timeout=10)
        client.sendall(data)
        return client


@pytest.fixture
def listener() -> Iterator[Listener]:
    made = Listener()
    with Probes(made.sock, made.board, render=made.render):
        yield made
        made.may_render.set()


def test_it_is_ready_while_one_worker_serves(listener: Listener):
    assert listener.ask("/ready")[0] == 503
    listener.show((False, 0), (True, 0))
    assert (status_and_body := listener.ask("/ready?from=balancer"))[0] == 200
    assert json.loads(status_and_body[1]) == {"ready": True, "workers": 2, "workers_ready": 1}
    listener.show((True, 2 * STALE_S))
    assert listener.ask("/ready")[0] == 503
    listener.show((True, 0))
    listener.board.is_stopping = True
    assert listener.ask("/ready")[0] == 503


def test_health_tells_of_each_worker(listener: Listener):
    def told(*workers: tuple[bool, float]) -> tuple[int, str]:
        listener.show(*workers)
        status, body = listener.ask("/health")
        return status, json.loads(body)["overall_status"]

    assert told((True, 0), (True, 0)) == (200, "healthy")
    assert told((True, 0), (True, 60)) == (200, "degraded")
    assert told((False, 0)) == (200, "degraded")
    assert told((True, 60)) == (503, "unhealthy")
    assert told() == (503, "unhealthy")


def test_metrics_are_rendered_once_for_all_who_ask_meanwhile_and_hold_no_probe_up(listener: Listener):
    listener.show((True, 0))
    listener.may_render.clear()
    answers: list[tuple[int, bytes]] = []
    scrapes = [threading.Thread(target=lambda: answers.append(listener.ask("/metrics"))) for _ in range(5)]
    for scrape in scrapes:
        scrape.start()
    wait_until(lambda: listener.renders)
    assert listener.ask("/ready")[0] == 200
    time.sleep(0.1)  # all five have asked by now, or the count below says more
    listener.may_render.set()
    for scrape in scrapes:
        scrape.join()
    assert answers == [(200, b"poolgate_turns_total 7.0\n")] * 5
    assert listener.renders < 5


@pytest.mark.parametrize(
    ("path", "method", "status"),
    [("/", "GET", 404), ("/ready", "POST", 405), ("/metrics/", "GET", 404), ("/ready", "HEAD", 503)],
)
def test_nothing_else_is_answered(listener: Listener, path: str, method: str, status: int):
    assert listener.ask(path, method)[0] == status


def test_a_long_head_a_slow_head_and_nonsense_end_the_connection_and_hurt_nobody(
    listener: Listener, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(probes, "REQUEST_S", 0.2)
    long = listener.raw(b"GET /ready HTTP/1.1\r\nx: " + b"y" * 2 * probes.HEAD_BYTES_MAX)
    slow = listener.raw(b"GET /ready HTT")
    nonsense = listener.raw(b"\x16\x03\x01 nothing\r\n\r\n")
    assert ended(long)
    assert ended(slow)
    assert nonsense.recv(100).startswith(b"HTTP/1.1 405")
    nonsense.close()
    listener.show((True, 0))
    assert listener.ask("/ready")[0] == 200


def test_connections_past_the_bound_are_closed_and_the_place_of_an_ended_one_is_free(listener: Listener):
    held = [listener.raw(b"GET") for _ in range(probes.CONNECTIONS_MAX)]
    assert ended(listener.raw(b"GET /ready HTTP/1.1\r\n\r\n"))
    held.pop().close()
    listener.show((True, 0))
    wait_until(lambda: succeeds(lambda: listener.ask("/ready")[0] == 200))
    for client in held:
        client.close()


def ended(client: socket.socket) -> bool:
    with client:
        try:
            return client.recv(100) == b""
        except ConnectionResetError:
            return True


def succeeds(ask: Callable[[], bool]) -> bool:
    try:
        return ask()
    except (OSError, http.client.HTTPException):
        return False


def test_of_what_a_worker_said_the_last_counts_and_its_end_is_heard():
    hears, tells = os.pipe()
    os.set_blocking(hears, False)
    try:
        assert latest(hears) == b""
        os.write(tells, ALIVE * 5000 + READY)
        assert latest(hears) == READY
        assert latest(hears) == b""
    finally:
        os.close(tells)
        assert latest(hears) is None
        os.close(hears)
