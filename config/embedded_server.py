"""Owns one store server as our child process: started, awaited, watched, stopped, and never left behind.

Which servers there are and how they are called is said by `embedded_postgres` and `embedded_valkey`.
"""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from config.procs import pdeathsig

# A first start takes half a second. Replaying the write-ahead log after a crash can take minutes, and a
# server that is still alive and says that it is starting is not to be given up earlier.
START_BOUND_S = 300.0
# A shutdown writes at most one checkpoint (about 1 GB of log) or one append-only file; past it the server is
# killed.
STOP_BOUND_S = 20.0
# A killed PostgreSQL frees its shared memory when its last backend notices; that took less than a second.
MEMORY_BOUND_S = 15.0
LOG_BYTES_MAX = 10 * 2**20
_POLL_S = 0.01
_LOG_TAIL_BYTES = 2000
_HAS_PROC = Path("/proc/self/cwd").exists()


class EmbeddedStartFailed(RuntimeError):
    """An embedded server could not be started; the message ends with what it wrote last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """How one server is run. `user` is (uid, gid) to become, None to stay who we are."""

    name: str
    argv: tuple[str, ...]
    folder: Path
    log: Path
    pid_file: Path
    is_ready: Callable[[int], bool]
    stop_signal: signal.Signals
    user: tuple[int, int] | None = None
    retry_on: str = ""
    """Words in the log after which a failed start is tried again for a while."""
    environment: dict[str, str] = field(default_factory=lambda: clean_environment())


def clean_environment() -> dict[str, str]:
    """Little of ours: PGDATA, PGOPTIONS and the like would change what the servers do."""
    return {"PATH": os.environ.get("PATH", "/usr/bin:/bin"), "LC_ALL": "C", "TZ": "UTC"}


class Server:
    """One running server. Not for use by several threads."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._process: subprocess.Popen[bytes] | None = None

    def __repr__(self) -> str:
        state = "stopped" if self._process is None else "running" if self.is_alive else "dead"
        return f"<Server {self.name} {state} pid={self.pid}>"

    @property
    def name(self) -> str:
        return self._program.name

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    @property
    def is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start it and wait until it answers. Raises EmbeddedStartFailed. Blocking, main thread only."""
        program = self._program
        stop_leftover(program)
        deadline = time.monotonic() + MEMORY_BOUND_S
        while (said := self._try_start()) is not None:
            if not (program.retry_on and program.retry_on in said and time.monotonic() < deadline):
                raise EmbeddedStartFailed(
                    f"{program.name} did not start; its log {program.log} ends with:\n{said}"
                )
            time.sleep(0.2)

    def ask_to_stop(self) -> None:
        """Signal it, and do not wait: several servers can then go down at once."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(self._program.stop_signal)
            self._process.send_signal(signal.SIGCONT)  # one that was paused would not see the first

    def stop(self) -> None:
        """Stop it cleanly, or after STOP_BOUND_S by force. Harmless when it does not run."""
        self.ask_to_stop()
        if self._process is None:
            return
        try:
            self._process.wait(STOP_BOUND_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def _try_start(self) -> str | None:
        """None once it answers, else what it logged before it ended."""
        program = self._program
        _rotate(program.log)
        # Private: PostgreSQL logs the text of a statement that failed.
        with open(program.log, "ab", opener=_private) as log:
            log_start = log.tell()
            self._process = _run(program, log)
        if self._await_ready(self._process):
            return None
        self.stop()
        return _tail(program.log, log_start)

    def _await_ready(self, process: subprocess.Popen[bytes]) -> bool:
        deadline = time.monotonic() + START_BOUND_S
        while process.poll() is None and time.monotonic() < deadline:
            if self._program.is_ready(process.pid):
                return True
            time.sleep(_POLL_S)
        return False


def _run(program: Program, log: BinaryIO) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(  # noqa: S603 - our own program and arguments
            program.argv, cwd=program.folder, env=program.environment, stdin=subprocess.DEVNULL, stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C in a terminal is for their owner, which stops them last
            preexec_fn=pdeathsig(program.stop_signal), **as_user(program.user),
        )  # fmt: skip
    except OSError as error:
        raise EmbeddedStartFailed(f"{program.argv[0]} can't be run in {program.folder}: {error}") from error


def as_user(user: tuple[int, int] | None) -> dict[str, Any]:
    """Options of `subprocess` that run a child as `user` and in no other group."""
    return {} if user is None else {"user": user[0], "group": user[1], "extra_groups": []}


def stop_leftover(program: Program) -> None:
    """Stop what an earlier owner of the data folder left running, and forget its pid file.

    Only called by the holder of the folder's lock, so whoever still runs there has lost its owner: it is on
    its way out after a death signal, or the system (macOS) has none. A pid that meanwhile names another
    program is not touched.
    """
    pid = read_pid(program.pid_file)
    if pid is None:
        return
    executable = Path(program.argv[0]).name
    deadline, wanted = time.monotonic(), program.stop_signal
    while program_of(pid) == executable and works_in(pid, program.folder):
        if time.monotonic() >= deadline:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, wanted)
            deadline, wanted = time.monotonic() + STOP_BOUND_S, signal.SIGKILL
        time.sleep(_POLL_S)
    program.pid_file.unlink(missing_ok=True)


def read_pid(pid_file: Path) -> int | None:
    """The first line of a pid file, None where there is none."""
    try:
        first = pid_file.read_text(errors="replace").partition("\n")[0].strip()
    except FileNotFoundError:
        return None
    return int(first) if first.isdigit() and int(first) > 1 else None


def program_of(pid: int) -> str:
    """The file name of the program that process `pid` runs, empty where there is no such process."""
    if _HAS_PROC:
        try:
            return Path(f"/proc/{pid}/comm").read_text().strip()
        except OSError:
            return ""
    command = ["ps", "-o", "comm=", "-p", str(pid)]
    listed = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    return Path(listed.stdout.strip()).name


def works_in(pid: int, folder: Path) -> bool:
    """True if `folder` is the working folder of the process, or where the system doesn't tell."""
    if not _HAS_PROC:
        return True
    try:
        return Path(f"/proc/{pid}/cwd").samefile(folder)
    except OSError:  # it is gone, a zombie, or another user's
        return False


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _rotate(log: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        if log.stat().st_size > LOG_BYTES_MAX:
            log.replace(log.with_suffix(".log.1"))


def _tail(log: Path, start: int) -> str:
    with log.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(start, size - _LOG_TAIL_BYTES))
        return file.read().decode(errors="replace").strip() or "(nothing)"
