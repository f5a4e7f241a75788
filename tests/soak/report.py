"""The report of the soaks as Markdown: what each ran on, what it measured, what failed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

HEAD = """\
# Soak

Written by `make soak`: the long forms of tests/integration/test_streams_many.py, test_engine_killed.py,
test_reload.py, test_money_crash.py, test_cut_streams.py, test_limits_workers.py, test_fuzz_edge.py and of
tests/simulation. But for the fuzz the gateway is a real `poolgate serve` with its workers, agents are real agents; engines
are the stand-in (bench/fake_engine), and clients, engines and gateway are processes of their own. What each number means is
said in tests/soak/*.py. Sections are replaced one by one: `make soak ARGS=limits` renews that one.
"""


@dataclass(frozen=True, slots=True)
class Result:
    """One soak's numbers; `error` is empty when every bound held."""

    title: str
    numbers: Mapping[str, float]
    seconds: float
    error: str


def write_section(path: Path, about: Mapping[str, str], result: Result, titles: Sequence[str]) -> None:
    """Put one soak's section into the report at `path`; those of the other `titles` stay as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sections = _sections(path.read_text() if path.exists() else "")
    sections[result.title] = _section(about, result)
    path.write_text("\n".join([HEAD, *(sections[title] for title in titles if title in sections)]))


def _sections(report: str) -> dict[str, str]:
    """A report's sections, by title."""
    found = ["## " + section for section in ("\n" + report).split("\n## ")[1:]]
    return {section[3:].partition(": ")[0]: section.rstrip("\n") + "\n" for section in found}


def _section(about: Mapping[str, str], result: Result) -> str:
    verdict = "FAILED" if result.error else "passed"
    ran = f"{about['date']}, commit {about['commit']}, {about['machine']}, load before {about['load before']}"
    lines = [f"## {result.title}: {verdict} ({result.seconds:.0f} s)", "", f"{ran}.", ""]
    if result.error:
        lines += ["```", result.error, "```", ""]
    if result.numbers:
        lines += ["| | |", "|---|---:|"]
        lines += [f"| {name} | {value:,} |" for name, value in result.numbers.items()]
        lines.append("")
    return "\n".join(lines)
