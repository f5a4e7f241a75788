"""Makes the zipapp that a gateway gives to GPU hosts: the agent, the messages that it shares with the gateway, its settings.

The same sources give the same bytes everywhere: members in order, one fixed date, no compression. What it needs besides the
standard library is in REQUIREMENTS, which the installer puts into an environment of its own.
"""

import hashlib
import io
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nodes.protocol import AGENT_VERSION

REQUIREMENTS = ("aiohttp>=3.13,<4", "cryptography>=43")
"""An HTTP client, and what makes a listener's certificate. On a GPU host `nvidia-ml-py` too, or no GPU is seen."""

START = "nodes.agent.__main__"
ALSO = ("nodes.agent.watchdog", "nodes.agent.launcher")
"""Modules that nothing imports: they are run as scripts."""

DATA = ("nodes/agent/requirements-cpu.txt", "nodes/agent/convert.py")
SHEBANG = b"#!/usr/bin/env python3\n"
DATE = (1980, 1, 1, 0, 0, 0)
MAIN = f"import sys\nfrom {START} import main\nsys.exit(main())\n"
OURS = ("nodes", "config")


@dataclass(frozen=True, slots=True)
class Zipapp:
    """The file, its version, and the SHA-256 that an agent holds a download against."""

    content: bytes
    sha256: str
    version: str = AGENT_VERSION


def build_zipapp(root: Path | None = None) -> Zipapp:
    """From the sources under `root`, which holds the packages; None: those that run now. Takes some 100 ms."""
    root = root or Path(__file__).parents[2]
    files = {name: (root / name).read_bytes() for name in (*_modules(root), *DATA)}
    files["__main__.py"] = MAIN.encode()
    archive = io.BytesIO()
    archive.write(SHEBANG)
    with zipfile.ZipFile(archive, "a", zipfile.ZIP_STORED) as writer:
        for name, content in sorted(files.items()):
            entry = zipfile.ZipInfo(name, DATE)
            entry.external_attr = 0o644 << 16
            entry.create_system = 3  # the same wherever it is made
            writer.writestr(entry, content)
    content = archive.getvalue()
    return Zipapp(content, hashlib.sha256(content).hexdigest())


def _modules(root: Path) -> set[str]:
    """Files of all modules of ours that the agent imports, also inside functions, and of the packages they are in."""
    found: set[str] = set()
    todo = [START, *ALSO]
    while todo:
        module = todo.pop()
        file = _file(root, module)
        if file is None or file in found:
            continue
        found.add(file)
        todo += _imports((root / file).read_text(), module)
        if "." in module:
            todo.append(module.rpartition(".")[0])
    return found


def _file(root: Path, module: str) -> str | None:
    path = module.replace(".", "/")
    return next((name for name in (f"{path}.py", f"{path}/__init__.py") if (root / name).is_file()), None)


# Not `ast`: in Python 3.11.7 it fails where the garbage collector logs an error meanwhile (CPython's issue 106905).
IMPORT = re.compile(r"^[ \t]*(?:from (\S+) import (\([^)]*\)|.*)|import (.*))$", re.MULTILINE)
NAME = re.compile(r"[\w.]+")


def _imports(source: str, module: str) -> Iterator[str]:
    for found in IMPORT.finditer(source):
        package, names, modules = found.groups()
        if package is None:
            yield from (name for name in NAME.findall(modules) if name.partition(".")[0] in OURS)
            continue
        assert not package.startswith("."), f"{module} imports relatively"
        if package.partition(".")[0] in OURS:
            yield package
            yield from (f"{package}.{name}" for name in NAME.findall(names))
