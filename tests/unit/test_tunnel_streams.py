"""Streams of a tunnel between two ends in memory: nothing is lost or mixed up, windows hold, nobody waits for another."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nodes.tunnel.frames import CLOSE, CREDIT, DATA, OPEN, RESET, BadFrame, Frame, encode
from nodes.tunnel.splice import End
from nodes.tunnel.streams import CLOGGED, STUCK, UNSENT_HIGH, Tunnel, TunnelLost

WINDOW = 1000


class Reader(asyncio.Protocol):
    """Keeps what it hears."""

    def __init__(self) -> None:
        self.transport: Any = None
        self.got = b""
        self.ended: list[Exception | None] = []
        self.is_paused = False

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.got += data

    def pause_writing(self) -> None:
        self.is_paused = True

    def resume_writing(self) -> None:
        self.is_paused = False

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended.append(exc)


class Ends:
    """A gateway's end and an agent's, and what is on its way between them."""

    def __init__(self, *, window: int = WINDOW, streams_max: int = 100) -> None:
        self.accepted: dict[str, Reader] = {}
        self.drained: list[str] = []
        self.gateway = Tunnel(
            window=window, streams_max=streams_max, drained=lambda _: self.drained.append("gateway")
        )
        self.agent = Tunnel(
            window=window,
            streams_max=streams_max,
            accept=self._accept,
            drained=lambda _: self.drained.append("agent"),
        )

    def _accept(self, name: str) -> Reader:
        reader = self.accepted[name] = Reader()
        return reader

    def open(self, name: str = "e0") -> tuple[Reader, Reader]:
        """A stream; who reads it here, and who there."""
        reader = Reader()
        self.gateway.open(name, reader)
        self.move()
        return reader, self.accepted[name]

    def move(self) -> None:
        """All that is on its way arrives, and what that causes."""
        while (up := self.gateway.take()) or self.agent._out_bytes:
            if up:
                self.agent.received(up)
            if down := self.agent.take():
                self.gateway.received(down)


async def turned() -> None:
    """What was left for the next turn of the loop has happened."""
    await asyncio.sleep(0)
    await asyncio.sleep(0)


async def test_bytes_written_here_are_read_there_and_back():
    ends = Ends()
    here, there = ends.open()
    here.transport.write(b"a question")
    ends.move()
    there.transport.write(b"an answer")
    ends.move()
    assert (there.got, here.got) == (b"a question", b"an answer")


async def test_a_reader_who_pauses_gets_a_window_and_no_more_and_the_rest_later():
    ends = Ends()
    here, there = ends.open()
    here.transport.pause_reading()
    there.transport.write(b"x" * 5000)
    ends.move()
    assert here.got == b""
    assert sum(map(len, here.transport._arrived)) == WINDOW
    assert there.transport.get_write_buffer_size() == 4000
    here.transport.resume_reading()
    await turned()
    ends.move()
    assert here.got == b"x" * 5000
    assert there.transport.get_write_buffer_size() == 0


async def test_a_stream_that_nobody_reads_holds_up_no_other_one():
    ends = Ends()
    slow, its_writer = ends.open("slow")
    quick, other_writer = ends.open("quick")
    slow.transport.pause_reading()
    its_writer.transport.write(b"x" * 100_000)
    for _ in range(50):
        other_writer.transport.write(b"y" * 2000)
        ends.move()
    assert quick.got == b"y" * 100_000
    assert slow.got == b""


async def test_a_writer_is_paused_when_much_waits_and_goes_on_when_little_does():
    ends = Ends()
    here, there = ends.open()
    here.transport.pause_reading()
    there.transport.write(b"x" * (UNSENT_HIGH + WINDOW + 1))
    assert there.is_paused
    here.transport.resume_reading()
    await turned()
    ends.move()
    assert not there.is_paused


async def test_a_carrier_that_takes_nothing_pauses_writers_and_keeps_bounded_bytes():
    ends = Ends(window=2**24)
    here, there = ends.open()
    for _ in range(100):
        there.transport.write(b"x" * 65536)
    assert there.is_paused
    assert ends.agent._out_bytes <= CLOGGED + 65536 + 100
    ends.move()
    assert here.got == b"x" * 6_553_600
    assert not there.is_paused


async def test_a_close_comes_behind_what_was_written_also_when_that_has_to_wait():
    ends = Ends()
    here, there = ends.open()
    here.transport.pause_reading()
    there.transport.write(b"x" * 3000)
    there.transport.close()
    there.transport.write(b"too late")
    ends.move()
    await turned()
    assert (here.ended, there.ended) == ([], [])
    here.transport.resume_reading()
    await turned()
    ends.move()
    await turned()
    assert here.got == b"x" * 3000
    assert (here.ended, there.ended) == ([None], [None])
    assert (len(ends.gateway), len(ends.agent)) == (0, 0)


async def test_an_abort_ends_both_sides_at_once_and_what_was_under_way_is_nobodys():
    ends = Ends()
    here, there = ends.open()
    there.transport.write(b"x" * 500)
    here.transport.abort()
    ends.move()
    await turned()
    assert here.got == b""
    assert here.ended == [None]
    assert isinstance(there.ended[0], ConnectionResetError)
    assert (len(ends.gateway), len(ends.agent)) == (0, 0)


async def test_a_lost_tunnel_ends_every_stream_and_opens_no_more():
    ends = Ends()
    readers = [*ends.open("a"), *ends.open("b")]
    ends.gateway.lost("cut")
    ends.agent.lost("cut")
    await turned()
    assert all(isinstance(reader.ended[0], TunnelLost) for reader in readers)
    with pytest.raises(TunnelLost):
        ends.gateway.open("c", Reader())


async def test_a_draining_tunnel_opens_no_stream_and_lets_those_that_are_open_go_on():
    ends = Ends()
    here, there = ends.open()
    ends.gateway.drain()
    ends.move()
    assert ends.drained == ["agent"]
    with pytest.raises(TunnelLost):
        ends.gateway.open("e1", Reader())
    there.transport.write(b"the rest")
    ends.move()
    assert here.got == b"the rest"


async def test_streams_are_bounded_at_either_end():
    ends = Ends(streams_max=2)
    ends.open("a")
    ends.open("b")
    with pytest.raises(TunnelLost):
        ends.gateway.open("c", Reader())
    generous = Ends(streams_max=2)
    generous.gateway._streams_max = 5
    readers = [Reader() for _ in range(3)]
    for number, reader in enumerate(readers):
        generous.gateway.open(str(number), reader)
    generous.move()
    await turned()
    assert [len(reader.ended) for reader in readers] == [0, 0, 1]


async def test_an_end_that_reads_nothing_at_all_is_given_up():
    ends = Ends(window=2**30, streams_max=10**9)
    reader = Reader()
    ends.gateway.open("e0", reader)
    for _ in range(STUCK // 400 + 1):
        ends.gateway.send(encode(RESET, 1, b"x" * 400))
    assert ends.gateway.is_lost
    await turned()
    assert isinstance(reader.ended[0], TunnelLost)


async def test_a_reader_that_fails_loses_its_stream_alone(caplog):
    ends = Ends()
    here, there = ends.open("a")
    other, other_there = ends.open("b")
    here.data_received = lambda data: 1 / 0  # type: ignore[assignment, method-assign]
    there.transport.write(b"x")
    other_there.transport.write(b"y")
    ends.move()
    await turned()
    assert here.ended == [None]
    assert other.got == b"y"
    assert [record.action for record in caplog.records] == ["stream_failed"]


def broken(name: str) -> Callable[[Tunnel], None]:
    frames = {
        "more than the window": lambda tunnel: [Frame(DATA, 1, b"x" * 600), Frame(DATA, 1, b"x" * 600)],
        "data behind the end": lambda tunnel: [Frame(DATA, 1, b"x"), Frame(CLOSE, 1), Frame(DATA, 1, b"x")],
        "a stream never opened": lambda tunnel: [Frame(DATA, 9, b"x")],
        "a stream opened by an agent": lambda tunnel: [Frame(OPEN, 2, b"e0")],
        "a bad credit": lambda tunnel: [Frame(CREDIT, 1, b"\0")],
    }[name]

    def send(tunnel: Tunnel) -> None:
        for frame in frames(tunnel):
            tunnel.received(encode(*frame))

    return send


@pytest.mark.parametrize(
    "name",
    [
        "more than the window",
        "data behind the end",
        "a stream never opened",
        "a stream opened by an agent",
        "a bad credit",
    ],
)
async def test_a_peer_that_breaks_the_rules_is_told_from_one_that_does_not(name):
    ends = Ends()
    here, _ = ends.open()
    here.transport.pause_reading()
    with pytest.raises(BadFrame):
        broken(name)(ends.gateway)


async def test_frames_that_cross_the_end_of_their_stream_are_no_offence():
    ends = Ends()
    here, _ = ends.open()
    here.transport.abort()
    for frame in (
        Frame(DATA, 1, b"x"),
        Frame(CREDIT, 1, b"\0\0\0\1"),
        Frame(CLOSE, 1),
        Frame(RESET, 1, b"why"),
    ):
        ends.gateway.received(encode(*frame))


async def test_a_spliced_end_passes_on_what_came_before_and_takes_the_other_along():
    ends = Ends()
    first, second = End(), End()
    ends.gateway.open("a", first)
    ends.gateway.open("b", second)
    ends.move()
    ends.accepted["a"].transport.write(b"early")
    ends.move()
    first.tie(second)
    ends.move()
    ends.accepted["a"].transport.write(b", late")
    await turned()
    ends.move()
    assert ends.accepted["b"].got == b"early, late"
    ends.accepted["a"].transport.close()
    ends.move()
    await turned()
    ends.move()
    await turned()
    assert ends.accepted["b"].ended == [None]


Step = tuple[str, int, int]
steps = st.lists(
    st.tuples(
        st.sampled_from(
            [
                "write here",
                "write there",
                "pause here",
                "resume here",
                "pause there",
                "resume there",
                "move",
                "turn",
            ]
        ),
        st.integers(0, 2),
        st.integers(1, 3000),
    ),
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(steps)
def test_whatever_happens_each_stream_gets_its_own_bytes_in_order_and_within_its_window(
    given_steps: list[Step],
) -> None:
    asyncio.run(_played(given_steps))


async def _played(given_steps: list[Step]) -> None:
    ends = Ends()
    pairs = [ends.open(name) for name in ("a", "b", "c")]
    readers = [reader for pair in pairs for reader in pair]
    sent = dict.fromkeys(readers, b"")
    for count, (what, number, size) in enumerate(given_steps):
        verb, _, side = what.partition(" ")
        reader = pairs[number][0 if side == "here" else 1]
        if verb == "write":
            data = (b"%d," % count) * size
            sent[reader] += data
            reader.transport.write(data)
        elif verb in ("pause", "resume"):
            getattr(reader.transport, f"{verb}_reading")()
        elif verb == "move":
            ends.move()
        else:
            await turned()
        assert all(sum(map(len, each.transport._arrived)) <= WINDOW for each in readers)
    await _all_read(ends, readers)
    for here, there in pairs:
        assert there.got == sent[here]
        assert here.got == sent[there]


async def _all_read(ends: Ends, readers: list[Reader]) -> None:
    for reader in readers:
        reader.transport.resume_reading()
    for _ in range(1000):
        await turned()
        ends.move()
        if not any(reader.transport._arrived or reader.transport._unsent for reader in readers):
            return
    raise AssertionError("something waits for ever")
