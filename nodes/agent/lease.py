"""How long this agent may take new work: until the lease that the gateway gave it runs out.

Counted from when the question was sent, so that it never ends later here than there. What happens then is `conduct`'s
affair.
"""

from collections.abc import Callable


class Lease:
    """`is_held` is False from the moment it ran out until it is renewed. Before the first one nothing has run out."""

    def __init__(self, seconds: float, now: Callable[[], float]) -> None:
        self.seconds = seconds
        self._now = now
        self._ends_s: float | None = None

    @property
    def was_given(self) -> bool:
        return self._ends_s is not None

    @property
    def is_held(self) -> bool:
        return self._ends_s is None or self._now() < self._ends_s

    def renew(self, asked_s: float, seconds: float = 0.0) -> None:
        """The gateway answered what was asked at `asked_s`; `seconds` is a new length, 0 the last one."""
        if seconds > 0:
            self.seconds = seconds
        self._ends_s = max(self._ends_s or 0.0, asked_s + self.seconds)
