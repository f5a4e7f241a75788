"""What every stream's filter offers: bytes in, bytes out, no I/O and no clock.

One module for each wire format: `tap_openai` (chat and completions), `tap_responses`, `tap_complete`.
"""

from typing import Any, Protocol

from gateway.relay.events import Tokens


class Tap(Protocol):
    """One stream's filter. `feed` returns what the client gets now; the end is held back for `ending`."""

    tokens: Tokens
    error: dict[str, Any] | None
    is_done: bool

    def feed(self, data: bytes) -> bytes:
        """Whole events out; a part of one is kept. After an error or the end nothing more comes out."""
        ...

    @property
    def is_whole(self) -> bool:
        """Every answer was finished: what the client got is the whole answer."""
        ...

    def final_tokens(self) -> Tokens:
        """What was delivered, for settlement. A prompt that no engine counted is estimated here, and only here."""
        ...

    def ending(self, cost_minor: int) -> bytes:
        """The terminal bytes, sent after the turn was settled."""
        ...

    @property
    def pending_bytes(self) -> int:
        """Bytes of an event that has not ended yet."""
        ...
