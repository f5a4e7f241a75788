"""Hot modules as machine code: mypyc makes it of the same files, and it is used where it is there and fresh.

`config.compiling` makes it, which takes a C compiler and a minute; without it every module is interpreted and does the
same, a turn for nearly twice the CPU. What was made stands in `.compiled` beside the packages, with a digest of the sources
that it was made of: when one of them has changed, it is not used. `POOLGATE_COMPILED=0` leaves it alone as well.
"""

import hashlib
import importlib.machinery
import importlib.util
import os
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

MODULES = (
    "billing.holds",
    "billing.journal",
    "billing.journal_files",
    "billing.lease",
    "billing.lease_account",
    "billing.leases",
    "billing.limits.headers",
    "billing.limits.limiter",
    "billing.limits.local",
    "billing.limits.rules",
    "billing.limits.standing",
    "billing.money",
    "billing.prices",
    "billing.records",
    "config.clock",
    "config.ids",
    "config.lines",
    "gateway.admission",
    "gateway.api.credentials",
    "gateway.api.openai.asks",
    "gateway.api.openai.decode",
    "gateway.api.openai.plain",
    "gateway.dispatch",
    "gateway.edge.connection",
    "gateway.edge.door",
    "gateway.edge.head",
    "gateway.edge.turns",
    "gateway.flight",
    "gateway.hints",
    "gateway.identity.keyring",
    "gateway.lengths",
    "gateway.lifecycle",
    "gateway.placement",
    "gateway.records",
    "gateway.relay.digits",
    "gateway.relay.downstream",
    "gateway.relay.events",
    "gateway.relay.tap_complete",
    "gateway.relay.tap_openai",
    "gateway.relay.tap_responses",
    "gateway.relay.taps",
    "gateway.relay.upstream",
    "gateway.relay.upstreams",
    "gateway.tally",
    "gateway.turn",
    "nodes.breaker",
    "nodes.routing.filters",
    "nodes.routing.homes",
    "nodes.routing.picker",
    "nodes.routing.prefixes",
    "nodes.routing.recency",
    "nodes.routing.router",
    "nodes.routing.scorers",
    "nodes.routing.snapshot",
)
"""Those that every turn passes through. What is compiled can't be patched from outside, nor its classes be subclassed.

It has no docstrings, so what users are told by those is elsewhere: routes and ApiErrors. In it nothing is awaited while an
exception is handled, be it in `except`, `finally` or the exit of an `async with`: mypyc keeps what is handled for the
thread, not for each coroutine, so a `raise` behind it would raise another task's. And no slice of bytes ends before it
starts, which is an error there.
"""

SWITCH = "POOLGATE_COMPILED"
ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".compiled"
LIBRARY = "poolgate__mypyc"
"""All of the code; a module is a file beside it that shows its part."""

SUFFIX = sysconfig.get_config_var("EXT_SUFFIX") or ".so"
STAMP = "made-of"


def digest(root: Path = ROOT) -> str:
    """Of the sources, this file's list among them, and of the interpreter that they are compiled for."""
    mark = hashlib.sha256(f"{SUFFIX} {sys.version}".encode())
    for name in (__name__, *MODULES):
        mark.update((root / path_of(name, ".py")).read_bytes())
    return mark.hexdigest()


def is_fresh(folder: Path = FOLDER) -> bool:
    """Whether `folder` has what these sources make."""
    try:
        return (folder / STAMP).read_text() == digest()
    except OSError:
        return False


class CompiledFinder:
    """Finds these modules' machine code before their sources are looked for."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != LIBRARY and name not in MODULES:
            return None
        return importlib.util.spec_from_file_location(name, FOLDER / path_of(name, SUFFIX))


def use() -> None:
    """Import these modules as machine code from now on, if there is any; each package asks for it when it is imported."""
    if CompiledFinder not in sys.meta_path and os.environ.get(SWITCH) != "0" and is_fresh():
        sys.meta_path.insert(0, CompiledFinder)


def is_used() -> bool:
    """Whether this process imports them as machine code."""
    return CompiledFinder in sys.meta_path


def how() -> str:
    """The same in a word."""
    return "compiled" if is_used() else "interpreted"


def path_of(name: str, suffix: str) -> str:
    return name.replace(".", "/") + suffix
