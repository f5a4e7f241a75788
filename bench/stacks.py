"""Call stacks as py-spy samples them, made readable, summed by file, and drawn as a flame graph.

The format is that of collapsed stacks: frames from the outermost, separated by semicolons, a space, and a count. Compiled
functions are C functions there, by whose names they are shown as Python's.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from bench.svg import Canvas
from config.compiled import LIBRARY, MODULES, path_of

Stacks = Mapping[tuple[str, ...], int]

OURS = ("gateway/", "billing/", "nodes/", "config/")
LOOP = "event loop"
STARTING = ("<frozen runpy>", "asyncio/runners.py", "uvloop/__init__.py", "threading.py", "gateway/worker.py")
"""Files of frames that are in every stack and say nothing."""

_FRAME = re.compile(r"^(?P<name>.*) \((?P<file>.*?)(?::\d+)?\)$")
_SHARED = re.compile(r"^(?P<name>[^.]+).*\.so")
NATIVE = {"loop": "uvloop", "protocol": "asyncpg", "libc": "libc", "parser": "httptools", LIBRARY: "python"}
_MARK = re.compile(r"^CPy(Def_|Py_|Dunder_(am_send|__[a-z]+__))")
"""What mypyc writes before the name of a function: its own, the one that Python calls, a slot's."""

WIDTH, ROW, PIXELS_MIN, LETTER = 1200, 17, 1.0, 6.3


def parse(raw: str) -> Counter[tuple[str, ...]]:
    """Each readable stack with its count: Python frames as `function file`, and at the end what ran in C, if anything did.

    Of the main thread only: the others wait for disks and pipes, which a sampler of C frames can't tell from work.
    """
    stacks: Counter[tuple[str, ...]] = Counter()
    for line in raw.splitlines():
        stack, _, count = line.rpartition(" ")
        thread, *frames = stack.split(";")
        if thread.endswith("MainThread"):
            stacks[readable(frames)] += int(count)
    return stacks


def readable(frames: Iterable[str]) -> tuple[str, ...]:
    """Without start-up, line numbers and the interpreter's own C functions."""
    kept: list[str] = []
    native = ""
    for frame in frames:
        found = _FRAME.match(frame)
        name, file = (found["name"], found["file"]) if found else (frame, "")
        if file.endswith(".py") or file.startswith("<"):
            native = ""
            if file not in STARTING:
                kept.append(f"{name} {file}")
        elif file.startswith(LIBRARY) and (known := _compiled(name)):
            native = ""
            if kept[-1:] != [known]:  # what Python calls, and what that calls
                kept.append(known)
        else:
            native = _native(name, file)
    return (*(kept or [LOOP]), *([native] if native else []))


def _compiled(symbol: str) -> str:
    """The function and the file that this C function was made of; empty for one of mypyc's own."""
    rest = _MARK.sub("", symbol.partition(".")[0])  # gcc marks parts of functions with a point
    for prefix, file in PREFIXES.items():
        if rest.startswith(prefix):
            return f"{rest.removeprefix(prefix).replace('___', '.')} {file}"
    return ""


def _prefixes() -> Iterator[tuple[str, str]]:
    """How the names of each module's C functions begin: with the last parts of its name that no other module has."""
    for module in MODULES:
        ends = [".".join(module.split(".")[-count:]) for count in range(1, module.count(".") + 2)]
        end = next(end for end in ends if sum(f".{each}".endswith(f".{end}") for each in MODULES) == 1)
        yield end.replace(".", "___") + "___", path_of(module, ".py")


PREFIXES = dict(_prefixes())


def _native(name: str, file: str) -> str:
    """What a C frame belongs to, with its name where that says something (a system call's)."""
    shared = _SHARED.match(file.rsplit("/", 1)[-1])
    stem = shared["name"] if shared else file.rsplit("/", 1)[-1].partition(".")[0]
    owner = NATIVE.get(stem) or (stem if shared and not stem.startswith("libpython") else "python")
    return f"{name} [libc]" if owner == "libc" and not name.startswith(("0x", "_")) else f"[{owner}]"


def owner(stack: Iterable[str]) -> str:
    """Whose time it is: the innermost file of ours, with the libraries that it called; else the outermost library."""
    files = [frame.rpartition(" ")[2] for frame in stack]
    ours = [file for file in files if file.startswith(OURS)]
    if ours:
        return ours[-1]
    return files[0].partition("/")[0] if files[0].endswith(".py") else LOOP


def by_owner(stacks: Stacks) -> Counter[str]:
    """How often each owner was seen."""
    found: Counter[str] = Counter()
    for stack, count in stacks.items():
        found[owner(stack)] += count
    return found


@dataclass
class Node:
    """A frame with all that was seen below it."""

    count: int = 0
    below: dict[str, "Node"] = field(default_factory=dict)


def tree_of(stacks: Stacks) -> Node:
    root = Node()
    for stack, count in stacks.items():
        node = root
        node.count += count
        for frame in stack:
            node = node.below.setdefault(frame, Node())
            node.count += count
    return root


def flame(stacks: Stacks, title: str) -> str:
    """An SVG: each frame as wide as its share of time, callees below their callers."""
    root = tree_of(stacks)
    placed: list[tuple[float, int, float, str, int]] = []
    _place(root, 0.0, 0, WIDTH / max(1, root.count), placed)
    depth = 1 + max((row for _, row, *_ in placed), default=0)
    canvas = Canvas(WIDTH, 30 + ROW * depth)
    canvas.text(6, 19, title, weight="bold")
    for left, row, width, frame, count in placed:
        share = f"{frame}: {count / root.count:.1%}"
        canvas.box(left, 30 + row * ROW, width - 0.4, ROW - 1, fill=_colour(frame), hint=share)
        letters = int((width - 6) / LETTER)
        if letters > 3:
            canvas.text(left + 3, 30 + row * ROW + 12, frame[:letters], size=10)
    return canvas.svg()


def _place(
    node: Node, left: float, row: int, scale: float, placed: list[tuple[float, int, float, str, int]]
) -> None:
    for frame, below in sorted(node.below.items()):
        width = below.count * scale
        if width >= PIXELS_MIN:
            placed.append((left, row, width, frame, below.count))
            _place(below, left, row + 1, scale, placed)
        left += width


def _colour(frame: str) -> str:
    file = frame.rpartition(" ")[2]
    if file.startswith("gateway/"):
        return "#f4a261"
    if file.startswith(("billing/", "nodes/", "config/")):
        return "#e9c46a"
    return "#b8c4d6" if file.endswith(".py") else "#8fb9aa"
