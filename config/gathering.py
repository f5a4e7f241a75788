"""Work that comes in small pieces: those of a moment become one batch, which costs less, and each gets its own answer.

When a batch begins is decided here; what is done with one, and which piece it fails for, is its owner's.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

Piece = TypeVar("Piece")
Answer = TypeVar("Answer")


class Gathering(Generic[Piece, Answer]):
    """`carry_out` gets a batch and answers each piece in turn, by its answer or by the error that is raised to who added it;
    what it raises itself is everybody's.

    The first piece after a pause goes at once. While more come, a batch begins every `gap_s`, and none before the one before
    it is done. A piece waits for as long as its caller does, so as many wait as there are callers.
    """

    def __init__(
        self, carry_out: Callable[[list[Piece]], Awaitable[Sequence[Answer | Exception]]], *, gap_s: float, most: int
    ) -> None:  # fmt: skip
        self._carry_out = carry_out
        self._gap_s = gap_s
        self._most = most  # of one batch
        self._waiting: deque[tuple[Piece, asyncio.Future[Answer]]] = deque()
        self._next_s = float("-inf")  # loop time from which on a batch may begin
        self._running: asyncio.Task[None] | None = None

    async def add(self, piece: Piece) -> Answer:
        """Its answer, once its batch is done. A piece whose caller has left before that began is left out."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Answer] = loop.create_future()
        self._waiting.append((piece, answer))
        if self._running is None:
            self._running = loop.create_task(self._run())
        return await answer

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while self._waiting:
                await asyncio.sleep(max(0.0, self._next_s - loop.time()))
                self._next_s = loop.time() + self._gap_s
                taken = [self._waiting.popleft() for _ in range(min(self._most, len(self._waiting)))]
                await self._carry([(piece, answer) for piece, answer in taken if not answer.done()])
        finally:
            self._running = None

    async def _carry(self, batch: list[tuple[Piece, asyncio.Future[Answer]]]) -> None:
        try:
            answers = await self._carry_out([piece for piece, _ in batch]) if batch else ()
        except Exception as error:  # noqa: BLE001 - it is raised to whoever waits
            answers = [error] * len(batch)
        for (_, waiting), answer in zip(batch, answers, strict=True):
            if waiting.done():  # its caller has left meanwhile
                continue
            if isinstance(answer, Exception):
                waiting.set_exception(answer)
            else:
                waiting.set_result(answer)
