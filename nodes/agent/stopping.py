"""The wish to stop: asked once, engines drain; asked again, they end at once.

Signals and the parent's death raise it in `main`; everything that waits, waits for it too.
"""

import asyncio
import contextlib


class Stopping:
    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.hurried = asyncio.Event()

    def ask(self) -> None:
        """The first call asks, every further one hurries."""
        if self.asked.is_set():
            self.hurried.set()
        self.asked.set()

    def hurry(self) -> None:
        self.asked.set()
        self.hurried.set()

    async def pause(self, seconds: float) -> bool:
        """Wait, but not past the wish to stop; True when there is one."""
        return await happens(self.asked, seconds)


async def happens(event: asyncio.Event, seconds: float) -> bool:
    """True once the event is set, False when the time has passed first."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
    return event.is_set()
