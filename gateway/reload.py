"""New settings for a running gateway: which of them can be taken without a restart, and the way from worker to worker.

Whoever reads the settings says what is wrong with them; `gateway.slots` does one hand-over.
"""

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

from config.defaults import Settings
from gateway.slots import Slot
from gateway.worker_process import WorkerProcess

log = logging.getLogger("poolgate.supervisor")

FIXED = ("host", "port", "probe_host", "probe_port", "data_dir", "journal_dir")
"""Settings that need a restart. Clients and probes know the addresses; and what dead workers left in the journals' folder
is looked for by living ones, so that all must know the same."""

State = Literal["going", "done", "failed"]


def reloadable(old: Settings, new: Settings) -> tuple[Settings, list[str]]:
    """What a reload takes of `new`, and the names of settings that stay as they were until a restart."""
    kept = {name: getattr(old, name) for name in FIXED if getattr(old, name) != getattr(new, name)}
    return replace(new, **kept), list(kept)


class Reload:
    """One worker after another hands over to a successor with new settings; the first failure ends it."""

    def __init__(
        self, settings: Settings, slots: Sequence[Slot], release: Callable[[WorkerProcess], None]
    ) -> None:
        """`release` is given each worker that was replaced, to let it finish."""
        self.settings = settings
        self.replaced = 0
        self._left = deque(slots)
        self._slot: Slot | None = None
        self._release = release

    def step(self, now_s: float) -> State:
        """Go on; the old workers of slots that were not reached stay."""
        if self._slot is None:
            if not self._left:
                return "done"
            slot = self._left.popleft()
            if not slot.begin_hand_over(self.settings, now_s):
                return "failed"
            self._slot = slot
            return "going"
        state, replaced = self._slot.hand_over(now_s)
        if state == "waiting":
            return "going"
        self._slot = None
        if state == "failed":
            return "failed"
        self.replaced += 1
        if replaced is not None:
            self._release(replaced)
        return "going" if self._left else "done"
