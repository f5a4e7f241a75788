"""A SIGHUP of a terminal that hangs up ends the gateway; one that somebody sends has settings read again. Each is heard at
once, as is the end of a worker."""

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import gateway.supervisor
from gateway.supervisor import heeded_signals
from tests.waiting import wait_until

ROOT = Path(__file__).resolve().parents[2]
HEEDING = """
import os, sys
import gateway.supervisor
gateway.supervisor.CALM_S = 3600.0
silent, _ = os.pipe()
with gateway.supervisor.heeded_signals() as signals, open(sys.argv[1], "a", buffering=1) as told:
    told.write("heeds\\n")
    while not signals.stop:
        if signals.reload:
            signals.reload = False
            told.write("reloads\\n")
        signals.wait([silent])
    told.write("stops\\n")
"""


def _heed_hangups() -> None:
    """Also where the tests themselves were told not to (nohup)."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.mark.parametrize("has_terminal", [True, False])
def test_a_hangup_is_told_from_a_wish_to_reload(tmp_path: Path, has_terminal: bool):
    told = tmp_path / "told"
    told.touch()
    ours, theirs = pty.openpty()
    # A shell that opens a terminal as a session leader gets it as its controlling terminal, for all that it starts.
    command = f'exec <"{os.ttyname(theirs)}"; "{sys.executable}" -c "$0" "{told}"; exit'
    process = subprocess.Popen(
        ["sh", "-c", command, HEEDING] if has_terminal else [sys.executable, "-c", HEEDING, str(told)],
        cwd=ROOT, start_new_session=True, preexec_fn=_heed_hangups,
    )  # fmt: skip
    try:
        wait_until(lambda: told.read_text() == "heeds\n")
        if not has_terminal:
            process.send_signal(signal.SIGHUP)
            wait_until(lambda: told.read_text() == "heeds\nreloads\n")
        os.close(ours)
        if has_terminal:
            wait_until(lambda: told.read_text() == "heeds\nstops\n")
        else:
            process.terminate()
        process.wait(30)
    finally:
        os.close(theirs)
        process.kill()
        process.wait()


def test_the_end_of_a_worker_wakes_its_supervisor(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gateway.supervisor, "CALM_S", 3600.0)
    hears, tells = os.pipe()
    try:
        with heeded_signals() as signals:
            os.close(tells)
            signals.wait([hears])
    finally:
        os.close(hears)
