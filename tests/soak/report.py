"""The report of a soak as Markdown: what it ran on, what it measured, what failed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

HEAD = """\
# Soak

Written by `make soak`: the long forms of tests/integration/test_streams_many.py, test_engine_killed.py,
test_money_crash.py, test_cut_streams.py, test_limits_workers.py and of tests/simulation. The gateway
is a real `poolgate serve` with its workers, agents are real agents; engines are the stand-in (bench/fake_engine), and
clients, engines and gateway are processes of their own. What each number means is said in tests/soak/*.py.
"""


@dataclass(frozen=True, slots=True)
class Result:
    """One soak's numbers; `error` is empty when every bound held."""

    title: str
    numbers: Mapping[str, float]
    seconds: float
    error: str


def write_report(path: Path, about: Mapping[str, str], results: Sequence[Result]) -> None:
    """Replace the report at `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([HEAD, _about(about), *map(_section, results)]) + "\n")


def _about(about: Mapping[str, str]) -> str:
    return "".join(f"- {name}: {value}\n" for name, value in about.items())


def _section(result: Result) -> str:
    verdict = "FAILED" if result.error else "passed"
    lines = [f"## {result.title}: {verdict} ({result.seconds:.0f} s)", ""]
    if result.error:
        lines += ["```", result.error, "```", ""]
    if result.numbers:
        lines += ["| | |", "|---|---:|"]
        lines += [f"| {name} | {value:,} |" for name, value in result.numbers.items()]
        lines.append("")
    return "\n".join(lines)
