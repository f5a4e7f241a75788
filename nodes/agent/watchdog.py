"""Runs one command and makes sure that nothing of it is left: ties an engine's processes to their owner.

A script of its own, standard library only: `python -c SOURCE FD -- COMMAND...`, started in a new session,
where FD is the read end of a pipe whose write end only the owner holds. Whether to start again is the owner's
affair.

What ends what (Linux):
    owner dies      the pipe ends: every descendant is killed, whatever session or group it moved to
    command exits   every other descendant is killed; the watchdog exits with its code (128 + signal)
    watchdog dies   the command gets SIGKILL from the kernel, all others from the owner (`tied`)
    SIGTERM         is passed to the command alone, which ends its own children in order
Where there is no /proc (macOS), the process group is killed instead of the descendants.
"""

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
KILLED = 128 + signal.SIGKILL
ROUNDS_MAX = 200  # a process that forks while it is being killed is caught by the next round, 10 ms later

# Loaded before the fork: that is not safe in a fork's child.
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def main(argv: list[str]) -> int:
    owner_fd, command = int(argv[1]), argv[3:]
    if _libc is not None:
        _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # orphans of the command become our children
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    me = os.getpid()
    child = subprocess.Popen(command, preexec_fn=lambda: _die_with(me))  # noqa: S603 - our own command
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, _: _tell(child.pid, number))
    code = _watch(owner_fd, wake_read, child.pid)
    _end_descendants()
    return code


def _die_with(parent: int) -> None:
    if _libc is not None:
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the line above
        os._exit(KILLED)


def _tell(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def _watch(owner_fd: int, wake_fd: int, child: int) -> int:
    while True:
        code = _reap(child)
        if code is not None:
            return code
        readable, _, _ = select.select([owner_fd, wake_fd], [], [])
        if wake_fd in readable:
            os.read(wake_fd, 4096)
        if owner_fd in readable and not os.read(owner_fd, 4096):
            return KILLED


def _reap(child: int) -> int | None:
    """The command's exit code once it has ended; adopted orphans are reaped on the way."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return KILLED
        if pid == 0:
            return None
        if pid == child:
            return 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def _end_descendants() -> None:
    if _libc is None:
        os.killpg(0, signal.SIGKILL)
    for _ in range(ROUNDS_MAX):
        pids = descendants(os.getpid())
        for pid in pids:
            _tell(pid, signal.SIGKILL)
        _reap(0)
        if not pids:
            return
        time.sleep(0.01)


def descendants(root: int) -> list[int]:
    """Every living process below `root`, found by parents in /proc (a zombie is none)."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):  # noqa: PTH208 - a Path object a process is waste here
        if entry.isdigit():
            try:
                state, parent = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[:2]
            except (OSError, ValueError):
                continue  # it ended meanwhile
            if state not in "ZX":
                children.setdefault(int(parent), []).append(int(entry))
    found: list[int] = []
    todo = [root]
    while todo:
        below = children.get(todo.pop(), [])
        found += below
        todo += below
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv))
