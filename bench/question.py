"""A question that a benchmark answers: its name, its words, how it is measured; and its command line, the same for all."""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bench.machine import machine
from bench.peers import PINS, versions
from bench.samples import Sample, Samples, Spread, plain


@dataclass(frozen=True, slots=True)
class Asked:
    """What is wanted of a question: how many rounds, which of its cases and of its arms."""

    rounds: int
    cases: Sequence[str]
    arms: Sequence[str]


@dataclass(frozen=True, slots=True)
class Question:
    """`method` says in Markdown how numbers are made; `pictures` are measures to be drawn, `is_compared` asks for ratios."""

    name: str
    title: str
    method: str
    measure: Callable[[Asked], list[Sample]]
    rounds: int
    cases: Sequence[str]
    arms: Sequence[str]
    pictures: Sequence[str] = ()
    is_compared: bool = True

    def asked(self, rounds: int | None = None, only: str = "", arms: Sequence[str] = ()) -> Asked:
        """All of it, but for what is said otherwise: cases that have `only` in their name, and these arms."""
        return Asked(
            rounds or self.rounds,
            [only] if only in self.cases else [case for case in self.cases if only in case],
            [arm for arm in self.arms if not arms or arm in arms],
        )


@dataclass(frozen=True, slots=True)
class Finding:
    """A question's answer: on what it was measured, in how many rounds, and the samples."""

    about: dict[str, str]
    rounds: int
    samples: Samples

    def to_json(self) -> dict[str, Any]:
        rows = [sample.to_json() for sample in self.samples.all]
        return {"about": self.about, "rounds": self.rounds, "samples": rows}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Finding":
        return cls(fields["about"], fields["rounds"], Samples(Sample(**row) for row in fields["samples"]))


def find(question: Question, asked: Asked) -> Finding:
    """Measure. Samples come in the order of the arms, whatever the rounds' was."""
    about = machine()
    if set(question.arms) & set(PINS):
        about["peers"] = ", ".join(f"{name} {version}" for name, version in versions().items())
    order = {arm: place for place, arm in enumerate(question.arms)}
    samples = sorted(question.measure(asked), key=lambda sample: order.get(sample.arm, len(order)))
    return Finding(about, asked.rounds, Samples(samples))


def run(question: Question) -> int:
    """`python -m bench.NAME`: measure and print."""
    parser = argparse.ArgumentParser(prog=f"python -m bench.{question.name}", description=question.title)
    parser.add_argument("--rounds", type=int, help=f"how often each is measured (default: {question.rounds})")
    parser.add_argument(
        "--only", default="", help=f"only cases with this in their name: {', '.join(question.cases)}"
    )
    parser.add_argument("--arms", nargs="+", default=(), help=f"only these: {', '.join(question.arms)}")
    parser.add_argument("--json", action="store_true", help="print every sample as JSON instead of a table")
    args = parser.parse_args()
    asked = question.asked(args.rounds, args.only, args.arms)
    if not asked.cases or len(asked.arms) < len(set(args.arms)):
        parser.error("no such case, or no such arm")
    finding = find(question, asked)
    print(json.dumps(finding.to_json(), indent=1) if args.json else as_text(finding.samples))
    return 0


def as_text(samples: Samples) -> str:
    """Columns for a terminal: median, least and most."""
    lines = []
    for measure, unit in samples.measures():
        for case in samples.cases(measure):
            rows = [(arm, samples.spread(measure, case, arm)) for arm in samples.arms(measure)]
            lines += [f"{measure}, {case}", *(_line(arm, unit, spread) for arm, spread in rows if spread)]
    return "\n".join(lines)


def _line(arm: str, unit: str, spread: Spread) -> str:
    return f"  {arm:<46}{plain(spread.median):>9} {unit:<3} ({plain(spread.least)} - {plain(spread.most)})"
