"""Who is on offer: one picture of the providers that everybody may see, kept for a moment so that visitors cost little.

Which providers are in it is `nodes.providers`' query; the shapes are the API's.
"""

import asyncio
import time
from collections.abc import Sequence

from nodes.providers import Provider, ProviderStore

KEPT_S = 1.0
"""A pause shows within this; however many look, PostgreSQL is asked once in it."""


class Marketplace:
    """`providers` is what was true a moment ago."""

    def __init__(self, store: ProviderStore) -> None:
        self._store = store
        self._kept: Sequence[Provider] = ()
        self._until_s = float("-inf")
        self._reading: asyncio.Task[Sequence[Provider]] | None = None

    async def providers(self) -> Sequence[Provider]:
        """The largest first. Raises what PostgreSQL's absence raises."""
        if time.monotonic() < self._until_s:
            return self._kept
        if self._reading is None or self._reading.done():
            self._reading = asyncio.create_task(self._read(), name="marketplace-read")
        return await asyncio.shield(self._reading)

    async def _read(self) -> Sequence[Provider]:
        self._kept = await self._store.listed()
        self._until_s = time.monotonic() + KEPT_S
        return self._kept
