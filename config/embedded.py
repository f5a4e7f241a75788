"""Owns the PostgreSQL and the Valkey of a data folder: one owner at a time, and both gone when it is gone.

How each is run is left to `embedded_postgres`, `embedded_valkey` and `embedded_server`.
"""

import contextlib
import fcntl
import hashlib
import os
import socket
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Self

from config import embedded_postgres, embedded_valkey
from config.defaults import Settings
from config.embedded_server import EmbeddedStartFailed, Server

__all__ = [
    "DataFolderInUse",
    "EmbeddedNotRunning",
    "EmbeddedStartFailed",
    "EmbeddedStores",
    "embedded_urls",
    "stores_for",
]

# The longest unix socket path that Linux takes is 107 bytes, macOS 103.
SOCKET_PATH_BYTES_MAX = 103
_NO_OPTIONS: Mapping[str, str] = MappingProxyType({})


class DataFolderInUse(RuntimeError):
    """Another process runs the stores of this data folder."""


class EmbeddedNotRunning(RuntimeError):
    """Nothing runs the stores of this data folder."""


def _silent(_line: str) -> None:
    """Tell nobody."""


class EmbeddedStores:
    """A running PostgreSQL and a running Valkey, ours until `stop`. Main thread only; its calls block."""

    def __init__(self, data_dir: Path, lock: int, servers: list[Server]) -> None:
        self.data_dir = data_dir
        self.database_url, self.redis_url = _urls(_socket_dir(data_dir))
        self._lock = lock
        self._servers = servers

    @classmethod
    def start(
        cls,
        data_dir: Path,
        *,
        progress: Callable[[str], None] = _silent,
        postgres_options: Mapping[str, str] = _NO_OPTIONS,
    ) -> Self:
        """Start both and wait until they answer (half a second at first, a tenth later).

        Raises DataFolderInUse, EmbeddedStartFailed. `postgres_options` are set over the defaults.
        """
        data_dir = Path(data_dir).resolve()
        lock = _take(data_dir)
        servers: list[Server] = []
        try:
            socket_dir = _make_socket_dir(data_dir)
            progress("starting Valkey")
            servers.append(Server(embedded_valkey.prepare(data_dir, socket_dir)))
            servers[-1].start()
            progress("starting PostgreSQL")
            servers.append(
                Server(
                    embedded_postgres.prepare(
                        data_dir, socket_dir, options=postgres_options, progress=progress
                    )
                )
            )
            servers[-1].start()
            return cls(data_dir, lock, servers)
        except BaseException:
            _stop(data_dir, servers, lock)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"<EmbeddedStores {self.data_dir} {self._servers}>"

    @property
    def pids(self) -> dict[str, int]:
        """Process ids by server name."""
        return {server.name: server.pid for server in self._servers if server.pid is not None}

    def poll(self) -> list[str]:
        """Names of the servers that died since they were started."""
        return [server.name for server in self._servers if not server.is_alive]

    def restart(self, name: str) -> None:
        """Start a server that died once more. Raises EmbeddedStartFailed."""
        server = next(server for server in self._servers if server.name == name)
        server.stop()
        server.start()

    def stop(self) -> None:
        """Stop both cleanly and give the data folder back. Harmless when repeated."""
        servers, self._servers = self._servers, []
        lock, self._lock = self._lock, -1
        _stop(self.data_dir, servers, lock)


def embedded_urls(data_dir: Path) -> tuple[str, str]:
    """Addresses (PostgreSQL, Valkey) of the stores that another process runs there, or EmbeddedNotRunning."""
    data_dir = Path(data_dir).resolve()
    if data_dir.exists() and not os.access(data_dir, os.X_OK):
        raise EmbeddedNotRunning(
            f"the data folder {data_dir} belongs to user {data_dir.stat().st_uid}, and we are user {os.geteuid()}: run "
            "this as its owner"
        )
    socket_dir = _socket_dir(data_dir)
    postgres = embedded_postgres.folder_of(socket_dir) / embedded_postgres.SOCKET
    if not (
        _accepts(postgres)
        and embedded_valkey.answers(embedded_valkey.folder_of(socket_dir) / embedded_valkey.SOCKET)
    ):
        raise EmbeddedNotRunning(
            f"no stores run in the data folder {data_dir}: start them with `poolgate up`, name another "
            "folder with POOLGATE_DATA_DIR, or set DATABASE_URL and REDIS_URL"
        )
    return _urls(socket_dir)


@contextlib.contextmanager
def stores_for(settings: Settings, *, progress: Callable[[str], None] = _silent) -> Iterator[tuple[str, str]]:
    """Addresses (PostgreSQL, Valkey) for one command: those that were set, those that run, or started for it.

    Raises DataFolderInUse while another command starts the same ones, EmbeddedStartFailed.
    """
    if settings.database_url and settings.redis_url:
        yield settings.database_url, settings.redis_url
        return
    with contextlib.ExitStack() as started:
        try:
            running = embedded_urls(Path(settings.data_dir))
        except EmbeddedNotRunning:
            stores = started.enter_context(EmbeddedStores.start(Path(settings.data_dir), progress=progress))
            running = stores.database_url, stores.redis_url
        yield settings.database_url or running[0], settings.redis_url or running[1]


def _stop(data_dir: Path, servers: list[Server], lock: int) -> None:
    for server in servers:
        server.ask_to_stop()
    for server in servers:
        server.stop()
    if lock >= 0:
        if (link := _socket_dir(data_dir)) != data_dir:
            link.unlink(missing_ok=True)
        os.close(lock)


def _take(data_dir: Path) -> int:
    """Become the owner of the folder: a lock that ends with us, however we end. Children don't inherit it."""
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(data_dir / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise EmbeddedStartFailed(
            f"the data folder {data_dir} can't be used by user {os.geteuid()}: {error.strerror}. Run as its owner, or "
            "name another folder with POOLGATE_DATA_DIR"
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.pread(lock, 32, 0).decode(errors="replace").strip() or "unknown"
        os.close(lock)
        raise DataFolderInUse(
            f"the data folder {data_dir} is in use by process {owner}: stop that one, or name another folder "
            "with POOLGATE_DATA_DIR"
        ) from None
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
    return lock


def _urls(socket_dir: Path) -> tuple[str, str]:
    return embedded_postgres.url_of(socket_dir), embedded_valkey.url_of(socket_dir)


def _socket_dir(data_dir: Path) -> Path:
    """The data folder by a name short enough for sockets below it, without a comma (it separates hosts)."""
    longest = max(
        embedded_postgres.folder_of(data_dir) / f"{embedded_postgres.SOCKET}.lock",
        embedded_valkey.folder_of(data_dir) / embedded_valkey.SOCKET,
        key=lambda path: len(os.fsencode(path)),
    )
    if len(os.fsencode(longest)) <= SOCKET_PATH_BYTES_MAX and "," not in str(data_dir):
        return data_dir
    # Not TMPDIR: each process that connects must come to the same name.
    links = Path(f"/tmp/poolgate-{os.geteuid()}")  # noqa: S108 - owner and mode are checked by who makes it
    return links / hashlib.sha256(os.fsencode(data_dir)).hexdigest()[:12]


def _make_socket_dir(data_dir: Path) -> Path:
    """`_socket_dir`, made where it is a link in a private folder of ours."""
    link = _socket_dir(data_dir)
    if link == data_dir:
        return link
    link.parent.mkdir(mode=0o700, exist_ok=True)
    found = link.parent.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise EmbeddedStartFailed(
            f"{link.parent} is not a private folder of ours: remove it, or shorten {data_dir}"
        )
    link.unlink(missing_ok=True)
    link.symlink_to(data_dir)
    return link


def _accepts(address: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(1.0)
        try:
            connection.connect(str(address))
        except OSError:
            return False
    return True
