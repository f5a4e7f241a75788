"""What the choice of an engine costs, in pools of 10 to 10,000 nodes, of which all or three can take the turn."""

import json
import random
import sys
import time
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from typing import Any

from bench.arms import OURS
from bench.bodies import MODEL
from bench.question import Asked, Question, run
from bench.rounds import rounds_of, tell
from bench.samples import Sample
from config.defaults import Settings
from nodes.breaker import Breaker
from nodes.routing.prefixes import Prefixes
from nodes.routing.router import Need, Router
from nodes.routing.scorers import Policy
from nodes.routing.snapshot import Engine, Load, Model, Snapshot

COST = "CPU a choice"
TIMES = "times what it costs among 10 nodes"
FEW, MANY = 3, 10_000
ACCOUNT, OTHER = 1, 2
SETTINGS = Settings()
SECONDS = 0.3
"""Of choosing, for one number."""

BASE = "10 nodes"
LONG = ", prompts of 4 KB"
POOLS: dict[str, Callable[[], list[Engine]]] = {
    BASE: lambda: _pool(10),
    "1,000 nodes": lambda: _pool(1000),
    "10,000 nodes": lambda: _pool(MANY),
    "10,000 nodes, 3 serve the model": lambda: _pool(
        MANY, lambda number: {} if number < FEW else {"model": "other"}
    ),
    "10,000 nodes, 3 are not broken": lambda: _pool(MANY, lambda number: {"is_open": number >= FEW}),
    "10,000 nodes, 3 are the pinned provider's": lambda: _pool(
        MANY, lambda number: {"account": ACCOUNT if number < FEW else OTHER}
    ),
    BASE + LONG: lambda: _pool(10),
    "10,000 nodes" + LONG: lambda: _pool(MANY),
}
METHOD = f"""\
`nodes.routing.router.Router.route` alone, in this process, over a snapshot of so many engines with random loads, for
one turn after the other (CPU of this process; {SECONDS:g} s for each number). Nothing changes the loads between two
choices. Prompts are short, which are not hashed, or of 4 KB: 64 system prompts, each with questions of its own.
Of 10,000 nodes three can take the turn in three ways: they alone serve the model, the breakers of all
others are open, or the turn is pinned to their provider."""


def measure(asked: Asked) -> list[Sample]:
    samples: list[Sample] = []
    wanted = {base_of(case) for case in asked.cases} | set(asked.cases)
    snapshots = {case: Snapshot.of(pool(), MANY) for case, pool in POOLS.items() if case in wanted}
    for number, order in rounds_of(list(snapshots), asked.rounds):
        costs = {case: _cost_us(snapshots[case], case) for case in order}
        for case in snapshots if number else ():
            tell(f"{case}: {costs[case]:.2f} µs")
            samples.append(Sample(COST, case, OURS, "µs", number, costs[case]))
            base = base_of(case)
            if case != base:
                samples.append(Sample(TIMES, case, OURS, "x", number, costs[case] / costs[base]))
    return samples


def base_of(case: str) -> str:
    """The case among 10 nodes that another one is held against."""
    return BASE + LONG if case.endswith(LONG) else BASE


def _cost_us(snapshot: Snapshot, case: str) -> float:
    """CPU of one choice."""
    router = Router(Policy.of(SETTINGS), Prefixes(SETTINGS.prefix_entries_max), sessions_max=1)
    needs = list(_needs(ACCOUNT if "pinned" in case else None, size=4096 if case.endswith(LONG) else 200))
    began_s, choices, step = time.process_time(), 0, 1
    while (spent_s := time.process_time() - began_s) < SECONDS:
        for need in islice(cycle(needs), step):
            router.route(snapshot, need)
        choices += step
        step = min(2 * step, 1000)
    return spent_s / choices * 1e6


def _needs(account: int | None, *, size: int) -> Iterator[Need]:
    for question in range(4):
        for number in range(64):
            prompt = json.dumps(
                {"messages": [{"role": "user", "content": f"{number:08}" * (size // 8) + f"? {question}"}]},
                separators=(",", ":"),  # as a turn is sent, by which its prompt is found
            )
            tokens = len(prompt) // 4 + 50
            yield Need(
                model=MODEL,
                kind="generate",
                tokens=tokens,
                context=tokens,
                account_id=account,
                body=prompt.encode(),
            )


def _pool(count: int, differ: Callable[[int], dict[str, Any]] = lambda _: {}) -> list[Engine]:
    rng = random.Random(count)
    engines = [_engine(number, rng.randrange(100_000), **differ(number)) for number in range(count)]
    rng.shuffle(engines)
    return engines


def _engine(
    number: int, tokens: int, *, model: str = MODEL, account: int = ACCOUNT, is_open: bool = False
) -> Engine:
    return Engine(
        key=f"node-{number}/e0", node_id=f"node-{number}", engine_id="e0", account_id=account, host="127.0.0.1",
        port=8000, models={model: Model(model, 131_072)}, breaker=Breaker(SETTINGS, is_open=is_open),
        load=Load(turns=tokens // 500, tokens=tokens),
    )  # fmt: skip


QUESTION = Question(
    "routing", "What a choice among nodes costs", METHOD, measure, rounds=7, cases=tuple(POOLS), arms=(OURS,),
    is_compared=False,
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(run(QUESTION))
