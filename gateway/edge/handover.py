"""aiohttp's part of a client's connection: it gets what the edge does not serve itself, one request at a time.

aiohttp's handler has the connection for itself as far as it can see (`Lent`), and is done when it closes it. For a request
whose end is known it is a new one, and then the connection is the edge's again. Any other one (a chunked body, an upgrade,
what is no HTTP) makes the connection aiohttp's for good.
"""

import asyncio
from collections.abc import Callable
from typing import Any, Protocol, cast

from aiohttp import HttpVersion10, web

BadRequestHandler = Callable[[int, BaseException | None, str | None], web.Response]


class ClientProtocol(web.RequestHandler):
    """aiohttp's handler, which also tells when a slow client reads again and renders errors in our shapes.

    `is_single`: it is to close its connection after one request; `keeps_alive`: what its answer said of the next one;
    `answered_s`: when it began its last answer, by the loop's time.
    """

    __slots__ = (
        "_is_answering",
        "_is_fed",
        "_on_bad_request",
        "_on_writable",
        "answered_s",
        "buffer_bytes",
        "is_single",
        "keeps_alive",
    )

    def __init__(
        self, manager: Any, *, on_bad_request: BadRequestHandler, buffer_bytes: int, **options: Any
    ) -> None:
        """`buffer_bytes`: what may wait for a slow client before its engine is paused."""
        super().__init__(manager, **options)
        self.buffer_bytes = buffer_bytes
        self._on_writable: Callable[[], None] | None = None
        self._on_bad_request = on_bad_request
        self.is_single = self.keeps_alive = self._is_fed = self._is_answering = False
        self.answered_s = float("-inf")

    @property
    def is_waiting(self) -> bool:
        """For a request: none is served, read to its end or queued."""
        return self._waiter is not None and not self._waiter.done()

    @property
    def has_answered(self) -> bool:
        """Something."""
        return self.answered_s > 0

    def fed(self) -> None:
        """The single request has come whole."""
        self._is_fed = True
        if self._is_answering:
            self.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        # uvloop's transports are no subclasses of asyncio's.
        cast("asyncio.WriteTransport", transport).set_write_buffer_limits(high=self.buffer_bytes)

    def when_writable(self, callback: Callable[[], None] | None) -> None:
        """Call `callback` when the client has read enough, or is gone."""
        self._on_writable = callback

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._on_writable is not None:
            self._on_writable()

    def connection_lost(self, exc: BaseException | None) -> None:
        super().connection_lost(exc)
        if self._on_writable is not None:
            self._on_writable()

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """What aiohttp refuses before any handler is asked, as an unknown `Expect`, gets our shape too."""
        if isinstance(resp, web.HTTPException) and resp.status >= 400:
            resp = self._on_bad_request(resp.status, resp, None)
        self._is_answering = self.is_single
        if (self.is_single and self._is_fed) or request.version < HttpVersion10:
            self.close()  # llhttp takes a line without a version; nothing may follow what may be half of a request
        self.answered_s = self._loop.time()
        resp, is_reset = await super().finish_response(request, resp, start_time)
        self.keeps_alive = bool(resp.keep_alive) and not is_reset
        return resp, is_reset

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """What is no HTTP, or escaped every handler: one answer in our shape, and the connection ends."""
        if request.writer.output_size > 0:
            raise ConnectionError("the answer has begun")
        answer = self._on_bad_request(status, exc, message)
        answer.force_close()
        return answer


class Lender(Protocol):
    """Whose transport is lent."""

    transport: Any

    @property
    def is_reading_held(self) -> bool:
        """Whether reading is to stay paused, whatever the handler thinks."""
        ...

    def given_back(self) -> None:
        """The handler is done."""
        ...


class Lent:
    """A client's transport, lent to one handler: closing it is giving it back."""

    __slots__ = ("_is_lent", "_lender", "_transport")

    def __init__(self, lender: Lender) -> None:
        self._lender = lender
        self._transport = lender.transport
        self._is_lent = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def resume_reading(self) -> None:
        """As far as the lender reads."""
        if not self._lender.is_reading_held:
            self._transport.resume_reading()

    def is_closing(self) -> bool:
        """As the handler is to see it."""
        return not self._is_lent or self._transport.is_closing()

    def close(self) -> None:
        """Give it back."""
        if self._is_lent:
            self._is_lent = False
            self._lender.given_back()
