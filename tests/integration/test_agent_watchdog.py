"""Whatever one process of an engine is killed, nothing of it is left: with real process trees."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from nodes.agent.tied import TiedProcess
from tests.fakes.processes import all_gone, eventually
from tests.fakes.tree_engine import __file__ as TREE_ENGINE

OWNER = """
import sys, time
from pathlib import Path
from nodes.agent.tied import TiedProcess
process = TiedProcess(sys.argv[2:])
Path(sys.argv[1]).write_text(str(process.pid))
time.sleep(600)
"""


def tree_command(folder: Path) -> list[str]:
    return [sys.executable, TREE_ENGINE, "0", "toy", str(folder)]


def tree_pids(folder: Path) -> dict[str, int]:
    """{"engine": pid, "child": pid, "grandchild": pid} once all three run; the grandchild has its own session."""

    def read() -> dict[str, int] | None:
        try:
            lines = (folder / "pids").read_text().splitlines()
        except FileNotFoundError:
            return None
        pids = {name: int(pid) for name, pid in (line.split() for line in lines)}
        return pids if len(pids) == 3 else None

    return eventually(read)


@pytest.mark.parametrize("victim", ["engine", "child", "grandchild", "watchdog"])
def test_no_process_is_left_after_one_was_killed(tmp_path: Path, victim: str) -> None:
    process = TiedProcess(tree_command(tmp_path))
    pids = tree_pids(tmp_path)
    os.kill(process.pid if victim == "watchdog" else pids[victim], signal.SIGKILL)
    if victim in ("child", "grandchild"):  # the engine lives on without it; then it is its owner who ends it
        assert process.poll() is None
        process.kill()
    assert process.wait(timeout=20) != 0
    all_gone(pids.values())


def test_no_process_is_left_after_the_owner_was_killed(tmp_path: Path) -> None:
    told = tmp_path / "watchdog"
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(told), *tree_command(tmp_path)])
    pids = tree_pids(tmp_path)
    watchdog = int(eventually(lambda: told.exists() and told.read_text()))
    owner.kill()
    owner.wait()
    all_gone([watchdog, *pids.values()])


def test_exit_code_of_the_command_is_told() -> None:
    assert TiedProcess([sys.executable, "-c", "raise SystemExit(7)"]).wait(timeout=20) == 7


def test_death_by_a_signal_is_told_as_128_and_its_number() -> None:
    command = [sys.executable, "-c", "import os; os.kill(os.getpid(), 11)"]
    assert TiedProcess(command).wait(timeout=20) == 128 + signal.SIGSEGV


def test_terminate_reaches_the_command_alone(tmp_path: Path) -> None:
    code = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(5)); print('up', flush=True); time.sleep(600)"
    output = tmp_path / "output"
    with output.open("wb") as file:
        process = TiedProcess([sys.executable, "-c", code], output=file)
    eventually(lambda: "up" in output.read_text())
    process.terminate()
    assert process.wait(timeout=20) == 5


def test_a_command_that_does_not_exist_ends_with_an_error() -> None:
    assert TiedProcess(["/nonexistent/engine"]).wait(timeout=20) == 1


def test_the_tie_is_not_inherited_by_other_children(tmp_path: Path) -> None:
    """Else one engine's processes would keep another's watchdog from seeing the owner's death."""
    first = TiedProcess([sys.executable, "-c", "import time; time.sleep(600)"])
    second = TiedProcess([sys.executable, "-c", "import time; time.sleep(600)"])
    first.kill()
    assert first.wait(timeout=20) == 137
    assert psutil.pid_exists(second.pid)
    second.kill()
    assert second.wait(timeout=20) == 137
