"""Seeded nonsense at the edge (tests/fuzz), on all cores: nothing escapes, answers are in order, nothing is left.

A failure names the seed, the numbers and the bytes of its input. The seed is the time, or `POOLGATE_FUZZ_SEED`
where that is set. One share alone: `python -m tests.soak.fuzz SEED FIRST COUNT`.
"""

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg
import uvloop

from bench.processes import ROOT
from config.defaults import Settings
from tests.fuzz.edge import fuzz

SEED_VARIABLE = "POOLGATE_FUZZ_SEED"


@dataclass(frozen=True, slots=True)
class Size:
    """How many inputs in all, and in one share: a share has an event loop of its own."""

    inputs: int
    share: int


SHORT = Size(inputs=20_000, share=5_000)
LONG = Size(inputs=10_000_000, share=50_000)


async def edge_fuzzed(
    settings: Settings, pool: asyncpg.Pool, folder: Path, size: Size, tell: Callable[[str], None] = print
) -> dict[str, float]:
    """Share after share, one process a core. The first that fails ends it."""
    seed = int(os.environ.get(SEED_VARIABLE, "0")) or int(time.time())
    tell(f"seed {seed}; {SEED_VARIABLE} sets it")
    shares = iter(range(0, size.inputs, size.share))
    started_s = time.monotonic()
    done = 0

    async def work() -> None:
        nonlocal done
        for first in shares:
            count = min(size.share, size.inputs - first)
            await _in_a_process(seed, first, count)
            done += count
            tell(f"{done:,} inputs")

    async with asyncio.TaskGroup() as group:
        for _ in range(os.cpu_count() or 1):
            group.create_task(work())
    took_s = time.monotonic() - started_s
    return {"seed": seed, "inputs": done, "inputs a second": round(done / took_s)}


async def _in_a_process(seed: int, first: int, count: int) -> None:
    """One share. Raises AssertionError with what it said."""
    command: list[Any] = [sys.executable, "-m", "tests.soak.fuzz", seed, first, count]
    process = await asyncio.create_subprocess_exec(
        *map(str, command), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        said, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
    assert process.returncode == 0, said.decode(errors="replace")[-8000:]


if __name__ == "__main__":
    seed, first, count = map(int, sys.argv[1:])
    uvloop.run(fuzz(seed, count, first=first))
