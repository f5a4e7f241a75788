"""Two connections tied together: what comes in at one goes out at the other, no faster than that takes it."""

import asyncio
from typing import Any


class End(asyncio.Protocol):
    """One of two ends. `tie` them once both have a transport; bytes that came before are passed on then.

    One that is lost takes the other along: behind what was sent if it ended in order, else at once; always at once if
    it `is_asking`, since then nobody wants the answer any more.
    """

    is_asking = False

    def __init__(self) -> None:
        self.transport: Any = None
        self.is_lost = False
        self._other: End | None = None
        self._early: list[bytes] = []

    def tie(self, other: "End") -> None:
        """Both ways. Neither may have been lost."""
        self._other, other._other = other, self  # noqa: SLF001 - two of a kind
        self._pass_early()
        other._pass_early()  # noqa: SLF001

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.pass_on(data)

    def pass_on(self, data: bytes) -> None:
        """To the other end, once there is one."""
        if self._other is not None:
            self._other.transport.write(data)
        else:
            self._early.append(data)
            self.transport.pause_reading()

    def _pass_early(self) -> None:
        if self._early:
            early, self._early = self._early, []
            for data in early:
                self.pass_on(data)
            self.transport.resume_reading()

    def pause_writing(self) -> None:
        if self._other is not None and not self._other.is_lost:
            self._other.transport.pause_reading()

    def resume_writing(self) -> None:
        if self._other is not None and not self._other.is_lost:
            self._other.transport.resume_reading()

    def eof_received(self) -> bool:
        """Both sides of a connection end together."""
        return False

    def connection_lost(self, error: Exception | None) -> None:
        self.is_lost = True
        other = self._other
        if other is None or other.is_lost or other.transport is None:
            return
        if error is None and not self.is_asking:
            other.transport.close()
        else:
            other.transport.abort()
