"""The zipapp: whole, the same bytes everywhere, and small in what it needs."""

import ast
import io
import subprocess
import sys
import zipfile
from pathlib import Path

from nodes.agent.environment import recipe_hash
from nodes.agent.package import REQUIREMENTS, build_zipapp
from nodes.protocol import AGENT_VERSION

ROOT = Path(__file__).resolve().parents[2]


def test_the_same_sources_give_the_same_bytes(tmp_path: Path) -> None:
    app = build_zipapp()
    for name in zipfile.ZipFile(io.BytesIO(app.content)).namelist():
        if name != "__main__.py":
            copy = tmp_path / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes((ROOT / name).read_bytes())
    assert build_zipapp(tmp_path).sha256 == app.sha256
    protocol = tmp_path / "nodes" / "protocol.py"
    protocol.write_text(protocol.read_text() + "\n")
    assert build_zipapp(tmp_path).sha256 != app.sha256


def test_it_starts_alone_and_says_its_version(tmp_path: Path) -> None:
    file = tmp_path / "agent.pyz"
    file.write_bytes(build_zipapp().content)
    said = subprocess.run(
        [sys.executable, "-I", "-S", str(file), "--version"], capture_output=True, text=True, check=True, cwd=tmp_path
    )  # fmt: skip
    assert said.stdout == f"poolgate agent {AGENT_VERSION}\n"


def test_it_needs_nothing_but_what_is_said() -> None:
    """Modules of others that its own import, wherever; pynvml and uvloop are used where they are there."""
    archive = zipfile.ZipFile(io.BytesIO(build_zipapp().content))
    used: set[str] = set()
    for name in archive.namelist():
        if (
            name.endswith(".py") and name != "nodes/agent/convert.py"
        ):  # which runs in the engine's environment
            for node in ast.walk(ast.parse(archive.read(name))):
                if isinstance(node, ast.Import):
                    used |= {alias.name.partition(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom):
                    used.add(str(node.module).partition(".")[0])
    named = {requirement.partition(">")[0] for requirement in REQUIREMENTS}
    assert used - set(sys.stdlib_module_names) - {"nodes", "config", "uvloop"} == named


def test_nothing_of_the_gateway_is_in_it() -> None:
    names = zipfile.ZipFile(io.BytesIO(build_zipapp().content)).namelist()
    assert {name.partition("/")[0] for name in names} == {"__main__.py", "config", "nodes"}
    assert {"nodes/agent/watchdog.py", "nodes/agent/launcher.py", "nodes/agent/main.py"} <= set(names)
    assert "nodes/heartbeats.py" not in names


def test_the_packed_agent_knows_by_which_recipe_an_engine_beside_it_was_made(tmp_path: Path) -> None:
    file = tmp_path / "agent.pyz"
    file.write_bytes(build_zipapp().content)
    code = "from nodes.agent.environment import recipe_hash; print(recipe_hash())"
    told = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(file)}, cwd=tmp_path, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert told.stdout.strip() == recipe_hash(), told.stderr
