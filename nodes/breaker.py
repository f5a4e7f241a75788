"""A circuit breaker for one engine: failures in a row open it, probes in a row close it again.

Pure: the clock is passed in, and whoever owns the breaker performs the probes. Only connect errors, time-outs and 5xx are
failures; a 4xx is the client's and a 503 says full, not broken.
"""

from dataclasses import dataclass

from config.defaults import Settings


@dataclass(slots=True)
class Breaker:
    """`is_open` engines get no turns. The pause before a probe doubles each time it opens again without a good turn."""

    settings: Settings
    is_open: bool = False
    failures: int = 0
    probes_good: int = 0
    openings: int = 0
    probe_at_s: float = 0.0
    failed_at_s: float = float("-inf")
    is_trial: bool = False
    has_trial: bool = False

    @property
    def admits(self) -> bool:
        """May a turn go there now? After probes closed it, one at a time, until one went well: `/health` of a vLLM that
        drains says 200 while every turn fails."""
        return not self.is_open and not (self.is_trial and self.has_trial)

    def began(self) -> None:
        """A turn was sent there."""
        self.has_trial = self.is_trial

    def ended(self) -> None:
        """A turn sent there is over, however it went."""
        self.has_trial = False

    def succeeded(self, begun_s: float = float("inf")) -> None:
        """A turn that began at `begun_s` went well; one from before the last failure says nothing of now."""
        if begun_s <= self.failed_at_s:
            return
        self.failures = 0
        if not self.is_open:
            self.openings = 0
            self.is_trial = False

    def failed(self, now_s: float) -> bool:
        """A turn failed by the engine's fault. True when this opened the breaker."""
        self.failures += 1
        self.failed_at_s = now_s
        if self.is_open or (self.failures < self.settings.breaker_failures and not self.is_trial):
            return False
        self._open(now_s)
        return True

    def _open(self, now_s: float) -> None:
        self.is_open = True
        self.is_trial = False
        self.openings += 1
        self.probes_good = 0
        pause_s = self.settings.breaker_open_s * 2 ** min(self.openings - 1, 30)
        self.probe_at_s = now_s + min(pause_s, self.settings.breaker_open_max_s)

    def wants_probe(self, now_s: float) -> bool:
        """The pause is over: ask the engine once whether it lives."""
        return self.is_open and now_s >= self.probe_at_s

    def probed(self, good: bool, now_s: float) -> bool:
        """The probe's answer. True when it closed the breaker."""
        if not good:
            self._open(now_s)
            return False
        self.probes_good += 1
        if self.probes_good < self.settings.breaker_successes:
            return False
        self.is_open = False
        self.is_trial = True
        self.failures = 0
        return True

    def reset(self) -> None:
        """The engine was started anew: what its predecessor did says nothing."""
        self.is_open = False
        self.is_trial = False
        self.failures = 0
        self.openings = 0
