"""No process outlives its parent, and no pipe end is where it should not be."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from config.procs import PARENT_FD, die_with_parent, pdeathsig, spawn, spawn_python
from tests.waiting import BOUND_S, is_gone, wait_until

ROOT = Path(__file__).parents[2]

CHILD = """
import os, sys, time
from config.procs import die_with_parent
assert die_with_parent(bound_s=60)
assert "POOLGATE_PARENT_FD" not in os.environ
# One write: with PYTHONUNBUFFERED a print is several, and two children share a pipe.
os.write(1, b"ready %d\\n" % os.getpid())
time.sleep(600)
"""
STUBBORN = """
import signal, time
from config.procs import die_with_parent
signal.signal(signal.SIGTERM, signal.SIG_IGN)
die_with_parent(bound_s=0.1)
print("ready", flush=True)
time.sleep(600)
"""
# A parent of two, so that the second could have inherited the first one's lifeline.
PARENT = f"""
import sys, time
from config.procs import spawn
for _ in range(2):
    spawn([sys.executable, "-c", {CHILD!r}])
time.sleep(600)
"""


def run_child(code: str, **options: object) -> subprocess.Popen[bytes]:
    child = spawn([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, **options)
    assert child.stdout.readline().startswith(b"ready")
    return child


def test_children_end_when_their_parent_is_killed():
    with subprocess.Popen([sys.executable, "-c", PARENT], cwd=ROOT, stdout=subprocess.PIPE) as parent:
        try:
            children = [int(parent.stdout.readline().split()[1]) for _ in range(2)]
        finally:
            parent.kill()
        for child in children:
            wait_until(lambda child=child: is_gone(child))


def test_a_child_whose_lifeline_is_cut_gets_a_sigterm():
    with run_child(CHILD) as child:
        child.cut_lifeline()
        child.cut_lifeline()
        assert child.wait(BOUND_S) == -signal.SIGTERM


def test_a_child_that_does_not_want_to_end_is_gone_after_its_bound():
    with run_child(STUBBORN) as child:
        child.cut_lifeline()
        assert child.wait(BOUND_S) == 1


def test_a_child_that_runs_keeps_running():
    with run_child(CHILD) as child:
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(0.2)
        child.kill()


def test_a_foreign_program_ends_by_its_death_signal():
    code = (
        "import signal, time; from config.procs import spawn\n"
        "print(spawn(['sleep', '600'], death_signal=signal.SIGKILL).pid, flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE) as parent:
        sleeper = int(parent.stdout.readline())
        parent.kill()
        wait_until(lambda: is_gone(sleeper))


def test_an_ended_child_leaves_no_descriptor_behind():
    before = psutil.Process().num_fds()
    for _ in range(3):
        with spawn(["true"]) as child:
            assert child.wait(BOUND_S) == 0
        child = spawn(["true"])
        wait_until(lambda child=child: child.poll() == 0)
        with pytest.raises(FileNotFoundError):
            spawn(["/no/such/program"])
    assert psutil.Process().num_fds() == before


def test_a_module_is_run_by_the_same_python():
    with spawn_python("platform", cwd=ROOT, stdout=subprocess.PIPE) as child:
        assert child.communicate(timeout=BOUND_S)[0]
        assert child.returncode == 0


def test_environment_and_descriptors_are_passed_on():
    reading, writing = os.pipe()
    code = f"import os; os.write({writing}, os.environ['GREETING'].encode())"
    with spawn([sys.executable, "-c", code], env={"GREETING": "hello"}, pass_fds=(writing,)) as child:
        assert child.wait(BOUND_S) == 0
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        assert pipe.read() == b"hello"


def test_who_was_not_spawned_watches_nobody(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(PARENT_FD, raising=False)
    assert not die_with_parent()
    monkeypatch.setenv(PARENT_FD, "999999")  # left by a grandparent, whose descriptor we don't have
    assert not die_with_parent()


def test_a_death_signal_is_refused_outside_the_main_thread():
    said: list[BaseException] = []

    def ask() -> None:
        try:
            pdeathsig(signal.SIGTERM)
        except RuntimeError as error:
            said.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert "main thread" in str(said[0])
