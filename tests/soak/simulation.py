"""The seeded simulation (tests/simulation), seed after seed: what all of them came to. The first that fails ends it."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import asyncpg

from config.defaults import Settings
from tests.simulation import plan
from tests.simulation.run import simulate


@dataclass(frozen=True, slots=True)
class Seeds:
    """Which seeds, at which size."""

    first: int
    count: int
    size: plan.Size


SHORT = Seeds(first=1, count=1, size=plan.SHORT)
LONG = Seeds(first=1, count=6, size=plan.LONG)

NAMES = {
    "turns": "turns in the book",
    "charged_turns": "of those charged",
    "seen_whole": "answers received whole: charged exactly",
    "seen_error_event": "streams that an engine's death ended: charged what came",
    "seen_left": "clients that left: charged what came, at most what was sent",
    "seen_cut": "answers that the gateway's death cut",
    "killed_while_sending": "killed between journal and last byte",
    "seen_refused": "refused: charged nothing",
    "keys_answered": "Idempotency-Keys answered: charged once",
    "replays": "answers given again: charged nothing",
}


async def seeds(
    settings: Settings, pool: asyncpg.Pool, folder: Path, size: Seeds, tell: Callable[[str], None] = print
) -> dict[str, float]:
    """Each seed has stores and processes of its own."""
    totals: Counter[str] = Counter()
    failures: Counter[str] = Counter()
    for seed in range(size.first, size.first + size.count):
        totals.update(await simulate(seed, size.size, folder / str(seed), tell))
        failures.update(each.kind for lane in plan.draw(seed, size.size).lanes.values() for each in lane)
    happened = {kind.replace("_", " "): count for kind, count in sorted(failures.items())}
    return {"seeds": size.count, **happened, **{words: totals[name] for name, words in NAMES.items()}}
