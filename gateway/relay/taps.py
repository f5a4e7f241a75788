"""What every stream's filter offers: bytes in, bytes out, no I/O and no clock.

One module for each wire format: `tap_openai` (chat and completions), `tap_responses`, `tap_complete`.
"""

from abc import ABC, abstractmethod
from typing import Any

from gateway.relay.events import Tokens


class Tap(ABC):
    """One stream's filter. `feed` returns what the client gets now; the end is held back for `ending`."""

    __slots__ = ("error", "is_done", "tokens")

    def __init__(self) -> None:
        self.tokens = Tokens()
        self.error: dict[str, Any] | None = None
        self.is_done = False

    @abstractmethod
    def feed(self, data: bytes) -> bytes:
        """Whole events out; a part of one is kept. After an error or the end nothing more comes out."""

    @property
    @abstractmethod
    def is_whole(self) -> bool:
        """Every answer was finished: what the client got is the whole answer."""

    @abstractmethod
    def final_tokens(self) -> Tokens:
        """What was delivered, for settlement. A prompt that no engine counted is estimated here, and only here."""

    @abstractmethod
    def ending(self, cost_minor: int) -> bytes:
        """The terminal bytes, sent after the turn was settled."""

    @property
    @abstractmethod
    def pending_bytes(self) -> int:
        """Bytes of an event that has not ended yet."""
