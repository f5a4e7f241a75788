"""What the measurements are held to, and whether they are met."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from bench import chunk, latency, memory, prefix, prefix_vllm, request, routing
from bench.arms import OURS
from bench.question import Finding
from bench.samples import Spread

Verdict = Literal["met", "not met", "not measured"]
ROUNDS_ASKED = 5
"""Of those targets that compare arms within a round."""


@dataclass(frozen=True, slots=True)
class Target:
    """The median of a measure of poolgate's, or of its ratio to an arm's within a round, is at most `at_most`; with
    `is_least`, at least that."""

    question: str
    measure: str
    case: str
    at_most: float
    against: str | None = None
    unit: str = ""
    is_least: bool = False

    @property
    def words(self) -> str:
        what = f"{self.measure}, {self.case}"
        sign = "≥" if self.is_least else "≤"
        return (
            f"{what}: {sign} {self.bound} × {self.against}"
            if self.against
            else f"{what}: {sign} {self.bound}"
        )

    @property
    def bound(self) -> str:
        if 0 < self.at_most < 0.1:
            return f"1/{1 / self.at_most:.0f}"
        return f"{self.at_most:g} {self.unit}".strip()

    def measured(self, findings: Mapping[str, Finding]) -> Spread | None:
        """What stands against `at_most`; None if it was not measured."""
        finding = findings.get(self.question)
        if finding is None:
            return None
        if self.against:
            return finding.samples.ratio(self.measure, self.case, OURS, self.against)
        return finding.samples.spread(self.measure, self.case, OURS)

    def verdict(self, spread: Spread | None) -> Verdict:
        if spread is None:
            return "not measured"
        is_met = spread.median >= self.at_most if self.is_least else spread.median <= self.at_most
        return "met" if is_met else "not met"

    def shown(self, spread: Spread | None) -> str:
        """The number as it is compared: a small ratio as a fraction."""
        if spread is None:
            return "-"
        if self.at_most < 0.1 and self.against and spread.median > 0:
            return f"1/{1 / spread.median:.0f}"
        return str(spread)


PACED_DELAY = chunk.ADDED.format("p99")
TARGETS: tuple[Target, ...] = (
    *(
        Target("request", request.CPU, case, bound, against)
        for case in ("200 B", "4 KB")
        for against, bound in (("vllm-router", 0.75), ("nginx", 2.25), ("litellm", 1 / 200))
    ),
    Target("chunk", chunk.CPU, chunk.PACED, 0.85, "vllm-router"),
    Target("chunk", PACED_DELAY, chunk.PACED, 2.0, unit="ms"),
    Target("chunk", chunk.CPU, chunk.BURST, 0.7, "vllm-router"),
    Target("latency", latency.ADDED.format("p50"), "1,000/s", 0.25, unit="ms"),
    Target("latency", latency.ADDED.format("p99"), "1,000/s", 1.5, unit="ms"),
    Target("memory", memory.KB, "8,000 streams", 15.0, unit="KB"),
    Target("memory", memory.LOST, "8,000 streams", 0.0),
    *(Target("routing", routing.TIMES, case, 2.0) for case in routing.POOLS if case.startswith("10,000")),
    *(
        target
        for question, case, gain in (
            ("prefix", prefix.STAND_INS, 2.2),
            ("prefix_vllm", prefix_vllm.REAL, 1.6),
        )
        for target in (
            Target(question, prefix.GAIN, case, gain, is_least=True),
            Target(question, prefix.AGAINST_PEER, case, 1.0, is_least=True),
            Target(question, prefix.BUSIEST, case, 1.3),
        )
    ),
    Target("prefix", prefix.AGAINST_TWO, prefix.COLD, 1.0),
)
