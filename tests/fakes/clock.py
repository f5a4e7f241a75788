"""A clock that stands still until a test moves it."""


class FakeClock:
    """Fulfils `config.clock.Clock`."""

    def __init__(self, now: float = 1_750_000_000.0, monotonic: float = 1_000.0) -> None:
        self._now = now
        self._monotonic = monotonic

    def now(self) -> float:
        return self._now

    def monotonic(self) -> float:
        return self._monotonic

    def advance(self, seconds: float) -> None:
        """Both clocks go forward."""
        assert seconds >= 0, "time does not go back; set_now moves the wall clock alone"
        self._now += seconds
        self._monotonic += seconds

    def set_now(self, now: float) -> None:
        """The wall clock alone jumps, as it does when a machine is set right."""
        self._now = now
