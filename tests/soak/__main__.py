"""`make soak`: the long forms one after another, with progress, and docs/soak.md at the end; exit code 1 if one failed."""

import argparse
import asyncio
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg
import uvloop

from bench.ground import fresh_database
from bench.machine import machine
from bench.processes import ROOT
from config.defaults import Settings
from config.embedded import EmbeddedStores
from config.postgres import open_pool
from config.settings import load_settings
from gateway.supervisor import raise_descriptor_limit
from tests.soak import (
    cuts,
    fuzz,
    killed,
    limits,
    memory,
    money_crash,
    overload,
    reload,
    simulation,
    stalled,
    streams,
)
from tests.soak.report import Result, write_section

REPORT = ROOT / "docs" / "soak.md"
BOUND_S = 600.0
"""No soak takes this long, except one that hangs, or one that says so."""

MEMORY_BOUND_S = 3600.0
"""A million turns."""

FUZZ_BOUND_S = 7200.0
"""Ten million inputs; two cores take 15 to 30 minutes."""

Soak = Callable[[Settings, asyncpg.Pool, Path, Any, Callable[[str], None]], Awaitable[dict[str, float]]]


@dataclass(frozen=True, slots=True)
class Case:
    """One question: its words for people, who answers it, and at which size."""

    name: str
    title: str
    run: Soak
    long: Any
    short: Any
    bound_s: float = BOUND_S


CASES = (
    Case(
        "streams", "Slow streams, all through one worker", streams.many_slow_streams, streams.LONG, streams.SHORT
    ),
    Case(
        "stalled", "Clients that read nothing", stalled.clients_that_read_nothing, stalled.LONG, stalled.SHORT
    ),
    Case("engine", "kill -9 of engines under load", killed.engine_killed, killed.LONG, killed.SHORT),
    Case("silent", "SIGSTOP of an engine under load", killed.engine_silent, killed.LONG, killed.SHORT),
    Case("worker", "kill -9 of workers under load", killed.worker_killed, killed.LONG, killed.SHORT),
    Case(
        "reload", "SIGHUP and kill -9 of workers under load", reload.reloaded, reload.RELOADS_LONG, reload.RELOADS_SHORT
    ),
    Case("stop", "SIGTERM under load", reload.stopped, reload.STOPS_LONG, reload.STOPS_SHORT),
    Case("memory", "Many keys, a million turns", memory.many_keys, memory.LONG, memory.SHORT, MEMORY_BOUND_S),
    Case("simulation", "Everything fails, seed after seed", simulation.seeds, simulation.LONG, simulation.SHORT),
    Case(
        "gateway", "kill -9 of the whole gateway under load", money_crash.gateway_killed, money_crash.CRASHES_LONG,
        money_crash.CRASHES_SHORT,
    ),
    Case(
        "postgres", "PostgreSQL away under load", money_crash.postgres_killed, money_crash.OUTAGE_LONG,
        money_crash.OUTAGE_SHORT,
    ),
    Case(
        "valkey", "Valkey away under load", money_crash.valkey_killed, money_crash.OUTAGE_LONG, money_crash.OUTAGE_SHORT
    ),
    Case("cuts", "Streams cut at random points", cuts.streams_cut, cuts.LONG, cuts.SHORT),
    Case(
        "limits", "60 requests a minute over four workers", limits.a_minute_has_60, limits.LONG, limits.SHORT
    ),
    Case(
        "overload", "Three times what engines can do, two accounts", overload.overloaded, overload.LONG, overload.SHORT
    ),
    Case("fuzz", "Seeded nonsense at the edge", fuzz.edge_fuzzed, fuzz.LONG, fuzz.SHORT, FUZZ_BOUND_S),
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    names = [case.name for case in CASES]
    parser.add_argument("only", nargs="*", metavar="NAME", help=f"some of {', '.join(names)} (default: all)")
    parser.add_argument("--short", action="store_true", help="the sizes of `make test`")
    parser.add_argument("--report", type=Path, default=REPORT, help="where to write (default: docs/soak.md)")
    args = parser.parse_args()
    if unknown := set(args.only) - set(names):
        parser.error(f"no such soak: {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    raise_descriptor_limit()
    cases = [case for case in CASES if not args.only or case.name in args.only]
    folder = Path(tempfile.mkdtemp(prefix="poolgate-soak-"))
    try:
        with EmbeddedStores.start(folder / "stores") as stores:
            results = []
            for case in cases:
                about = machine()
                results.append(_run(case, stores, folder, is_short=args.short))
                write_section(args.report, about, results[-1], [case.title for case in CASES])
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"report: {args.report}")
    return 0 if all(result.error == "" for result in results) else 1


def _run(case: Case, stores: EmbeddedStores, folder: Path, *, is_short: bool) -> Result:
    started_s = time.monotonic()
    (folder / case.name).mkdir()

    def tell(words: str) -> None:
        print(f"{time.monotonic() - started_s:7.1f} s  {case.name}: {words}", flush=True)

    tell(case.title)
    numbers: dict[str, float] = {}
    error = ""
    try:
        numbers = uvloop.run(_in_database(case, stores, folder / case.name, tell, is_short=is_short))
    except Exception as failure:  # noqa: BLE001 - whatever it is, the others are still to run
        traceback.print_exception(failure)
        error = f"{type(failure).__name__}: {failure}"
    tell("failed" if error else "passed")
    return Result(case.title, numbers, time.monotonic() - started_s, error)


async def _in_database(
    case: Case, stores: EmbeddedStores, folder: Path, tell: Callable[[str], None], *, is_short: bool
) -> dict[str, float]:
    """A fresh database for each, so that its usage records are its own."""
    url = await fresh_database(stores.database_url, f"soak_{case.name}")
    settings = load_settings(
        environ={}, database_url=url, redis_url=stores.redis_url, data_dir=str(folder / "data"),
        key_pepper="pepper-of-the-soak", heartbeat_interval_s=0.5, heartbeat_grace_s=5.0,
        breaker_open_s=0.1, engine_poll_s=0.2, engine_restart_s=0.1, node_networks="127.0.0.0/8",
    )  # fmt: skip
    async with asyncio.timeout(case.bound_s), await open_pool(url, max_size=4, timeout_s=30.0) as pool:
        return await case.run(settings, pool, folder, case.short if is_short else case.long, tell)


if __name__ == "__main__":
    sys.exit(main())
