"""What was measured, as numbers with names, and arithmetic over rounds: medians, spread, paired ratios and differences."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Sample:
    """One number of one round. `measure` says what was measured, `case` under which load, `arm` of whom."""

    measure: str
    case: str
    arm: str
    unit: str
    round: int
    value: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of some rounds with the least and the most of them."""

    median: float
    least: float
    most: float
    rounds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(statistics.median(values), min(values), max(values), len(values))

    def __str__(self) -> str:
        """As a cell of a table: median (least-most)."""
        between = " to " if self.least < 0 else "-"
        return f"{plain(self.median)} ({plain(self.least)}{between}{plain(self.most)})"


class Samples:
    """The samples of one question, to be asked for."""

    def __init__(self, samples: Iterable[Sample]) -> None:
        self.all = list(samples)

    def measures(self) -> list[tuple[str, str]]:
        """Each measure with its unit, in the order of measuring."""
        return list(dict.fromkeys((sample.measure, sample.unit) for sample in self.all))

    def cases(self, measure: str) -> list[str]:
        return list(dict.fromkeys(sample.case for sample in self.all if sample.measure == measure))

    def arms(self, measure: str) -> list[str]:
        return list(dict.fromkeys(sample.arm for sample in self.all if sample.measure == measure))

    def by_round(self, measure: str, case: str, arm: str) -> dict[int, float]:
        """The value of each round."""
        wanted = (measure, case, arm)
        return {one.round: one.value for one in self.all if (one.measure, one.case, one.arm) == wanted}

    def spread(self, measure: str, case: str, arm: str) -> Spread | None:
        """None where nothing was measured."""
        found = self.by_round(measure, case, arm)
        return Spread.of(list(found.values())) if found else None

    def ratio(self, measure: str, case: str, arm: str, against: str) -> Spread | None:
        """What `arm` takes for each unit that `against` takes, within a round; None without a round of both."""
        ours, theirs = self.by_round(measure, case, arm), self.by_round(measure, case, against)
        ratios = [ours[number] / theirs[number] for number in ours if theirs.get(number)]
        return Spread.of(ratios) if ratios else None


def paired_differences(samples: Iterable[Sample], measure: str, named: str, base: str) -> list[Sample]:
    """For each arm but `base`, what it took more than `base` within the same round and case, as the measure `named`."""
    some = [sample for sample in samples if sample.measure == measure]
    bases = {(sample.case, sample.round): sample.value for sample in some if sample.arm == base}
    return [
        Sample(named, one.case, one.arm, one.unit, one.round, one.value - bases[one.case, one.round])
        for one in some
        if one.arm != base and (one.case, one.round) in bases
    ]


def quantile(values: Iterable[float], share: float) -> float:
    """The value that `share` of them are below; 0 of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def plain(value: float) -> str:
    """A number with three digits or so."""
    size = abs(value)
    return f"{value:,.0f}" if size >= 1000 else f"{value:.1f}" if size >= 10 else f"{value:.2f}"
