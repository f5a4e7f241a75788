"""Who may import whom: the rule of the design, held against every module of the four packages.

Imports inside functions and under TYPE_CHECKING count too. The last tests prove the check on bad examples.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# The longest prefix that fits a module says which of our own packages it may import.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "gateway": ("gateway", "nodes", "billing", "config"),
    "nodes": ("nodes", "config"),
    # It ships alone to GPU hosts, and what of `nodes` it imports with it.
    "nodes.agent": ("nodes.agent", "nodes.protocol", "nodes.control_messages", "nodes.tunnel", "config"),
    "nodes.tunnel": ("nodes.tunnel", "config"),
    "billing": ("billing", "config"),
    "config": ("config",),
}
OURS = ("gateway", "nodes", "billing", "config", "tests", "bench")

# Surfaces are thin: services and the lifecycle must not know them. These may: what puts them together, and the
# edge, which stands around them and renders an error as the surface does that was asked.
API_IMPORTERS = ("gateway.api", "gateway.app", "gateway.edge", "gateway.cli", "gateway.__main__")

# Decisions without I/O: the clock is passed in, and nothing here awaits.
PURE = ("billing.money", "billing.prices", "nodes.breaker", "nodes.routing")
IO_PACKAGES = ("asyncio", "asyncpg", "redis", "aiohttp", "socket", "subprocess", "uvloop", "time")


def test_every_module_keeps_the_import_rule() -> None:
    checked = [(name, problem) for name, source in modules() for problem in violations(name, source)]
    assert checked == []


def test_the_check_sees_all_four_packages() -> None:
    assert {name.partition(".")[0] for name, _ in modules()} == {"gateway", "nodes", "billing", "config"}


@pytest.mark.parametrize(
    ("module", "source", "imported"),
    [
        ("nodes.registry", "import billing.money", "billing.money"),
        ("billing.usage", "from nodes import protocol", "nodes.protocol"),
        ("billing.usage", "from nodes.protocol import Heartbeat", "nodes.protocol"),
        ("config.logs", "def late():\n    from gateway.errors import GatewayError", "gateway.errors"),
        ("nodes.agent.reporter", "from nodes import registry", "nodes.registry"),
        ("nodes.agent.reporter", "from ..registry import Registry", "nodes.registry"),
        ("gateway.lifecycle", "import gateway.api.openai.chat", "gateway.api.openai.chat"),
        ("gateway.turn", "from .api import openai", "gateway.api.openai"),
        ("gateway.turn", "import bench.fake_engine", "bench.fake_engine"),
        ("nodes.breaker", "import asyncio", "asyncio"),
        ("nodes.routing.picker", "from aiohttp import web", "aiohttp.web"),
        ("billing.money", "if TYPE_CHECKING:\n    import asyncpg", "asyncpg"),
    ],
)
def test_a_forbidden_import_is_reported(module: str, source: str, imported: str) -> None:
    problems = violations(module, source)
    assert problems
    assert all(imported in problem for problem in problems)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "gateway.app",
            "import gateway.api.openai\nfrom billing import money\nfrom nodes.agent import build",
        ),
        ("gateway.api.openai.chat", "from gateway.api.system import health\nfrom gateway import errors"),
        (
            "nodes.agent.reporter",
            "from nodes.protocol import Heartbeat\nfrom nodes import protocol\nimport asyncio",
        ),
        ("nodes.agent.engine", "from . import reporter\nfrom config.clock import Clock"),
        ("nodes.heartbeats", "import asyncio\nimport asyncpg"),
        ("billing.prices", "import tomllib\nfrom pathlib import Path"),
    ],
)
def test_an_allowed_import_is_not_reported(module: str, source: str) -> None:
    assert violations(module, source) == []


def modules() -> Iterator[tuple[str, str]]:
    """Dotted name and source of every module of the four packages."""
    for package in MAY_IMPORT:
        if "." in package:
            continue
        for file in sorted((ROOT / package).rglob("*.py")):
            parts = file.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            yield name, file.read_text(encoding="utf-8")


def violations(module: str, source: str) -> list[str]:
    return [problem for imported in imports(module, source) for problem in judge(module, imported)]


def judge(module: str, imported: str) -> Iterator[str]:
    rule = max((prefix for prefix in MAY_IMPORT if is_under(module, prefix)), key=len)
    if is_under_any(imported, OURS) and not is_under_any(imported, MAY_IMPORT[rule]):
        yield f"{module} imports {imported}: {rule} may import {', '.join(MAY_IMPORT[rule])}"
    if is_under(imported, "gateway.api") and not is_under_any(module, API_IMPORTERS):
        yield f"{module} imports {imported}: surfaces know services, never the other way round"
    if is_under_any(module, PURE) and is_under_any(imported, IO_PACKAGES):
        yield f"{module} imports {imported}: it decides and does no I/O"


def imports(module: str, source: str) -> Iterator[str]:
    """Full names of what a module imports; `from package import name` counts as `package.name`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = absolute(module, node)
            # `from nodes import protocol` names a module, and `from nodes.protocol import Heartbeat` a
            # thing in one: both are judged by the dotted name, since a prefix decides.
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def absolute(module: str, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    is_package = (ROOT / Path(*module.split("."))).is_dir()
    parts = module.split(".")
    up = node.level - 1 if is_package else node.level
    origin = parts[: len(parts) - up]
    return ".".join([*origin, node.module] if node.module else origin)


def is_under(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def is_under_any(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(is_under(name, prefix) for prefix in prefixes)
