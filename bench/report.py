"""RESULTS.md out of what was measured: targets, where poolgate loses, and a part for each question, all of it computed."""

from collections.abc import Mapping, Sequence
from itertools import chain

from bench.arms import OURS, UNBILLED
from bench.peers import PEERS
from bench.question import Finding, Question
from bench.samples import Samples, Spread, plain
from bench.svg import Group, bars
from bench.targets import ROUNDS_ASKED, TARGETS, Target

HEAD = """\
# What poolgate costs, beside its peers

Written by `make bench`; every number and verdict below is computed from the samples in
[results.json](results.json), which has each round of each measurement. What each file of bench/ does is in
[README.md](README.md).

## How to reproduce it

    make bench-peers   # the peers into .bench/, nginx and h2load by apt-get (as root)
    make bench         # everything, some 90 minutes; this file and the pictures are written anew

One question alone: `python -m bench.request`, `bench.chunk`, `bench.latency`, `bench.memory`, `bench.routing`,
`bench.prefix`, `bench.prefix_vllm`, `bench.reach`, `bench.heartbeats`, `bench.profile`, `bench.money`, each with `--rounds`,
`--only`, `--arms` and `--json`;
`make bench ARGS="request chunk --rounds 3"` renews some parts of this file. Nothing else should run on the machine:
medians bear some noise, 99th percentiles don't.
"""

NOT_COMPARED = """\
## What is not compared

- **Features.** The peers check no keys (LiteLLM: one), keep no limits and move no money. poolgate does all of it in
  these numbers, unless *billing off* is said. vllm-router, sglang-router and LiteLLM do much that is not used here.
- **Networks, TLS, real engines.** Everything is on loopback of one machine, load generator and engine included,
  which take CPU and caches from whoever is measured. The engine is a stand-in that answers at once with vLLM's
  bytes (bench/fake_engine).
- **More than one process.** poolgate and nginx run one worker, LiteLLM one, the Rust routers as many threads as
  they like. CPU is summed over all processes and threads, so threads cost nobody anything here; how each of them
  scales is not measured.
- **Throughput at the limit.** CPU a request says how many requests a core can carry; nobody is driven to its limit
  on purpose.
- **Small prompts only.** 200 B, 4 KB and 64 KB; no images, no tools, no long conversations.
- **CPU depends on the pace.** Asked as fast as it answers, a gateway finds several requests at each wake-up; at
  fixed rates each request costs every gateway more (see *CPU a request at this rate*).

How it is made fair: all arms stand side by side, before ten addresses of the same engine process; in each round
each is measured once, in shuffled order; ratios are taken within a round, and their median is shown with the least
and the most. Peers run with their logs off, poolgate with one line a turn. Bodies differ from request to request in
their second half. CPU is read from the processes' own clocks in nanoseconds.
"""


def results(questions: Sequence[Question], findings: Mapping[str, Finding]) -> str:
    """The whole file."""
    told = [question for question in questions if question.name in findings]
    parts = [
        HEAD,
        targets(findings),
        losses(told, findings),
        NOT_COMPARED,
        *(section(question, findings[question.name]) for question in told),
    ]
    return "\n".join(part.strip() + "\n" for part in parts)


def targets(findings: Mapping[str, Finding]) -> str:
    """Each target with what was measured and the verdict."""
    rows = [(target, target.measured(findings)) for target in TARGETS]
    met = sum(target.verdict(spread) == "met" for target, spread in rows)
    lines = ["## Targets", "", f"{met} of {len(rows)} are met.", ""]
    lines += ["| target | measured: median (least-most) | rounds | |", "|---|---:|---:|---|"]
    lines += [_target_row(target, spread) for target, spread in rows]
    few = [
        name
        for name, one in findings.items()
        if one.rounds < ROUNDS_ASKED and name in ("request", "chunk", "latency")
    ]
    if few:
        lines += ["", f"{ROUNDS_ASKED} rounds are asked for; {', '.join(few)} had fewer."]
    return "\n".join(lines)


def _target_row(target: Target, spread: Spread | None) -> str:
    verdict = target.verdict(spread)
    bold = f"**{verdict}**" if verdict == "not met" else verdict
    return f"| {target.words} | {target.shown(spread)} | {spread.rounds if spread else '-'} | {bold} |"


def losses(questions: Sequence[Question], findings: Mapping[str, Finding]) -> str:
    """Every measure by which a peer does better than poolgate with everything on."""
    found: list[str] = []
    for question in questions:
        samples = findings[question.name].samples
        measures = samples.measures()
        for measure, unit in measures:
            if (f"added {measure}", unit) in measures:  # what is added says the same
                continue
            found += [line for case in samples.cases(measure) for line in _lost(samples, measure, unit, case)]
    if not found:
        found = ["- Nowhere, among what is measured here."]
    return "\n".join(["## Where poolgate loses", "", *found])


def _lost(samples: Samples, measure: str, unit: str, case: str) -> list[str]:
    ours = samples.spread(measure, case, OURS)
    if ours is None:
        return []
    names = (peer.name for peer in PEERS)
    better = [
        (name, spread)
        for name in names
        if (spread := samples.spread(measure, case, name)) and spread.median < ours.median
    ]
    if not better:
        return []
    others = ", ".join(f"{name} {plain(spread.median)}" for name, spread in better)
    return [f"- {measure}, {case}: poolgate {plain(ours.median)} {unit}; {others}.".replace("  ", " ")]


def section(question: Question, finding: Finding) -> str:
    """One question: how it was measured and on what, its pictures, its numbers, its ratios."""
    samples = finding.samples
    lines = [f"## {question.title}", "", question.method, ""]
    lines += [f"- {name}: {value}" for name, value in finding.about.items()]
    lines += [f"- rounds: {finding.rounds}", ""]
    lines += [f"![{measure}](pictures/{picture_name(question, measure)})" for measure in question.pictures]
    if question.name == "profile":
        lines += ["![flame graph](pictures/profile.svg)"]
    for measure, unit in samples.measures():
        lines += ["", *table(samples, measure, unit)]
    if question.is_compared:
        for measure, _ in samples.measures():
            lines += ratios(samples, measure)
    return "\n".join(lines)


def table(samples: Samples, measure: str, unit: str) -> list[str]:
    """Cases as rows and arms as columns; a single arm gets a row a case."""
    arms, cases = samples.arms(measure), samples.cases(measure)
    title = f"**{measure}**{f', {unit}' if unit else ''}: median (least-most)"
    head = [title, "", f"| | {' | '.join(arms)} |", f"|---|{'---:|' * len(arms)}"]
    return head + [
        f"| {case} | {' | '.join(_cell(samples.spread(measure, case, arm)) for arm in arms)} |"
        for case in cases
    ]


def ratios(samples: Samples, measure: str) -> list[str]:
    """poolgate's share of what each peer takes, within rounds; nothing where there is no peer."""
    peers = [arm for arm in samples.arms(measure) if arm in {peer.name for peer in PEERS}]
    ours = [arm for arm in samples.arms(measure) if arm in (OURS, UNBILLED)]
    if not peers or not ours or samples.cases(measure) == ["no requests"]:
        return []
    head = ["", f"**{measure}**, ratios within a round: median (least-most)", ""]
    head += [f"| | {' | '.join(f'÷ {peer}' for peer in peers)} |", f"|---|{'---:|' * len(peers)}"]
    rows = chain.from_iterable(
        [
            f"| {arm}, {case} | {' | '.join(_ratio_cell(samples.ratio(measure, case, arm, peer)) for peer in peers)} |"
            for arm in ours
            if samples.spread(measure, case, arm)
        ]
        for case in samples.cases(measure)
    )
    return head + list(rows)


def _cell(spread: Spread | None) -> str:
    return str(spread) if spread else "-"


def _ratio_cell(spread: Spread | None) -> str:
    if spread is None:
        return "-"
    if spread.median < 0.1:
        return f"1/{1 / spread.median:.0f}" if spread.median > 0 else "0"
    return str(spread)


def picture_name(question: Question, measure: str) -> str:
    """A file name out of a measure's words."""
    words = "".join(letter if letter.isalnum() else " " for letter in measure.lower()).split()
    return f"{question.name}-{'-'.join(words)}.svg"


def pictures(question: Question, finding: Finding) -> dict[str, str]:
    """SVG text by file name."""
    samples, units = finding.samples, dict(finding.samples.measures())
    found = {}
    for measure in question.pictures:
        groups = [
            Group(
                case,
                [
                    (arm, spread)
                    for arm in samples.arms(measure)
                    if (spread := samples.spread(measure, case, arm))
                ],
            )
            for case in samples.cases(measure)
        ]
        if groups:
            found[picture_name(question, measure)] = bars(measure, units[measure], groups)
    return found
