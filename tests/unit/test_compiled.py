"""Compiled modules are used while they are fresh and wanted; making them says what is lacking, and fails nothing."""

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from config import compiled, compiling

ROOT = compiled.ROOT


def python(code: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run in a process of its own, which has the switch only where it is given."""
    kept = {name: value for name, value in os.environ.items() if name not in (compiled.SWITCH, "PYTHONPATH")}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=kept | environment, capture_output=True, text=True, check=True
    )  # fmt: skip


# --- what is fresh --------------------------------------------------------------------------------------------------


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A copy of what the digest is of."""
    for name in (compiled.__name__, *compiled.MODULES):
        path = tmp_path / "sources" / compiled.path_of(name, ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / compiled.path_of(name, ".py"), path)
    return tmp_path / "sources"


def test_equal_sources_have_one_digest_wherever_they_are(sources: Path):
    assert compiled.digest(sources) == compiled.digest()


@pytest.mark.parametrize("name", [compiled.__name__, *compiled.MODULES])
def test_a_change_of_any_source_changes_the_digest(sources: Path, name: str):
    before = compiled.digest(sources)
    with (sources / compiled.path_of(name, ".py")).open("a") as file:
        file.write("\n")
    assert compiled.digest(sources) != before


def test_another_interpreter_changes_the_digest(monkeypatch: pytest.MonkeyPatch):
    before = compiled.digest()
    monkeypatch.setattr(sys, "version", "3.99.0 (elsewhere)")
    assert compiled.digest() != before


def test_it_is_fresh_with_the_stamp_of_these_sources(tmp_path: Path):
    assert not compiled.is_fresh(tmp_path / "nothing")
    assert not compiled.is_fresh(tmp_path)
    stamp = tmp_path / compiled.STAMP
    stamp.write_text("of others")
    assert not compiled.is_fresh(tmp_path)
    stamp.write_text(compiled.digest())
    assert compiled.is_fresh(tmp_path)


# --- what is used ---------------------------------------------------------------------------------------------------

USE = """
import sys
from config import compiled
compiled.is_fresh = lambda: IS_FRESH
sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not compiled.CompiledFinder]
compiled.use(), compiled.use()
print(sys.meta_path.count(compiled.CompiledFinder), compiled.is_used(), compiled.how())
"""


def test_what_is_fresh_is_used_once_however_often_it_is_asked_for():
    assert python(USE.replace("IS_FRESH", "True")).stdout.split() == ["1", "True", "compiled"]


def test_what_is_not_fresh_is_not_used():
    assert python(USE.replace("IS_FRESH", "False")).stdout.split() == ["0", "False", "interpreted"]


def test_the_switch_leaves_it_alone():
    told = python(USE.replace("IS_FRESH", "True"), **{compiled.SWITCH: "0"}).stdout.split()
    assert told == ["0", "False", "interpreted"]


def test_with_the_switch_every_module_is_its_source():
    code = f"import importlib; [print(importlib.import_module(name).__file__) for name in {compiled.MODULES}]"
    files = python(code, **{compiled.SWITCH: "0"}).stdout.split()
    assert files == [str(ROOT / compiled.path_of(name, ".py")) for name in compiled.MODULES]


@pytest.mark.skipif(compiling.lacking() is not None, reason="something to compile with is missing")
def test_here_every_module_is_compiled():
    assert compiled.is_fresh(), "run `python -m config.compiling` (`make install-test` does)"
    code = f"import importlib; [print(importlib.import_module(name).__file__) for name in {compiled.MODULES}]"
    files = python(code).stdout.split()
    assert files == [
        str(compiled.FOLDER / compiled.path_of(name, compiled.SUFFIX)) for name in compiled.MODULES
    ]


# --- making it ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("environment", [{"PATH": ""}, {"CC": "no-such-compiler -pthread"}])
def test_without_a_compiler_it_says_so_and_fails_nothing(tmp_path: Path, environment: dict[str, str]):
    shutil.copytree(ROOT / "config", tmp_path / "config")
    code = "import runpy; runpy.run_module('config.compiling', run_name='__main__')"
    done = python(code, tmp_path, **environment)  # which asserts an exit code of 0
    assert "will run interpreted" in done.stderr
    assert "a C compiler (" in done.stderr
    assert {entry.name for entry in tmp_path.iterdir()} == {"config"}


def test_what_can_not_be_compiled_is_told_and_fails_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    def fails(folder: Path) -> None:
        raise SystemExit("line 7 is beyond me")

    monkeypatch.setattr(compiling, "is_fresh", lambda: False)
    monkeypatch.setattr(compiling, "lacking", lambda: None)
    monkeypatch.setattr(compiling, "_make", fails)
    assert compiling.main() == 0
    assert "interpreted: it could not be compiled: line 7 is beyond me" in capsys.readouterr().err


# --- what may be compiled -------------------------------------------------------------------------------------------

WAITS = (ast.Await, ast.AsyncFor, ast.AsyncWith, ast.Yield, ast.YieldFrom)

ENDS_AT_ONCE = ("asyncio.timeout(", "self._slots")
"""Contexts that `async with` leaves without waiting; a semaphore is one."""


def waits(parts: Iterable[ast.AST]) -> bool:
    return any(isinstance(inner, WAITS) for part in parts for inner in ast.walk(part))


def handles_and_waits(node: ast.AST) -> bool:
    if isinstance(node, ast.Try):
        return waits(node.handlers) or waits(node.finalbody)
    if isinstance(node, ast.AsyncWith):
        contexts = [ast.unparse(item.context_expr) for item in node.items]
        return waits(node.body) and not all(context.startswith(ENDS_AT_ONCE) for context in contexts)
    return False


@pytest.mark.parametrize("name", compiled.MODULES)
def test_nothing_is_awaited_while_an_exception_is_handled(name: str):
    """It would be another task's that is raised afterwards, or none at all."""
    tree = ast.parse((ROOT / compiled.path_of(name, ".py")).read_text())
    assert [node.lineno for node in ast.walk(tree) if handles_and_waits(node)] == []


@pytest.mark.parametrize(
    ("source", "is_refused"),
    [
        ("try: pass\nexcept OSError: await it", True),
        ("try: pass\nfinally: await it", True),
        ("async with lock: await it", True),
        ("async with asyncio.timeout(1), lock: await it", True),
        ("async with asyncio.timeout(1): await it", False),
        ("async with asyncio.TaskGroup() as tasks: tasks.create_task(it)", False),
        ("try: await it\nexcept OSError: raise", False),
    ],
)
def test_what_waits_there_is_seen(source: str, is_refused: bool):
    body = "\n".join(f"  {line}" for line in source.splitlines())
    tree = ast.parse(f"async def work():\n{body}")
    assert any(map(handles_and_waits, ast.walk(tree))) is is_refused


@pytest.mark.parametrize("name", compiled.MODULES)
def test_no_route_is_compiled(name: str):
    """Its handler's docstring, which describes it in the API document, would be gone; `test_errors` sees to errors."""
    assert "routes.post(" not in (ROOT / compiled.path_of(name, ".py")).read_text()
