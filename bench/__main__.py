"""`make bench`: asks every question, and writes bench/RESULTS.md with its pictures. Named ones are asked alone; the other
answers stay as they were, each with the commit and the machine that it was found on."""

import argparse
import json
import sys
from pathlib import Path

from bench import (
    chunk,
    heartbeats,
    latency,
    memory,
    money,
    prefix,
    prefix_vllm,
    profile,
    reach,
    request,
    routing,
)
from bench.peers import PEERS, PINS, versions
from bench.processes import ROOT
from bench.question import Finding, find
from bench.report import pictures, results
from bench.rounds import tell

QUESTIONS = (
    request.QUESTION, chunk.QUESTION, latency.QUESTION, memory.QUESTION, routing.QUESTION, prefix.QUESTION,
    prefix_vllm.QUESTION, reach.QUESTION, heartbeats.QUESTION, profile.QUESTION, money.QUESTION,
)  # fmt: skip
FOLDER = ROOT / "bench"


def main() -> int:
    names = [question.name for question in QUESTIONS]
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="QUESTION", help=f"some of {', '.join(names)} (default: all)"
    )
    parser.add_argument("--rounds", type=int, help="how often each is measured (default: its own number)")
    parser.add_argument("--json", action="store_true", help="print every sample as JSON too")
    parser.add_argument("--into", type=Path, default=FOLDER, help="the folder to write to (default: bench/)")
    parser.add_argument(
        "--render", action="store_true", help="measure nothing: write the text anew from results.json"
    )
    args = parser.parse_args()
    if unknown := set(args.names) - set(names):
        parser.error(f"no such question: {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    if missing := {peer.name for peer in PEERS} - set(versions()):
        tell(
            f"not installed, or another version than {PINS}: {', '.join(sorted(missing))} (make bench-peers)"
        )
    findings = load(args.into)
    for question in () if args.render else QUESTIONS:
        if not args.names or question.name in args.names:
            tell(f"== {question.title}")
            findings[question.name] = find(question, question.asked(args.rounds))
            write(args.into, findings)
    write(args.into, findings)
    if args.json:
        print(json.dumps({name: finding.to_json() for name, finding in findings.items()}, indent=1))
    tell(f"written: {args.into / 'RESULTS.md'}")
    return 0


def load(folder: Path) -> dict[str, Finding]:
    """What was found before."""
    path = folder / "results.json"
    if not path.exists():
        return {}
    return {name: Finding.from_json(fields) for name, fields in json.loads(path.read_text()).items()}


def write(folder: Path, findings: dict[str, Finding]) -> None:
    """Samples, text and pictures, after each question: what comes later may fail."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    told = {name: finding.to_json() for name, finding in findings.items()}
    lines = json.dumps(told).replace("}, {", "},\n{")  # a sample a line
    (folder / "results.json").write_text(lines + "\n")
    (folder / "RESULTS.md").write_text(results(QUESTIONS, findings))
    for question in QUESTIONS:
        if question.name in findings:
            for name, svg in pictures(question, findings[question.name]).items():
                (folder / "pictures" / name).write_text(svg)


if __name__ == "__main__":
    sys.exit(main())
