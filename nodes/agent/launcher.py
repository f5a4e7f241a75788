"""Keeps the agent running where no service manager does, and goes back to the old agent when a new one does not come up.

A script of its own, standard library only, which the installer puts beside the zipapp and which updates never touch:
`python launcher.py ARGUMENTS...` runs `agent.pyz ARGUMENTS...` from its own folder. What an update is, is `update`'s
affair.

Its files: agent.pyz, agent.pyz.new (downloaded), agent.pyz.old (to go back to), trial (a new one has not yet been heard by
the gateway), refused (SHA-256 of those that did not come up).
"""

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

CURRENT, NEW, OLD, TRIAL, REFUSED = "agent.pyz", "agent.pyz.new", "agent.pyz.old", "trial", "refused"
LAUNCHED = "POOLGATE_LAUNCHED_FROM"
RESTART_CODE = 75  # EX_TEMPFAIL: start it again at once
FENCED_CODE = 78  # EX_CONFIG: another agent has this node; starting again would only take it from that one
TRIAL_S = 300.0  # a new agent that no gateway heard for so long has not come up
TRIES_MAX = 2
PAUSE_FIRST_S, PAUSE_MOST_S = 1.0, 60.0
STEADY_S = 60.0
POLL_S = 0.2
INHERITED_MAX = (
    1024  # what a shell or a program that installs has open is not to stay open for as long as this runs
)


def main(arguments: list[str]) -> int:
    os.closerange(3, INHERITED_MAX)
    folder = Path(__file__).resolve().parent
    stopping: list[int] = []
    child: list[subprocess.Popen[bytes]] = []

    def stop(number: int, _frame: object) -> None:
        stopping.append(number)
        for process in child:
            process.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    pause_s = PAUSE_FIRST_S
    while True:
        began = time.monotonic()
        environment = {**os.environ, LAUNCHED: str(folder)}
        command = [sys.executable, str(folder / CURRENT), *arguments]
        child[:] = [subprocess.Popen(command, env=environment)]  # noqa: S603 - our own program
        if stopping:
            child[0].send_signal(stopping[-1])
        code = watch(child[0], folder)
        if stopping or code in (0, FENCED_CODE):
            return (
                0 if code == FENCED_CODE else code
            )  # an end in order: service managers start only failures again
        if settle_trial(folder, code):
            continue
        pause_s = PAUSE_FIRST_S if time.monotonic() - began > STEADY_S else min(2 * pause_s, PAUSE_MOST_S)
        say(f"the agent ended with code {code}: started again in {pause_s:.0f} s")
        deadline = time.monotonic() + pause_s * random.uniform(0.5, 1.0)  # noqa: S311 - spreads load
        while time.monotonic() < deadline and not stopping:
            time.sleep(POLL_S)
        if stopping:
            return code


def watch(process: "subprocess.Popen[bytes]", folder: Path) -> int:
    """Its exit code; one that is on trial for too long is ended."""
    trial_ends = time.monotonic() + TRIAL_S
    while True:
        try:
            code = process.wait(POLL_S if (folder / TRIAL).exists() else None)
        except subprocess.TimeoutExpired:
            if (folder / TRIAL).exists() and time.monotonic() > trial_ends:
                say("the new agent is not heard by the gateway: it is ended")
                process.kill()
                (folder / TRIAL).write_text(str(TRIES_MAX))
            continue
        return 128 - code if code < 0 else code


def settle_trial(folder: Path, code: int) -> bool:
    """After an exit: True if the next start is to come at once."""
    if code == RESTART_CODE:
        return True
    trial = folder / TRIAL
    if not trial.exists():
        return False
    tries = int(trial.read_text() or "0") + 1
    if tries < TRIES_MAX:
        trial.write_text(str(tries))
        return True
    go_back(folder)
    return True


def go_back(folder: Path) -> None:
    """The old agent again; the new one is never tried another time."""
    say("the new agent did not come up: going back to the old one")
    current, old = folder / CURRENT, folder / OLD
    with (folder / REFUSED).open("a") as refused:
        refused.write(hashlib.sha256(current.read_bytes()).hexdigest() + "\n")
    (folder / TRIAL).unlink()
    if old.exists():
        old.replace(current)


def is_refused(folder: Path, sha256: str) -> bool:
    """Whether that agent did not come up before."""
    try:
        return sha256 in (folder / REFUSED).read_text().split()
    except FileNotFoundError:
        return False


def prepare_trial(folder: Path, sha256: str) -> None:
    """Put the downloaded agent in its place, whatever moment the power fails at. Raises OSError if it is not that one."""
    new, current, old = folder / NEW, folder / CURRENT, folder / OLD
    if hashlib.sha256(new.read_bytes()).hexdigest() != sha256:
        raise OSError("the download changed meanwhile")
    copy = folder / (OLD + ".part")
    copy.write_bytes(current.read_bytes())
    copy.replace(old)
    (folder / TRIAL).write_text("0")
    new.replace(current)


def say(words: str) -> None:
    print(f"poolgate launcher: {words}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
